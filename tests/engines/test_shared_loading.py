"""One process of a machine reads a model, and the others map its weights: the same values in memory once, of which each
may still change its own."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engines.test_processes import in_two_processes
from safetensors.torch import load_file, save_file
from torch import nn

from trl_diffusion_sdpo.engines import shared_loading
from trl_diffusion_sdpo.engines.shared_loading import load_once

SIDE = 512  # a weight of this size takes 1 MiB


class Model(nn.Module):
    """Weights of each kind: two that are one, a buffer that no file has, a tensor that is no buffer, a turned one."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(SIDE, SIDE)
            self.tied = nn.Linear(SIDE, SIDE)
            self.tied.weight = self.first.weight
            self.frozen = nn.Parameter(torch.randn(SIDE, SIDE).bfloat16(), requires_grad=False)
            self.register_buffer("table", torch.randn(SIDE, SIDE), persistent=False)
            self.angles = torch.polar(torch.ones(SIDE, SIDE), torch.randn(SIDE, SIDE))
            self.turned = nn.Parameter(torch.randn(SIDE, SIDE).t())
            self.register_buffer("absent", torch.empty(SIDE, SIDE, device="meta"))


@pytest.fixture(autouse=True)
def sharding_engine(monkeypatch):
    monkeypatch.setattr(shared_loading, "shards_weights", lambda args: True)


def args_of(rank: int, place_on_machine: int | None = None) -> SimpleNamespace:
    place = rank if place_on_machine is None else place_on_machine
    return SimpleNamespace(process_index=rank, local_process_index=place, device=torch.device("cpu"))


def counted(make):
    """A function that loads, and the list of its calls."""
    calls = []
    return (lambda: calls.append(1) or make()), calls


def same(model: nn.Module, expected: nn.Module) -> bool:
    ours, theirs = (
        dict([*each.named_parameters(), *each.named_buffers(), ("angles", each.angles)]) for each in (model, expected)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert type(tensor) is type(other) and tensor.dtype == other.dtype and tensor.stride() == other.stride(), name
        assert tensor.requires_grad == other.requires_grad and tensor.device == other.device, name
        assert tensor.is_meta or torch.equal(tensor, other), name
    return model.tied.weight is model.first.weight


def test_the_second_process_has_what_the_first_has_loaded_and_does_not_load(tmp_path):
    def act(rank: int) -> str:
        load, calls = counted(Model)
        return f"{same(load_once(load, args_of(rank)), Model())} {len(calls)}"

    assert in_two_processes(act, tmp_path) == ["True 1", "True 0"]


def test_weights_take_memory_once_until_a_process_changes_its_own(tmp_path):
    def act(rank: int) -> str:
        model = load_once(Model, args_of(rank))
        weight = model.first.weight
        assert weight.sum().isfinite()  # reads all pages
        shared = memory_of(weight)
        shared_loading.gather_objects(None)
        weight.data += 1 + rank
        shared_loading.gather_objects(None)
        assert torch.equal(weight, Model().first.weight + (1 + rank))
        return f"{shared['Anonymous']} {memory_of(weight)['Anonymous']} kB"

    kilobytes = SIDE * SIDE * 4 // 1024
    assert in_two_processes(act, tmp_path) == [f"0 {kilobytes} kB"] * 2


def test_unchanged_weights_of_a_mapped_file_stay_there(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"kept": torch.randn(SIDE, SIDE), "changed": torch.zeros(SIDE, SIDE)}, file)

    def change() -> dict[str, torch.Tensor]:
        weights = {"kept": load_file(file)["kept"], "changed": load_file(file)["changed"]}
        weights["changed"] += 1
        return weights

    def act(rank: int) -> str:
        weights = load_once(change, args_of(rank))
        assert torch.equal(weights["kept"], load_file(file)["kept"])
        assert torch.equal(weights["changed"], torch.ones(SIDE, SIDE))
        return (
            f"{memory_of(weights['kept'])['path'] == str(file)} {memory_of(weights['changed'])['path'] == str(file)}"
        )

    assert in_two_processes(act, tmp_path) == ["True False"] * 2


def memory_of(tensor: torch.Tensor) -> dict:
    """The path and `Anonymous` (kB of its own) of the mapping that has a tensor."""
    found = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if not words[0].endswith(":"):
            start, end = (int(address, 16) for address in words[0].split("-"))
            found = start <= tensor.data_ptr() < end
            path = words[5] if len(words) > 5 else ""
        elif found and words[0] == "Anonymous:":
            return {"path": path, "Anonymous": int(words[1])}
    raise AssertionError("No mapping has the tensor.")


def test_more_weights_than_a_process_may_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_loading, "FILES_AT_ONCE", 2)

    def act(rank: int) -> str:
        assert same(load_once(Model, args_of(rank)), Model())
        opened = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
        return str(sum("memfd:" in path for path in opened))

    assert in_two_processes(act, tmp_path) == ["0", "0"]  # none stays open


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(SIDE, SIDE), 0.1, 0, torch.qint8)


class OwnParameter(nn.Parameter):
    pass


@pytest.mark.parametrize(
    "make",
    [threading.Lock, lambda: OwnParameter(torch.ones(SIDE, SIDE)), quantized],
    ids=["lock", "kind", "quantized"],
)
def test_what_cannot_be_shared_is_loaded_by_each(tmp_path, make):
    def act(rank: int) -> str:
        load, calls = counted(make)
        return f"{type(load_once(load, args_of(rank))).__name__} {len(calls)}"

    assert in_two_processes(act, tmp_path) == [f"{type(make()).__name__} 1"] * 2


def test_processes_that_cannot_read_each_others_memory_load_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_loading, "_read_bytes", lambda path: b"a file of another process with this number")

    def act(rank: int) -> str:
        load, calls = counted(Model)
        return f"{same(load_once(load, args_of(rank)), Model())} {len(calls)}"

    assert in_two_processes(act, tmp_path) == ["True 1"] * 2


def test_the_first_process_of_each_machine_reads(tmp_path):
    def act(rank: int) -> str:
        load, calls = counted(Model)
        return f"{same(load_once(load, args_of(rank, place_on_machine=0)), Model())} {len(calls)}"

    assert in_two_processes(act, tmp_path) == ["True 1"] * 2


def test_an_error_of_the_reader_ends_all(tmp_path):
    def act(rank: int) -> str:
        def load():
            raise OSError("no such file")

        with pytest.raises((OSError, ValueError)) as caught:
            load_once(load, args_of(rank))
        return str(caught.value)

    first, second = in_two_processes(act, tmp_path)
    assert first == "no such file" and "Process 0 failed" in second and "no such file" in second

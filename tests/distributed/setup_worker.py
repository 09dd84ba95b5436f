"""Prepares the cases of a JSON file for training, as worker.py, and writes what each process held while it did so: the
peak of resident memory, and the whole models that were moved to the device at once."""

import functools
import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from worker import build_trainer, check_engine, take_turns


def resident(kind: str = "VmRSS") -> int:
    """Bytes of resident memory, now (`VmRSS`) or at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) * 1024


def forget_peak() -> None:
    """Let `VmHWM` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def spy_on_moves(moves: list[int]) -> None:
    """Record the bytes of weights in every module that is moved to a device as a whole."""
    original = torch.nn.Module.to

    @functools.wraps(original)
    def recorded(module, *args, **kwargs):
        device, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None:
            moves.append(sum(weight.nbytes for weight in module.parameters()))
        return original(module, *args, **kwargs)

    torch.nn.Module.to = recorded


def measure(case: dict, folder: Path) -> None:
    torch.manual_seed(0)
    moves: list[int] = []
    original = torch.nn.Module.to
    spy_on_moves(moves)
    gc.collect()
    before = resident()
    try:
        forget_peak()
        trainer = build_trainer(case, folder)
        constructed = resident("VmHWM") - before
        weights = sum(weight.nbytes for weight in trainer.denoiser.parameters())
        forget_peak()
        trainer.train()
    finally:
        torch.nn.Module.to = original
    check_engine(trainer, case["engine"])
    facts = {
        "weights": weights,
        "constructed": constructed,
        "trained": resident("VmHWM") - before,
        "moved": max(moves),
    }
    (folder / f"setup{dist.get_rank()}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    sys.exit(take_turns(measure))

"""Plans of the command against what training allocates, and against values computed by hand."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.data.transforms import pixels_as_floats, white
from trl_diffusion_sdpo.families.noise import constant
from trl_diffusion_sdpo.planning.advice import advise, first_fit
from trl_diffusion_sdpo.planning.allocations import Allocations
from trl_diffusion_sdpo.planning.fake_device import fake_device
from trl_diffusion_sdpo.planning.layouts import ENGINES, Layout
from trl_diffusion_sdpo.planning.optimizers import optimizer_memory
from trl_diffusion_sdpo.planning.plan import Plan
from trl_diffusion_sdpo.utils._compat import CHECKPOINTING

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """`benchmarks/planned_memory.py` as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("planned_memory", BENCHMARKS / "planned_memory.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["planned_memory"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))
        sys.modules.pop("planned_memory", None)


@pytest.mark.parametrize(
    "name",
    [
        "UNet, full, one branch at a time",
        "transformer, LoRA, checkpointing",
    ],
)
def test_a_plan_is_what_a_real_step_allocates(benchmark, name, tmp_path):
    row = benchmark.compare(name, *benchmark.CASES[name], "tiny", tmp_path)
    assert row.ratio == pytest.approx(1, abs=0.1), row


GLOO_COPY = 4 * 2**20  # of the tiny gradients: DDP and ZeRO-2 were above their plans by this in one run of two


@pytest.mark.matrix
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_a_plan_is_what_a_step_allocates_in_one_of_two_processes(benchmark, engine, tmp_path):
    row = benchmark.compare_engine("UNet, full", engine, "tiny", tmp_path)
    assert row.planned <= 1.1 * row.measured and row.measured <= 1.1 * row.planned + GLOO_COPY, row


def test_the_peak_of_a_profile_counts_what_lives_before_the_step_once(benchmark):
    """Storages at 1 (also seen by Python) and 2 were allocated before, 3 was freed before, 9 is not in the profile."""

    def change(time, address, size):
        return {"name": "[memory]", "ts": time, "args": {"Addr": address, "Bytes": size}}

    changes = [change(1, 1, 10), change(2, 2, 20), change(3, 3, 40), change(4, 3, -40), change(11, 4, 80)]
    changes += [change(11.5, 4, 80)]  # freed by a thread of gloo, which the profiler does not see
    changes += [change(12, 2, -20), change(13, 5, 15), change(21, 6, 1000)]
    events = [*changes[::-1], {"name": "the measured step", "ts": 10, "dur": 10}, {"name": "other", "ts": 0}]
    peak = sys.modules["planned_processes"].peak_within({"traceEvents": events}, {1: 10, 9: 5})
    assert peak == 10 + 20 + 5 + 80


def test_the_page_has_the_measured_rows_and_each_is_within_ten_percent(benchmark):
    rows, page = list(benchmark.kept_rows(benchmark.RESULTS).values()), benchmark.PAGE.read_text(encoding="utf-8")
    assert len(rows) >= 5 and all(row.ratio == pytest.approx(1, abs=0.1) for row in rows)
    # Bytes as they were counted, not those of the page's MiB, which have one decimal.
    sizes = [size for row in rows for size in (row.planned, row.measured)]
    rounded = [size for size in sizes if size == round(round(size / 2**20, 1) * 2**20)]
    assert not rounded and all(isinstance(size, int) for size in sizes), "run `python benchmarks/planned_memory.py`"
    assert benchmark.table(rows) in page and benchmark.rewritten(page, rows) == page


def test_storages_count_once_and_until_they_are_dropped():
    with FakeTensorMode(), Allocations(block=512) as allocations:
        first = torch.empty(100, 10)  # 4000 bytes, 8 blocks
        view = first.t()[2:]
        assert allocations.live == 4096
        second = first + 1
        assert allocations.live == 8192
        del first
        assert allocations.live == 8192, "the view holds the storage"
        del view, second
        assert allocations.live == 0
    assert allocations.peaks == {"start": 8192}
    with FakeTensorMode(), Allocations() as allocations:
        stays = torch.empty(100)
        allocations.ignore([stays])
        view = stays.view(10, 10)
        assert allocations.live == 0
        del stays, view
        assert allocations.live == 0


def test_products_are_counted_as_two_operations_each():
    with FakeTensorMode(), Allocations() as allocations:
        torch.empty(3, 5) @ torch.empty(5, 7)
    assert allocations.flops == 2 * 3 * 5 * 7


def test_autograd_holds_what_the_backward_pass_needs():
    """y = (x w)^2: x w is kept for the square, and x is an input."""
    with FakeTensorMode(), Allocations() as allocations:
        x, w = torch.empty(8, 8), torch.empty(8, 8, requires_grad=True)
        before = allocations.live
        loss = (x @ w).square().sum()
        assert allocations.live - before == 8 * 8 * 4 + 4
        loss.backward()
        del loss
        assert allocations.live - before == 8 * 8 * 4, "the gradient of w"


def test_cudas_autocast_normalizes_in_float32_and_the_cpus_does_not():
    results = {}
    for kind in ("cuda", "cpu"):
        with FakeTensorMode(), fake_device(kind).active(), torch.autocast("cpu", torch.bfloat16):
            hidden = torch.nn.functional.linear(torch.empty(2, 8), torch.empty(8, 8))
            results[kind] = hidden.dtype, torch.nn.functional.layer_norm(hidden, (8,)).dtype
    assert results == {"cuda": (torch.bfloat16, torch.float32), "cpu": (torch.bfloat16, torch.bfloat16)}
    with torch.autocast("cpu", torch.bfloat16):  # the rules are gone
        assert torch.nn.functional.layer_norm(torch.ones(2, 8, dtype=torch.bfloat16), (8,)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "states", "temporary"),
    [
        ("adamw_torch_fused", 2 * 4 * 6144, 0),
        ("sgd", 0, 0),
        ("adamw_bnb_8bit", 2 * (6144 + 6144 / 256 * 4), 0),
        ("adafactor", 4 * (64 + 96), 4 * 6144),
    ],
)
def test_states_of_an_optimizer(name, states, temporary):
    weights = [nn.Parameter(torch.empty(64, 96, device="meta"))]
    found = optimizer_memory(name, weights, None, fake_device("cpu"), FakeTensorMode(allow_non_fake_inputs=True))
    assert found[0] == pytest.approx(states, abs=8)  # and the number of steps
    assert found[1] == pytest.approx(temporary, abs=64)


def test_what_engines_divide():
    """1000 trained weights on 4 processes, AdamW's 8000 bytes of states; DeepSpeed's buckets of 100 elements."""
    layouts = {name: Layout(name, 4, half=True, bucket=100) for name in ENGINES}
    states = {name: layout.trained_state(1000, 8000, by_branch=False) for name, layout in layouts.items()}
    assert states["ddp"] == {"optimizer": 8000, "DDP's buckets": 4000}
    assert states["fsdp2"] == {"optimizer": 2000}
    assert states["zero1"] == states["zero2"] == {"optimizer": 2000, "float32 weights": 1000}
    assert states["zero3"] == {**states["zero2"], "gradients": 500, "DeepSpeed's bucket": 200}
    full, base = nn.Parameter(torch.empty(1000, device="meta")), nn.Parameter(torch.empty(1000).bfloat16())
    held = {name: (layout.held(full, 1), layout.held(base, 1)) for name, layout in layouts.items()}
    assert held["ddp"] == (4000, 2000), "a base in half precision stays as it is"
    assert held["fsdp2"] == (1000, 500)
    assert held["zero1"] == held["zero2"] == (2000, 2000), "rounded in place, once"
    assert held["zero3"] == (500, 500)
    assert layouts["fsdp2"].held(full, 1, rounded_copy=True) == 500, "a frozen reference"


def test_what_is_offloaded_is_not_on_the_device():
    layout = Layout("zero3", 2, half=True, offloads_optimizer=True, offloads_weights=True, bucket=100)
    found = layout.trained_state(1000, 8000, by_branch=False)
    assert found == {"DeepSpeed's bucket": 200}, "its optimizer reads gradients on the CPU"
    assert layout.held(nn.Parameter(torch.empty(1000, device="meta")), 1) == 0


class Block(nn.Linear):
    pass


def test_fsdp2_gathers_the_block_that_runs_and_the_next_one():
    """Blocks of 20 and 30 weights within one with 6 of its own, and 12 outside: 12 + 6 + 30, and 30 for the next."""
    outer = nn.Sequential(Block(4, 5, bias=False), Block(5, 6, bias=False), nn.Linear(3, 2, bias=False))
    model = nn.Sequential(outer, nn.Linear(3, 4, bias=False))
    layout = Layout("fsdp2", 2, units=("Block", "ModuleDict"))
    assert layout.gathered(model) == 4 * (12 + 6 + 30 + 30), "what is in no unit stays"
    nested = nn.Sequential(nn.ModuleDict({"all": outer}), nn.Linear(3, 4, bias=False))
    assert layout.gathered(nested) == 4 * (12 + 6 + 30 + 30)
    assert layout.reducing(nested) == 4 * 2 * 30
    assert Layout("fsdp2", 2, half=True, units=("Block",)).gathered(model) == 2 * 78
    assert Layout("fsdp2", 2, half=True, units=("Block",)).gathered(model.bfloat16()) == 2 * 78, "not halved again"
    assert Layout("fsdp2", 2, units=("Block",), reshards=False).gathered(model) == 2 * 68
    assert Layout("zero3", 2, half=True, live=50, prefetch=60).gathered(model) == (50 + 60) * 2


def test_the_command_writes_its_numbers_and_a_chart_and_leaves_no_fake_tensor(sdxl_folder, tmp_path):
    pytest.importorskip("matplotlib")
    white.cache_clear()
    words = ["plan", "--model_name_or_path", sdxl_folder, "--per_device_train_batch_size", "2", "--no_advice"]
    assert main([*words, "--json", str(tmp_path / "plan.json"), "--chart", str(tmp_path / "plan.png")]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["kind"] == "computed"
    assert plan["peak"] == max(plan["moments"].values()) > sum(plan["components"].values())
    names = {"policy", "reference", "vae", "text_encoder", "text_encoder_2", "optimizer"}
    assert set(plan["components"]) == names
    assert plan["components"]["policy"] > 4 * plan["parameters"], "float32, each tensor in blocks of 512 bytes"
    assert (tmp_path / "plan.png").stat().st_size > 5_000
    # SDXL's sizes are cached constants, which a later step of a real run must find real.
    assert type(constant((16, 16), torch.int64, torch.device("cpu"))) is torch.Tensor
    assert pixels_as_floats(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def a_plan(gigabytes: float) -> Plan:
    return Plan({"policy": 0}, {"backward": int(gigabytes * 1e9)}, 1, 1, 1, 1)


def test_advice_is_sorted_by_what_it_saves_and_combined_until_it_fits():
    """20 GB, of which 2-pair batches make 4, full tuning 10; checkpointing cannot act."""
    settings = {CHECKPOINTING: False, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    settings |= {"use_peft": False, "dtype": "float32", "safeguard": "output", "optim": "adamw_bnb_8bit"}

    def replan(changes):
        if CHECKPOINTING in changes:
            raise ValueError
        saved = 4 * ("per_device_train_batch_size" in changes) + 10 * ("use_peft" in changes)
        return a_plan(20 - saved)

    found = advise(a_plan(20), settings, replan)
    assert [one.plan.peak for one in found] == [10e9, 16e9]
    assert found[1].changes == {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}
    assert first_fit(found, 18, replan).changes == found[1].changes, "what changes no weights comes first"
    assert first_fit(found, 8, replan).changes == {**found[0].changes, **found[1].changes}
    assert first_fit(found, 4, replan) is None
    assert a_plan(7.3).fits(8) and not a_plan(7.5).fits(8), "92 % of a card"


@pytest.mark.matrix
def test_the_command_proposes_settings_that_fit(sd_folder, tmp_path):
    words = ["plan", "--model_name_or_path", sd_folder, "--per_device_train_batch_size", "8", "--fit", "0.002"]
    assert main([*words, "--json", str(tmp_path / "plan.json")]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    peaks = [one["peak"] for one in plan["advice"]]
    assert peaks == sorted(peaks) and all(peak < plan["peak"] for peak in peaks)
    proposed = [name for one in plan["advice"] for name in one["options"]]
    assert "use_peft" in proposed and "per_device_train_batch_size" in proposed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--like", "sd51"], "must be one of sd15, sd21, sdxl"),
        ([], "must be the Hub id or folder"),
        (["--model_name_or_path", "."], "has a model_index.json"),
        (["--like", "sd15", "--load_in_4bit"], "Without `use_peft`"),
        (["--like", "sd15", "--resolution", "500"], "must be a multiple of 8"),
        (["--like", "sd15", "--accelerate_config", "zero9"], "must be one of"),
        (["--like", "sd15", "--num_proceses", "2"], "is no option"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_a_pipeline_without_the_configuration_of_a_network_is_refused(sd_folder, tmp_path, capsys):
    import shutil

    folder = tmp_path / "pipeline"
    shutil.copytree(sd_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "unet" / "config.json").unlink()
    assert main(["plan", "--model_name_or_path", str(folder)]) == 2
    assert "The configuration of `unet`" in capsys.readouterr().err

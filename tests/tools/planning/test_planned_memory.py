"""Plans compared with the memory that training allocates, and with values computed by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.cli.plan import planned_settings
from trl_diffusion_sdpo.data.transforms import pixels_as_floats, white
from trl_diffusion_sdpo.families.noise import constant
from trl_diffusion_sdpo.tools.planning.allocations import Allocations, autocast_like
from trl_diffusion_sdpo.tools.planning.plan import Plan

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


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
        pytest.param("UNet, full, one branch at a time", marks=pytest.mark.matrix),
        "transformer, LoRA, checkpointing",
        "UNet, full, bf16 weights, accumulation",
    ],
)
def test_a_plan_is_what_a_real_step_allocates(benchmark, name, tmp_path):
    if "bf16 weights" in name:
        pytest.importorskip("torchao")
    row = benchmark.compare(name, *benchmark.CASES[name], "tiny", tmp_path)
    assert row.ratio == pytest.approx(1, abs=0.1), row


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


def test_autograd_holds_what_the_backward_pass_needs():
    """For y = (x w)^2, autograd holds x w for the gradient of the square. x is an input."""
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
        with FakeTensorMode(), autocast_like(kind), torch.autocast("cpu", torch.bfloat16):
            hidden = torch.nn.functional.linear(torch.empty(2, 8), torch.empty(8, 8))
            results[kind] = hidden.dtype, torch.nn.functional.layer_norm(hidden, (8,)).dtype
    assert results == {"cuda": (torch.bfloat16, torch.float32), "cpu": (torch.bfloat16, torch.bfloat16)}
    with torch.autocast("cpu", torch.bfloat16):  # the rules are gone
        assert torch.nn.functional.layer_norm(torch.ones(2, 8, dtype=torch.bfloat16), (8,)).dtype == torch.bfloat16


def test_a_plan_leaves_no_fake_tensor_in_caches(sdxl_folder, tmp_path):
    """SDXL's sizes are cached constants. A later real step needs real tensors there."""
    white.cache_clear()
    words = f"--model_name_or_path {sdxl_folder} --per_device_train_batch_size 2 --output_dir {tmp_path}".split()
    plan = planned_settings(words, "plan", "cuda").plan()
    assert plan.peak == max(plan.phases.values()) > sum(plan.components.values())
    names = {"policy", "reference", "vae", "text_encoder", "text_encoder_2", "optimizer"}
    assert set(plan.components) == names
    assert type(constant((16, 16), torch.int64, torch.device("cpu"))) is torch.Tensor
    assert pixels_as_floats(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_a_card_has_a_margin_for_what_pytorch_does_not_count():
    sizes = [Plan({}, {"backward": int(gigabytes * 1e9)}) for gigabytes in (7.3, 7.5)]
    assert [plan.fits(8) for plan in sizes] == [True, False], "92 % of a card"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "must be the Hub id or folder"),
        (["--model_name_or_path", "."], "has a model_index.json"),
        (["--model_name_or_path", "SD", "--load_in_4bit"], "`use_peft`"),
        (["--model_name_or_path", "SD", "--resolution", "501"], "`resolution`"),
        (["--model_name_or_path", "SD", "--optim", "adagrad"], "`optim=adagrad`"),
        (["--model_name_or_path", "SD", "--accelerate_config", "zero3"], "`--num_processes`"),
        (["--model_name_or_path", "SD", "--fsdp", "full_shard"], "`--accelerate_config`"),
        (["--model_name_or_path", "SD", "--num_proceses", "2"], "`--num_proceses`"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(words, said, sd_folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *(sd_folder if word == "SD" else word for word in words)]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error

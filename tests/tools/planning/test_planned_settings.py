"""Plans for the settings of a command line, and for engines."""

from pathlib import Path

import pytest
from tiny_pipelines import CASES, case, flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl

from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.cli.plan import planned_settings
from trl_diffusion_sdpo.tools.planning.plan import Plan
from trl_diffusion_sdpo.tools.planning.planned_engine import PlannedEngine, planned_engine

TINY = {"sd15": stable_diffusion, "sdxl": stable_diffusion_xl, "sd35": stable_diffusion_3, "flux": flux}
EXAMPLES = Path(__file__).parents[3] / "examples" / "configs"
ALL_WEIGHTS = "--optim sgd --max_grad_norm 0 --per_device_train_batch_size 1"  # nothing beside the gradients


@pytest.fixture(scope="module")
def folder(make_sd_pipeline, tmp_path_factory) -> str:
    """A pipeline whose denoiser has one level, so that planning is quick."""
    levels = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    folder = tmp_path_factory.mktemp("pipeline")
    make_sd_pipeline(block_out_channels=(16,), **levels).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def plan_of(folder, tmp_path_factory):
    """`plan_of(words)`: a plan for the CPU."""
    output = tmp_path_factory.mktemp("output")

    def plan(words: str) -> Plan:
        given = f"--model_name_or_path {folder} --output_dir {output} {words}".split()
        return planned_settings(given, "plan", "cpu").plan()

    return plan


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=pytest.mark.matrix)])
def test_what_an_engine_divides_is_a_share_of_one_devices_and_the_rest_stays(plan_of, engine):
    words = "--safeguard output --optim adamw_torch --per_device_train_batch_size 1 --num_processes 4"
    one = plan_of("--safeguard output --optim adamw_torch --per_device_train_batch_size 1")
    four = plan_of(f"{words} --accelerate_config {engine}")
    for name in ("policy", "reference", "optimizer"):
        assert 4 * four.components[name] == pytest.approx(one.components[name], rel=0.02)
    weights = one.components["policy"] / 4  # float32
    assert four.components["gradients"] == pytest.approx(weights, rel=0.02), "4 bytes of a fourth"
    assert four.components["vae"] == one.components["vae"]
    copies = plan_of(f"{words} --accelerate_config multi_gpu")
    assert copies.components["policy"] == one.components["policy"]
    assert copies.components["DDP's buckets"] == pytest.approx(4 * weights, rel=0.02)


def test_the_set_up_holds_a_shard_and_one_block(plan_of):
    words = "--safeguard output --per_device_train_batch_size 1 --accelerate_config fsdp2 --num_processes 4"
    plan = plan_of(words)
    held = ("policy", "reference", "vae", "text_encoder")
    shards = sum(plan.components[name] for name in held)
    block = plan.phases["set-up"] - shards
    assert 0 < block < 4 * plan.components["policy"] and list(plan.phases)[0] == "set-up"


def test_an_engine_has_the_name_of_a_packaged_configuration_and_a_number_of_processes():
    assert planned_engine("zero3", "4") == PlannedEngine("zero3", 4)
    assert planned_engine(None, 2) == planned_engine("multi_gpu", 2) == PlannedEngine("multi_gpu", 2)
    assert planned_engine(None, None) == planned_engine("single_gpu", None) == PlannedEngine()
    for processes in (None, 0, "auto"):
        with pytest.raises(ValueError, match="`--num_processes`"):
            planned_engine("zero3", processes)
    with pytest.raises(ValueError, match="`zero3`"):
        planned_engine("zero_3", 4)


def test_the_table_of_what_fits_has_every_tuning_with_and_without_checkpointing(folder, capsys, tmp_path):
    words = ["--model_name_or_path", folder, "--output_dir", str(tmp_path)]
    assert main(["plan", *words, "--per_device_train_batch_size", "1"]) == 0
    rows = capsys.readouterr().out.partition("| training |")[2].splitlines()[2:]
    names = [row.split("|")[1].strip() for row in rows]
    assert names[0] == "your settings" and names[1:] == [
        f"{kind}{saves}" for kind in ("LoRA", "QLoRA, 4 bits", "full") for saves in ("", ", checkpointing")
    ]


def test_the_combination_of_branches_holds_both_gradients(plan_of):
    plan = plan_of(f"{ALL_WEIGHTS} --safeguard parameter")
    assert plan.phases["optimizer"] - sum(plan.components.values()) >= 1.9 * plan.components["policy"]


@pytest.mark.matrix
@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_an_example_can_be_planned(file, tmp_path):
    """A tiny pipeline of the same family replaces the example's."""
    tiny = TINY[file.stem.partition("_")[0]].build()
    tiny.save_pretrained(tmp_path / "tiny")
    words = ["--config", str(file), "--model_name_or_path", str(tmp_path / "tiny"), "--output_dir", str(tmp_path)]
    plan = planned_settings([*words, "--resolution", "16"], "plan", "cuda").plan()
    assert {"policy", "optimizer", "vae"} <= {*plan.components, "vae"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("krea2", "z_image") else pytest.mark.matrix) for name in CASES]
)
def test_a_family_is_planned_or_refused_in_a_sentence(name, tmp_path, capsys):
    case(name).build().save_pretrained(tmp_path / "pipeline")
    side = str(case(name).RESOLUTION)
    words = ["plan", "--model_name_or_path", str(tmp_path / "pipeline"), "--output_dir", str(tmp_path / "run")]
    code = main([*words, "--resolution", side])
    refused = code == 2 and ("depend on values" in capsys.readouterr().err or name == "hunyuan_dit")
    assert code == 0 or refused  # HunyuanDiT has no activation checkpointing, which a plan turns on

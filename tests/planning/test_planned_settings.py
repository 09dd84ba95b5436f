"""What a plan reads of the command line and of configurations of engines, and what follows from it."""

import json
import logging
from pathlib import Path

import pytest
import yaml
from diffusers import StableDiffusionPipeline
from tiny_pipelines import flux, stable_diffusion, stable_diffusion_3, stable_diffusion_xl

from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.cli.plan import PlannedSettings, _fit_in_words
from trl_diffusion_sdpo.cli.planned_layout import layout_of
from trl_diffusion_sdpo.planning.advice import advise, first_fit, most_processes
from trl_diffusion_sdpo.planning.layouts import Layout
from trl_diffusion_sdpo.planning.plan import Plan, Planner
from trl_diffusion_sdpo.planning.skeleton import TokensOnly

TINY = {"sd15": stable_diffusion, "sdxl": stable_diffusion_xl, "sd35": stable_diffusion_3, "flux": flux}
EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"
ALL_WEIGHTS = "--optim sgd --max_grad_norm 0 --per_device_train_batch_size 1"  # nothing beside the gradients


@pytest.fixture(scope="module")
def folder(make_sd_pipeline, tmp_path_factory) -> str:
    """A pipeline whose denoiser has one level, which is quicker to plan."""
    levels = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    folder = tmp_path_factory.mktemp("pipeline")
    make_sd_pipeline(block_out_channels=(16,), **levels).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def plan_of(folder, tmp_path_factory):
    """`plan_of(words, folder)`: a plan for the CPU, by a planner that all calls share."""
    planner, output, default = Planner("cpu"), tmp_path_factory.mktemp("output"), folder

    def plan(words: str, folder: str = default, shared: bool = True) -> Plan:
        given = f"--model_name_or_path {folder} --output_dir {output} {words}".split()
        return PlannedSettings(given, "plan", "cpu", None).plan(planner if shared else Planner("cpu"), {})

    return plan


def test_accumulation_adds_no_operations_and_the_combination_of_branches_holds_both_gradients(plan_of):
    parameter = plan_of(f"{ALL_WEIGHTS} --safeguard parameter")
    accumulated = plan_of(f"{ALL_WEIGHTS} --safeguard parameter --gradient_accumulation_steps 2")
    assert accumulated.flops == parameter.flops
    assert parameter.moments["optimizer"] - sum(parameter.components.values()) >= 2 * 4 * parameter.trained


def test_the_passes_of_an_inversion_are_operations_of_a_step(plan_of, folder):
    """By differences: 5 steps of DDIM are 2 calls more than 3, 3 steps of ReNoise 4 calls (and one each goes on to the
    timestep); a call of the reference, which full tuning has and `sft` has not, is as much."""
    words = f"{ALL_WEIGHTS} --safeguard none --noise_source inversion"
    three, five, renoise = (
        plan_of(f"{words} {more}").flops
        for more in ("--inversion_steps 3", "--inversion_steps 5", "--inversion_steps 3 --inversion renoise")
    )
    shared = plan_of(f"{ALL_WEIGHTS} --safeguard none").flops
    a_call = shared - plan_of(f"{ALL_WEIGHTS} --safeguard none --loss_type sft").flops
    assert a_call > 0
    assert (three - shared, five - shared, renoise - shared) == (4 * a_call, 6 * a_call, 8 * a_call)


@pytest.mark.matrix
def test_the_shards_of_two_branches_are_half_of_their_gradients(plan_of):
    words = f"{ALL_WEIGHTS} --safeguard parameter"
    whole = plan_of(words)
    for engine in ("fsdp2", "zero2", "zero3"):
        plan = plan_of(f"{words} --accelerate_config {engine} --num_processes 2")
        allocated = [one.moments["optimizer"] - sum(one.components.values()) for one in (plan, whole)]
        assert allocated[0] == pytest.approx(allocated[1] / 2, rel=0.1), engine


@pytest.mark.matrix
def test_two_models_in_one_planner_are_planned_apart(plan_of, make_sd_pipeline, tmp_path):
    other = make_sd_pipeline(layers_per_block=2)
    other.save_pretrained(tmp_path / "other")
    words = "--use_peft --per_device_train_batch_size 2"
    plan_of(words)
    assert plan_of(words, str(tmp_path / "other")) == plan_of(words, str(tmp_path / "other"), shared=False)


def test_the_caches_of_a_pair_by_hand(plan_of, folder):
    """Two images of 2 x 4 x 8 x 8 moments, mirrored as well; one prompt; two errors at each of two draws."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    embeds, _ = pipeline.encode_prompt("a prompt", "cpu", 1, False)
    words = f"{ALL_WEIGHTS} --safeguard parameter --ref_noise_draws 2"
    cached = plan_of(words).cached
    assert cached == {"latents": 2 * 2 * 2 * 4 * 8 * 8 * 4, "prompts": embeds.nbytes, "reference errors": 2 * 2 * 4}
    assert plan_of(f"{words} --random_flip false").cached["latents"] == 2 * 2 * 4 * 8 * 8 * 4


@pytest.mark.matrix
def test_a_prompt_of_each_image_is_encoded_and_stored_for_each(plan_of):
    one, two = (plan_of(f"{ALL_WEIGHTS}{named}") for named in ("", " --dataset_format branch_prompts"))
    assert two.cached["prompts"] == 2 * one.cached["prompts"] and two.cached["latents"] == one.cached["latents"]


def test_a_prompt_that_is_cut_is_as_long_as_it_may_be():
    tokens = TokensOnly(77)
    assert tokens("a", padding=True, max_length=546, truncation=True).input_ids.shape == (1, 546)
    assert tokens(["a", "b"], padding="max_length", max_length=256, truncation=True).input_ids.shape == (2, 256)
    assert tokens("a", padding="longest").input_ids.shape == (1, 2), "which only asks whether the prompt was cut"


def write(folder: Path, settings: dict) -> str:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)


def test_the_engine_is_read_from_accelerates_file(tmp_path):
    offload = {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "nvme"}
    given = {"distributed_type": "DEEPSPEED", "num_processes": 4, "deepspeed_config": offload}
    expected = Layout("zero3", 4, offloads_optimizer=True, offloads_weights=True)
    assert layout_of(write(tmp_path, given), None, None) == expected
    assert layout_of(write(tmp_path, given), None, "8").processes == 8, "the command line comes first"
    fsdp = {"fsdp_reshard_after_forward": False, "fsdp_transformer_layer_cls_to_wrap": "Block, Other"}
    given = {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": fsdp}
    assert layout_of(write(tmp_path, given), None, None) == Layout(
        "fsdp2", 2, units=("Block", "Other"), reshards=False
    )
    given["fsdp_config"] = {"fsdp_auto_wrap_policy": "NO_WRAP", "fsdp_offload_params": True}
    expected = Layout("fsdp2", 2, units=(), offloads_optimizer=True, offloads_weights=True)
    assert layout_of(write(tmp_path, given), None, None) == expected
    assert layout_of(write(tmp_path, {"distributed_type": "MULTI_GPU", "num_processes": 2}), None, None).name == "ddp"


def test_the_engine_is_read_from_deepspeeds_file(tmp_path):
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5e7, "overlap_comm": True}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    expected = Layout("zero2", 2, offloads_optimizer=True, bucket=50_000_000, overlaps=True)
    assert layout_of(None, str(tmp_path / "zero.json"), 2) == expected
    by_accelerate = {"distributed_type": "DEEPSPEED", "num_processes": 2}
    by_accelerate["deepspeed_config"] = {"deepspeed_config_file": str(tmp_path / "zero.json")}
    assert layout_of(write(tmp_path, by_accelerate), None, None) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("zero3", None, None), "needs the number of processes"),
        (("multi_gpu", None, 0), "must be a number, at least 1, got 0"),
        (("multi_gpu", None, "auto"), "must be a number, at least 1, got 'auto'"),
        ((None, {"zero_optimization": [2]}, 2), r"zero_optimization must map names to values, got \[2\]"),
        ((None, {"zero_optimization": None}, 2), "ZeRO stage 1, 2 or 3"),
        ((None, {"zero_optimization": {"stage": 0}}, 2), "ZeRO stage 1, 2 or 3"),
        ((None, "no.json", 2), "which does not exist"),
    ],
)
def test_an_engine_that_cannot_be_planned_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        layout_of(*given)


def test_empty_entries_of_an_engines_file_set_nothing(tmp_path):
    zero = {"stage": 3, "offload_optimizer": None, "offload_param": {"device": None}}
    assert layout_of(None, {"zero_optimization": zero}, 2) == Layout("zero3", 2)
    given = {"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": None}
    assert layout_of(write(tmp_path, given), None, None) == Layout("zero2", 2)
    given = {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": None}
    assert layout_of(write(tmp_path, given), None, None) == Layout("fsdp2", 2)
    (tmp_path / "config.yaml").write_text("")
    assert layout_of(str(tmp_path / "config.yaml"), None, None) == Layout()


def test_fsdp_by_the_arguments_is_not_planned_as_ddp(folder):
    words = f"--model_name_or_path {folder} --fsdp full_shard --num_processes 2".split()
    with pytest.raises(ValueError, match="`--accelerate_config fsdp2`, .* got `--fsdp`"):
        PlannedSettings(words, "plan", "cpu", None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--safeguard parameter --deepspeed OFFLOADED", "zero2 has gradients on the CPU"),
    ],
)
def test_what_the_trainer_refuses_is_not_planned(words, said, folder, tmp_path):
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    words = f"--model_name_or_path {folder} --num_processes 2 {words}".replace(
        "OFFLOADED", str(tmp_path / "zero.json")
    )
    with pytest.raises(ValueError, match=said):
        PlannedSettings(words.split(), "plan", "cpu", None).prepared({})


def test_more_devices_are_proposed_last():
    """90 GB; a LoRA leaves 60, and each doubling of the devices divides by two."""
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "use_peft": False}
    settings |= {"dtype": "float32", "accelerate_config": "single", "num_processes": 1}

    def replan(changes):
        size = (60 if changes.get("use_peft") else 90) / changes.get("num_processes", 1)
        return Plan({}, {"backward": int(size * 1e9)}, 1, 1, 1, 1)

    found = advise(replan({}), settings, replan)
    sharded = {"accelerate_config": "fsdp2", "num_processes": 2}
    assert [one.changes for one in found] == [sharded, {"use_peft": True, "dtype": "bfloat16"}]
    assert first_fit(found, 80, replan).changes == found[1].changes
    assert first_fit(found, 24, replan).changes == {
        **found[1].changes,
        "accelerate_config": "fsdp2",
        "num_processes": 4,
    }
    assert first_fit(found, 7, replan) is None, "nor on eight devices"
    assert _fit_in_words(None, 7, most_processes(found)).endswith("fits 7 GB, on 8 devices neither.")


@pytest.mark.parametrize(("given", "proposed"), [(8, None), (5, None), (3, 6), (2, 8)])
def test_devices_are_named_if_they_were_tried(given, proposed):
    def replan(changes):
        return Plan({}, {"backward": 90 // changes.get("num_processes", given)}, 1, 1, 1, 1)

    settings = {"accelerate_config": "fsdp2", "num_processes": given}
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    found = advise(replan({}), settings, replan)
    assert most_processes(found) == proposed
    said = _fit_in_words(None, 7, proposed)
    assert said == "No combination of these fits 7 GB" + (f", on {proposed} devices neither." if proposed else ".")


def test_the_command_leaves_logging_as_it_was(folder, tmp_path, capsys):
    """Whether it plans or refuses to: a library's user may go on in the same process."""
    before = logging.root.manager.disable
    logging.disable(logging.DEBUG)
    try:
        words = ["plan", "--model_name_or_path", folder, "--no_advice", "--output_dir", str(tmp_path)]
        for more, code in ((["--use_peft"], 0), (["--resolution", "15"], 2)):
            assert main([*words, "--per_device_train_batch_size", "1", *more]) == code
            assert logging.root.manager.disable == logging.DEBUG
    finally:
        logging.disable(before)
    capsys.readouterr()


@pytest.mark.matrix
@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_an_example_can_be_planned(file, tmp_path):
    """With a tiny pipeline of the same family in place of the example's."""
    tiny = TINY[file.stem.partition("_")[0]].build()
    tiny.save_pretrained(tmp_path / "tiny")
    words = ["--config", str(file), "--model_name_or_path", str(tmp_path / "tiny"), "--output_dir", str(tmp_path)]
    settings = PlannedSettings([*words, "--resolution", "16"], "plan", "cuda", None)
    assert {"policy", "optimizer", "vae"} <= set(Planner("cuda").components(settings.prepared({})))

"""Every family trains on the pretend device: all tensors are on the device, and a step synchronizes only as listed."""

import math
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import datasets
import pytest
import torch.utils.backend_registration
from device.waits import A_BACKWARD, A_LOG, A_MICRO_BATCH, A_PREDICTION, AN_EVALUATION
from tiny_pipelines import CASES, case

# torch's Python back end for new devices, which the pretend device uses.
MISSING = "_setup_privateuseone_for_python_backend" not in vars(torch.utils.backend_registration)
pytestmark = pytest.mark.skipif(MISSING, reason="this torch has no Python back end for new devices")

EMA_AND_BUDGET = {"ema_decay": 0.9, "winner_budget": 0.01, "winner_budget_kwargs": {"pairs": 2, "steps": 1}}
SAMPLING = {"sample_prompts": ["a cat"], "sample_steps": 1, "sample_kwargs": {"num_inference_steps": 2}}
EVERYTHING = {"gradient_accumulation_steps": 2}
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
INVERSION = {"noise_source": "inversion", "inversion_kwargs": {"kind": "renoise", "steps": 2}}
ADDED = {"noise_source": "inversion", "inversion_kwargs": {"kind": "renoise", "steps": 2, "eta": 0.1}}
PREDICTIONS = {"output": 2, "parameter": 4}  # of a micro-batch: policy and reference, jointly or by branch


def run(family: str, tuning: str, safeguard: str, kind: str = "", args: dict | None = None, **given) -> dict:
    name = "-".join(filter(None, (family, tuning, safeguard, kind)))
    settings = {"safeguard": safeguard, "resolution": case(family).RESOLUTION, "beta": 100.0}
    facts = {"name": name, "family": family, "tuning": tuning, "fault": None, "resumes": None}
    return {**facts, "evaluates": False, "saves": False, "edits": False, **given, "args": {**settings, **(args or {})}}


def each(*runs: dict, **marks):
    """One test per run; the fixture finds the runs by the parameter `cases`."""
    return pytest.mark.parametrize("cases", [pytest.param((one,), id=one["name"], **marks) for one in runs])


def all_of(*runs: dict):
    return pytest.mark.parametrize("cases", [pytest.param(runs, id=runs[-1]["name"])])


def sd(tuning: str, safeguard: str, kind: str, args: dict | None = None, **given) -> dict:
    return run("stable_diffusion", tuning, safeguard, kind, args, **given)


@pytest.fixture
def found(on_pretend_device, cases) -> list[dict]:
    answers = [on_pretend_device(one) for one in cases]
    for answer, one in zip(answers, cases, strict=True):
        if one["fault"] is None:
            assert "error" not in answer, answer["trace"]
            assert answer["on_device"] and answer["steps"] == one["args"].get("max_steps", 2)
    return answers


def listed(one: dict) -> Counter:
    """The synchronizations that the lists allow in a step of a run."""
    calls = PREDICTIONS[one["args"]["safeguard"]]
    family = one["family"]
    predicted = dict(A_PREDICTION.get(family, {}))
    if one["tuning"] == "full":
        predicted |= A_BACKWARD.get(family, {})
    return Counter(A_MICRO_BATCH[family]) + Counter({place: calls * count for place, count in predicted.items()})


def check_waits(answer: dict, allowed: dict) -> None:
    """Locations in other libraries are compared only with the versions of constraints.txt."""
    waits = answer["waits"]
    if not _versions_of_the_lists():
        waits, allowed = (
            {place: count for place, count in given.items() if place.startswith("trl_diffusion_sdpo")}
            for given in (waits, allowed)
        )
    more = {place: count for place, count in waits.items() if count > allowed.get(place, 0)}
    assert not more, f"unexpected synchronizations: {more}"
    gone = set(allowed) - set(waits)
    assert not gone, f"no longer synchronizes, remove from the list: {gone}"


def _versions_of_the_lists() -> bool:
    text = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8")
    stated = dict(line.split(";")[0].strip().split("==") for line in text.splitlines() if "==" in line.split(";")[0])
    return all(stated[name] == version(name).partition("+")[0] for name in ("torch", "diffusers", "transformers"))


# The default run takes a denoiser that synchronizes by itself, and one that does not; `make test-families` all
# families in two ways.
WAYS = [("lora", "output"), ("full", "parameter")]
IN_CI = [
    run("stable_diffusion", "full", "parameter"),
    run("qwen_image", "lora", "parameter"),
]
OTHERS = [made for family in CASES for way in WAYS if (made := run(family, *way)) not in IN_CI]


@each(*IN_CI)
def test_a_step_synchronizes_as_listed(found, cases):
    check_waits(found[0], listed(cases[0]))


@pytest.mark.matrix
@each(*OTHERS)
def test_a_step_of_every_family_synchronizes_as_listed(found, cases):
    check_waits(found[0], listed(cases[0]))


@each(
    run("flux2", "lora", "parameter", "edits", edits=True),
    run("flux2", "full", "output", "edits", {"precompute_latents": True}, edits=True),
)
def test_edit_pairs_train_without_a_wait_of_our_own(found):
    assert not [place for place in found[0]["waits"] if place.startswith("trl_diffusion_sdpo")]


@each(sd("full", "parameter", "everything", EMA_AND_BUDGET | EVERYTHING))
def test_average_and_budget_do_not_synchronize(found, cases):
    micro_batches = cases[0]["args"].get("gradient_accumulation_steps", 1)
    check_waits(found[0], {place: micro_batches * count for place, count in listed(cases[0]).items()})


COMPARED = {"logging_steps": 1, "max_steps": 2, "learning_rate": 1e-4}
DRAWN = {"noise_offset": 0.1, "weighting_scheme": "logit_normal", "n_timesteps_per_pair": 2}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


@each(sd("full", "output", "drawn", COMPARED | DRAWN | EMA_AND_BUDGET | EVALUATED, evaluates=True))
def test_a_seed_means_the_same_noise_as_on_the_cpu(found, cases, make_trainer, family_folder, start_data):
    """Noise and its offset, timesteps, posterior samples, the budget's probe and evaluations: all errors
    are those of a run on the CPU."""
    data = datasets.load_from_disk(start_data)
    settings = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2} | cases[0]["args"]
    evaluation = data.select(range(3)) if cases[0]["evaluates"] else None
    trainer = make_trainer(family_folder(cases[0]["family"]), None, data, evaluation, **settings)
    trainer.train()
    names = [name for entry in trainer.state.log_history for name in entry if "errors/" in name or "budget/" in name]
    assert names
    for here, there in zip(trainer.state.log_history, found[0]["log"], strict=True):
        measured = {name: value for name, value in here.items() if name in names}
        assert {name: there[name] for name in measured} == pytest.approx(measured, rel=1e-3, abs=1e-5)


@pytest.mark.matrix
@each(sd("full", "parameter", "inverted", ADDED))
def test_noise_by_inversion_does_not_synchronize(found, cases):
    check_waits(found[0], listed(cases[0]))


OF_EVERY_FAMILY = {
    "inverted": ("lora", "output", INVERSION),
    "averaged": ("full", "parameter", EMA_AND_BUDGET),
    "bf16": ("full", "output", {"bf16": True}),
    "sampled-too": ("lora", "output", SAMPLING),
}


@pytest.mark.matrix
@each(*[run(family, *way, kind, args) for kind, (*way, args) in OF_EVERY_FAMILY.items() for family in CASES])
def test_features_of_every_family_run_on_the_device(found):
    """`found` has looked: no error, and all tensors are there."""
    assert found[0]["steps"] == 2


@pytest.mark.matrix
@all_of(
    sd("lora", "parameter", "sampled", SAMPLING),
    sd("lora", "parameter", "offloaded", SAMPLING | {"offload_frozen_components": True}),
)
def test_what_is_offloaded_comes_to_the_device_without_waiting_and_leaves_it(found):
    plain, offloaded = found
    assert offloaded["sum"] == plain["sum"] and offloaded["waits"] == plain["waits"]
    assert offloaded["frozen"] == ["cpu"] and plain["frozen"] == ["pretend"]


@each(
    sd("full", "output", "cached", {"precompute_latents": True, "ema_decay": 0.9}),
)
def test_a_cached_step_does_not_wait_and_encoding_has_the_device_for_itself(found):
    """Batches come from pinned memory; what else is frozen comes to the device once all is encoded."""
    assert found[0]["waits"] == {} and found[0]["pinned"] == [True]
    assert found[0]["while_encoding"] == ["cpu"] and found[0]["copies"] == ["pretend"]
    # Pixels come from pinned memory as well; what is encoded is waited for, since it goes to a file.
    assert [place.split("::")[1] for place in found[0]["encoding_waits"]] == ["conditioning_of", "moments_of"]


@pytest.mark.matrix
@each(*[run(family, "lora", "output", "encoded", {"precompute_latents": True}) for family in CASES])
def test_a_step_on_encoded_pairs_of_every_family_synchronizes_where_the_denoiser_does(found, cases):
    """The two predictions of a step, of policy and reference, each as `A_PREDICTION` says."""
    predicted = A_PREDICTION.get(cases[0]["family"], {})
    check_waits(found[0], {place: 2 * count for place, count in predicted.items()})


@each(sd("full", "parameter", "bf16", {"bf16": True, "logging_steps": 1}))
def test_a_log_synchronizes_once_for_all_metrics_and_the_first_step_is_neutral(found, cases):
    check_waits(found[0], listed(cases[0]) + Counter(A_LOG))
    assert found[0]["log"][0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert found[0]["log"][0]["rewards/margins"] == 0


@each(sd("full", "output", "evaluated", {"eval_strategy": "steps", "eval_steps": 1}, evaluates=True))
def test_an_evaluation_synchronizes_once_for_each_kind_of_result(found, cases):
    batches = 2  # of evaluation, whose prompts are encoded too
    prompts = {place: (1 + batches) * count for place, count in A_MICRO_BATCH["stable_diffusion"].items()}
    check_waits(found[0], Counter(prompts) + Counter(AN_EVALUATION))


@all_of(
    sd("full", "output", "saved", SAVING, saves=True),
    sd("full", "output", "resumed", SAVING, resumes=["stable_diffusion-full-output-saved", 2]),
)
def test_a_run_resumed_on_the_device_ends_like_an_uninterrupted_one(found):
    saved, resumed = found
    assert saved["sum"] == resumed["sum"]


# ---- Faults are detected --------------------------------------------------------------------------------------------


@each(sd("lora", "output", "misplaced", fault="misplaced"))
def test_a_tensor_made_on_the_host_is_detected(found):
    assert "Expected all tensors to be on the same device" in found[0]["error"]


@each(sd("lora", "output", "item", fault="item"))
def test_a_synchronization_in_the_step_is_detected(found, cases):
    with pytest.raises(AssertionError, match=r"unexpected synchronizations: \{'tests/device/faults.py"):
        check_waits(found[0], listed(cases[0]))


@each(sd("lora", "output", "early", fault="early"))
def test_a_value_read_before_its_copy_has_finished_is_detected(found):
    assert "Every pair's loss must be finite" in found[0]["error"]

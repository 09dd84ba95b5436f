"""Every kind of model trains on the pretend device: no tensor is left on the host, and a step waits for the device
where the lists say and nowhere else."""

import math
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
import torch.utils.backend_registration
from device.waits import A_LOG, A_MICRO_BATCH, A_PREDICTION, AN_EVALUATION
from tiny_pipelines import CASES, case

# torch's Python back end for new devices, on which the pretend device stands.
MISSING = "_setup_privateuseone_for_python_backend" not in vars(torch.utils.backend_registration)
pytestmark = pytest.mark.skipif(MISSING, reason="this torch has no Python back end for new devices")

KEPT = {"ema_decay": 0.9, "winner_budget": 0.01, "winner_budget_pairs": 2, "winner_budget_steps": 1}
DRAWING = {"sample_prompts": ["a cat"], "sample_steps": 1, "sample_inference_steps": 2}
EVERYTHING = {"safeguard_preconditioner": "adamw", "safeguard_diagnostics_steps": 1, "gradient_accumulation_steps": 2}
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
PREDICTIONS = {"output": 2, "parameter": 4}  # of a micro-batch: policy and reference, whole or by halves


def run(family: str, tuning: str, safeguard: str, kind: str = "", args: dict | None = None, **given) -> dict:
    name = "-".join(filter(None, (family, tuning, safeguard, kind)))
    settings = {"safeguard": safeguard, "resolution": case(family).RESOLUTION, "beta": 100.0}
    facts = {"name": name, "family": family, "tuning": tuning, "fault": None, "resumes": None}
    return {**facts, "evaluates": False, "saves": False, **given, "args": {**settings, **(args or {})}}


def each(*runs: dict, **marks):
    """The runs, one a test; the worker finds them by the name `cases`."""
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
    """What the lists allow a step of a run."""
    calls = PREDICTIONS[one["args"]["safeguard"]]
    family = one["family"]
    predicted = {place: calls * count for place, count in A_PREDICTION.get(family, {}).items()}
    return Counter(A_MICRO_BATCH[family]) + Counter(predicted)


def check_waits(answer: dict, allowed: dict) -> None:
    """Upstream's places are compared with the versions that the lists were made with."""
    waits = answer["waits"]
    if not _versions_of_the_lists():
        waits, allowed = (
            {place: count for place, count in given.items() if place.startswith("trl_diffusion_sdpo")}
            for given in (waits, allowed)
        )
    more = {place: count for place, count in waits.items() if count > allowed.get(place, 0)}
    assert not more, f"the host waits where it need not: {more}"
    gone = set(allowed) - set(waits)
    assert not gone, f"no longer waited for, take off the list: {gone}"


def _versions_of_the_lists() -> bool:
    text = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8")
    stated = dict(line.split(";")[0].strip().split("==") for line in text.splitlines() if "==" in line.split(";")[0])
    return all(stated[name] == version(name).partition("+")[0] for name in ("torch", "diffusers", "transformers"))


# Each family in one of the four ways, and in all of them by `make test-families`.
WAYS = [("lora", "output"), ("full", "parameter"), ("lora", "parameter"), ("full", "output")]
IN_CI = [run(family, *WAYS[number % len(WAYS)]) for number, family in enumerate(CASES)]
OTHERS = [made for family in CASES for way in WAYS if (made := run(family, *way)) not in IN_CI]


@each(*IN_CI)
def test_a_step_of_every_family_waits_where_the_list_says(found, cases):
    check_waits(found[0], listed(cases[0]))


@pytest.mark.matrix
@each(*OTHERS)
def test_the_other_ways_wait_where_the_list_says(found, cases):
    check_waits(found[0], listed(cases[0]))


@each(
    sd("full", "parameter", "everything", KEPT | EVERYTHING),
    run("stable_diffusion_3", "lora", "output", "kept", KEPT),
)
def test_average_budget_and_diagnostics_wait_for_nothing(found, cases):
    micro_batches = cases[0]["args"].get("gradient_accumulation_steps", 1)
    check_waits(found[0], {place: micro_batches * count for place, count in listed(cases[0]).items()})


@each(run("z_image", "lora", "parameter", "scores", KEPT | {"loss_type": "smpo"}))
def test_pairs_that_scores_put_in_order_take_what_lies_on_the_host_along(found, cases):
    """The lengths of its prompts do: the order is read once for them."""
    check_waits(found[0], listed(cases[0]) + Counter({"trl_diffusion_sdpo/step/noisy_batch.py::take_rows": 1}))


@pytest.mark.matrix
@each(*[run(family, "full", "parameter", "kept", KEPT) for family in CASES])
def test_average_and_budget_of_every_family_leave_no_tensor_behind(found):
    assert all(answer["steps"] == 2 for answer in found)


@each(sd("lora", "output", "logged", {"logging_steps": 1}))
def test_a_log_waits_once_for_all_metrics(found, cases):
    check_waits(found[0], listed(cases[0]) + Counter(A_LOG))


@each(sd("full", "output", "evaluated", {"eval_strategy": "steps", "eval_steps": 1}, evaluates=True))
def test_an_evaluation_waits_once_for_each_kind_of_result(found, cases):
    batches = 2  # of evaluation, whose prompts are encoded too
    prompts = {place: (1 + batches) * count for place, count in A_MICRO_BATCH["stable_diffusion"].items()}
    check_waits(found[0], Counter(prompts) + Counter(AN_EVALUATION))


@each(
    sd("lora", "output", "bf16", {"bf16": True, "logging_steps": 1}),
    sd("full", "parameter", "bf16", {"bf16": True, "logging_steps": 1}),
    run("flux", "lora", "output", "bf16", {"bf16": True, "logging_steps": 1}),
)
def test_under_bf16_autocast_the_first_step_is_neutral(found):
    assert found[0]["log"][0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert found[0]["log"][0]["rewards/margins"] == 0


@pytest.mark.matrix
@each(*[run(family, "full", "output", "bf16", {"bf16": True}) for family in CASES])
def test_under_bf16_autocast_no_tensor_of_a_family_is_left_behind(found):
    assert all(answer["steps"] == 2 for answer in found)


@each(sd("lora", "output", "drawn", DRAWING), run("flux", "lora", "output", "drawn", DRAWING))
def test_images_are_drawn_and_the_devices_random_state_is_kept(found):
    assert found[0]["kept_states"] >= 3


@pytest.mark.matrix
@each(*[run(family, "lora", "output", "drawn-too", DRAWING) for family in CASES])
def test_images_of_every_family_are_drawn_on_the_device(found):
    assert found[0]["kept_states"] >= 3


@all_of(
    sd("full", "output", "saved", SAVING, saves=True),
    sd("full", "output", "resumed", SAVING, resumes=["stable_diffusion-full-output-saved", 2]),
)
def test_a_run_resumed_on_the_device_ends_where_the_other_did(found):
    saved, resumed = found
    assert saved["sum"] == resumed["sum"]


@all_of(
    run("stable_diffusion_xl", "lora", "output", "saved", SAVING, saves=True),
    run(
        "stable_diffusion_xl",
        "lora",
        "output",
        "resumed",
        SAVING,
        resumes=["stable_diffusion_xl-lora-output-saved", 2],
    ),
)
def test_a_lora_resumed_on_the_device_ends_where_the_other_did(found):
    saved, resumed = found
    assert saved["sum"] == resumed["sum"]


# ---- What it notices ------------------------------------------------------------------------------------------------


@each(sd("lora", "output", "misplaced", fault="misplaced"))
def test_a_tensor_made_on_the_host_is_noticed(found):
    assert "Expected all tensors to be on the same device" in found[0]["error"]


@each(sd("lora", "output", "item", fault="item"), sd("lora", "output", "mask", fault="mask"))
def test_a_wait_in_the_step_is_noticed(found, cases):
    with pytest.raises(AssertionError, match=r"waits where it need not: \{'tests/device/faults.py"):
        check_waits(found[0], listed(cases[0]))


@each(sd("lora", "output", "early", fault="early"))
def test_a_verdict_that_is_read_before_it_has_arrived_is_noticed(found):
    assert "Every pair's loss must be finite" in found[0]["error"]

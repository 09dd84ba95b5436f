"""Every family trains on the pretend device: all tensors are on the device, and no line of ours waits for it.

The cases of a test run share a subprocess, in which torch is patched."""

import json
import math
import os
from pathlib import Path

import datasets
import pytest
import torch.utils.backend_registration
from tiny_pipelines import CASES, case
from two_processes import do_in_turn

# torch's Python back end for new devices, which the pretend device uses.
MISSING = "_setup_privateuseone_for_python_backend" not in vars(torch.utils.backend_registration)
pytestmark = pytest.mark.skipif(MISSING, reason="this torch has no Python back end for new devices")

WORKER = Path(__file__).with_name("worker.py")
EMA_AND_BUDGET = {"ema_decay": 0.9, "winner_budget": 0.01, "winner_budget_kwargs": {"pairs": 2, "steps": 1}}
SAMPLING = {"sample_prompts": ["a cat"], "sample_steps": 1, "sample_kwargs": {"num_inference_steps": 2}}
EVERYTHING = {"gradient_accumulation_steps": 2}
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
INVERSION = {"noise_source": "inversion", "inversion_kwargs": {"kind": "renoise", "steps": 2}}
ADDED = {"noise_source": "inversion", "inversion_kwargs": {"kind": "renoise", "steps": 2, "eta": 0.1}}
# Waits of each call of a denoiser, in its own code: how many tokens the masks leave, and positions on the CPU.
WAITS_OF_DENOISERS = {"chroma": 1, "hidream": 3, "lumina2": 4, "qwen_image": 1, "qwen_image_21": 15}
METERS = "trl_diffusion_sdpo/step/meters.py::drain"


@pytest.fixture(scope="session")
def start_data(make_pairs, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data") / "pairs"
    make_pairs(8).save_to_disk(str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def on_pretend_device(request, start_data, family_folder, tmp_path_factory):
    """`on_pretend_device(case)`: the result of a case. The first call runs all selected cases."""
    folder = tmp_path_factory.mktemp("pretend")
    selected = (item for item in request.session.items if "cases" in item.fixturenames)
    cases = {one["name"]: one for item in selected for one in item.callspec.params["cases"]}
    runs = [{**one, "model": family_folder(one["family"]), "data": start_data} for one in cases.values()]
    path = os.pathsep.join([str(WORKER.parents[1]), str(WORKER.parents[2])])
    outputs = do_in_turn(WORKER, runs, folder, {"PYTHONPATH": path}, launch=())

    def result(one: dict) -> dict:
        file = folder / one["name"] / "result.json"
        assert file.is_file(), f"The process ended in {one['name']}:\n{outputs[one['name']][-3000:]}"
        return json.loads(file.read_text())

    return result


def run(family: str, tuning: str, safeguard: str, kind: str = "", args: dict | None = None, **given) -> dict:
    name = "-".join(filter(None, (family, tuning, safeguard, kind)))
    settings = {"safeguard": safeguard, "resolution": case(family).RESOLUTION, "beta": 100.0}
    facts = {"name": name, "family": family, "tuning": tuning, "waits": False, "resumes": None}
    return {**facts, "evaluates": False, "saves": False, "edits": False, **given, "args": {**settings, **(args or {})}}


def each(*runs: dict):
    """One test per run; the fixture finds the runs by the parameter `cases`."""
    return pytest.mark.parametrize("cases", [pytest.param((one,), id=one["name"]) for one in runs])


def both(*runs: dict):
    """One test of two runs."""
    return pytest.mark.parametrize("cases", [pytest.param(runs, id=runs[-1]["name"])])


def sd(tuning: str, safeguard: str, kind: str = "", args: dict | None = None, **given) -> dict:
    return run("stable_diffusion", tuning, safeguard, kind, args, **given)


@pytest.fixture
def found(on_pretend_device, cases) -> list[dict]:
    answers = [on_pretend_device(one) for one in cases]
    for answer, one in zip(answers, cases, strict=True):
        assert "error" not in answer, answer["error"]
        assert answer["on_device"] and answer["steps"] == one["args"].get("max_steps", 2)
    return answers


def waits_of_ours(answer: dict) -> dict[str, int]:
    """Waits of a step in code of the package. The router of HiDream's experts has to know their tokens."""
    return {
        place: count
        for place, count in answer["waits"].items()
        if place.startswith(("trl_diffusion_sdpo", "tests")) and not place.endswith("hidream.py::forward")
    }


# ---- A step does not wait ------------------------------------------------------------------------------------------


@each(sd("full", "parameter"), sd("full", "parameter", "everything", EMA_AND_BUDGET | EVERYTHING))
def test_a_step_does_not_wait(found):
    assert waits_of_ours(found[0]) == {}


@each(sd("lora", "output", "waiting", waits=True))
def test_a_wait_in_the_step_is_counted(found):
    assert waits_of_ours(found[0]) == {"tests/device/worker.py::with_item": 1}


# All families in two ways, and edit pairs: `make test-all PART=families`.
@pytest.mark.matrix
@each(
    *[run(family, *way) for family in CASES for way in (("lora", "output"), ("full", "parameter"))],
    run("flux2", "lora", "parameter", "edits", edits=True),
    run("flux2", "full", "output", "edits", {"precompute_latents": True}, edits=True),
    sd("full", "parameter", "inverted", ADDED),
)
def test_a_step_of_every_family_does_not_wait(found):
    assert waits_of_ours(found[0]) == {}


@pytest.mark.matrix
@each(*[run(family, "lora", "output", "encoded", {"precompute_latents": True}) for family in CASES])
def test_a_step_on_encoded_pairs_of_every_family_waits_only_in_the_denoiser(found, cases):
    """The two predictions of a step are those of policy and reference."""
    assert waits_of_ours(found[0]) == {}
    assert sum(found[0]["waits"].values()) <= 2 * WAITS_OF_DENOISERS.get(cases[0]["family"], 0)


@each(sd("full", "output", "cached", {"precompute_latents": True, "ema_decay": 0.9}))
def test_a_cached_step_does_not_wait_and_encoding_has_the_device_for_itself(found):
    """Batches come from pinned memory; what else is frozen comes to the device once all is encoded."""
    assert found[0]["waits"] == {} and found[0]["pinned"] == [True]
    assert found[0]["while_encoding"] == ["cpu"] and found[0]["copies"] == ["pretend"]
    # Encoded pairs go to a file, so encoding waits for them, and for the pixels of the next batch.
    waits = [place.split("::")[1] for place in found[0]["encoding_waits"]]
    assert waits == ["_moments", "conditioning_of", "moments_of"]


@each(sd("full", "parameter", "logged", {"logging_steps": 1}))
def test_a_log_waits_once_for_all_metrics_and_the_first_step_is_neutral(found):
    assert waits_of_ours(found[0]) == {METERS: 1}
    assert found[0]["log"][0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert found[0]["log"][0]["rewards/margins"] == 0


@each(sd("full", "output", "evaluated", {"eval_strategy": "steps", "eval_steps": 1}, evaluates=True))
def test_an_evaluation_waits_once_for_each_kind_of_result(found):
    noise_bins = "trl_diffusion_sdpo/step/pair_evaluation.py::drain"
    assert waits_of_ours(found[0]) == {METERS: 1, noise_bins: 1}


# ---- Features run on the device ------------------------------------------------------------------------------------

OF_EVERY_FAMILY = {
    "inverted": ("lora", "output", INVERSION),
    "averaged": ("full", "parameter", EMA_AND_BUDGET),
    "sampled-too": ("lora", "output", SAMPLING),
}


@pytest.mark.matrix
@each(*[run(family, *way, kind, args) for kind, (*way, args) in OF_EVERY_FAMILY.items() for family in CASES])
def test_features_of_every_family_run_on_the_device(found):
    """The fixture `found` asserts that there was no error, and that all tensors are on the device."""


@pytest.mark.matrix
@both(
    sd("lora", "parameter", "sampled", SAMPLING),
    sd("lora", "parameter", "offloaded", SAMPLING | {"offload_frozen_components": True}),
)
def test_what_is_offloaded_comes_to_the_device_without_waiting_and_leaves_it(found):
    plain, offloaded = found
    assert offloaded["sum"] == plain["sum"] and offloaded["waits"] == plain["waits"]
    assert offloaded["frozen"] == ["cpu"] and plain["frozen"] == ["pretend"]


COMPARED = {"logging_steps": 1, "max_steps": 2, "learning_rate": 1e-4, "eval_strategy": "steps", "eval_steps": 2}
DRAWN = {"noise_offset": 0.1, "weighting_scheme": "logit_normal"}


@each(sd("full", "output", "drawn", COMPARED | DRAWN | EMA_AND_BUDGET, evaluates=True))
def test_a_seed_means_the_same_noise_as_on_the_cpu(found, cases, make_trainer, sd_folder, start_data):
    """Noise and its offset, timesteps, posterior samples, the budget's probe and evaluations: all errors
    are those of a run on the CPU."""
    data = datasets.load_from_disk(start_data)
    settings = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2} | cases[0]["args"]
    trainer = make_trainer(sd_folder, None, data, data.select(range(3)), **settings)
    trainer.train()
    names = [name for entry in trainer.state.log_history for name in entry if "errors/" in name or "budget/" in name]
    assert names
    for here, there in zip(trainer.state.log_history, found[0]["log"], strict=True):
        measured = {name: value for name, value in here.items() if name in names}
        assert {name: there[name] for name in measured} == pytest.approx(measured, rel=1e-3, abs=1e-5)


@both(
    sd("full", "output", "saved", SAVING, saves=True),
    sd("full", "output", "resumed", SAVING, resumes="stable_diffusion-full-output-saved/checkpoint-2"),
)
def test_a_run_resumed_on_the_device_ends_like_an_uninterrupted_one(found):
    saved, resumed = found
    assert saved["sum"] == resumed["sum"]

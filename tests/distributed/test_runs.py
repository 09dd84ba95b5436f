"""Whole runs under every engine, two processes on the CPU. Killed ones resume, saved ones load elsewhere, the
reference stands still or follows, and drawings, evaluation and uploads are those of one process."""

import functools
import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from distributed import runs
from distributed.runs import ENGINES, train_alone, with_places
from local_hub import running_hub
from PIL import Image, ImageChops
from safetensors.torch import load_file
from two_processes import do_in_turn, folder_of_done

WORKER = Path(__file__).with_name("run_worker.py")
sys.path.append(str(WORKER.parent))  # a run in this process imports its scorer from there
SHARDING = ("fsdp2", "zero3")
EVERY_ENGINE = (*ENGINES, "zero1")
STEPS = 4
EVALUATED = 7  # neither process nor batch divides them: one comes twice, and must count once
COMMON_ARGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "beta": 500.0,
    "safeguard": "parameter",
    "safeguard_mu": 0.5,
    "save_strategy": "no",
}
LONG_ARGS = {
    "optim": "adamw_torch",
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": STEPS,
    "sample_prompts": ["a cat"],
    "sample_kwargs": {"num_inference_steps": 2},
    "sample_scorers": ["brightness:score"],
}
FOLLOWING = {"sync_ref_model": True, "ref_model_sync_steps": 1}
KEPT = {
    "ema_decay": 0.5,
    "winner_budget": 1e-4,
    "winner_budget_kwargs": {"pairs": 4, "steps": 1},
}
WORSE = {"full": 0.03, "lora": 0.5}  # rates so large that the winners get worse
RATES = {"full": 1e-3, "lora": 1e-2}


# ---- The runs ------------------------------------------------------------------------------------------------------


def build_run(engine: str, tuning: str, kind: str, args: dict | None = None, **given) -> dict:
    return runs.build_run(
        engine, tuning, kind, {**COMMON_ARGS, "learning_rate": RATES[tuning], **(args or {})}, **given
    )


def long_run(engine: str, tuning: str, kind: str = "long", **given) -> dict:
    """AdamW, with checkpoints, evaluation, drawings, and an upload of those that are compared with one another."""
    args = {**LONG_ARGS, "hub_model_id": f"tester/{engine}-{tuning}", **given.pop("args", {})}
    return build_run(engine, tuning, kind, args, evaluated=EVALUATED, pushes=kind == "long", **given)


def killed_runs(engine: str, tuning: str, kind: str = "", **args) -> list[dict]:
    """A run without disturbance, one that loses a process in its fourth step, and the one that resumes it."""
    output = f"{engine}-{tuning}-{kind}killed/saved"
    return [
        long_run(engine, tuning, f"{kind}long", args=args),
        long_run(engine, tuning, f"{kind}killed", args=args, output=output, killed_after=3),
        long_run(engine, tuning, f"{kind}resumed", args=args, output=output, resumes=True),
    ]


# Last runs of the cases that `make test` covers. `make test-all PART=distributed` covers all.
BY_DEFAULT = {
    "ddp-lora-kept-resumed",
    "fsdp2-full-long",
    "fsdp2-full-first-bf16",
    "fsdp2-full-kept-mapped",
    "zero3-lora-dora-mapped",
    "ddp-full-streamed-5",
    "ddp-lora-unmade",
    "ddp-full-kto",
    "ddp-lora-other-max_steps",
}


def needing(*alternatives: list[dict]):
    """The runs that a test looks at, `found` in the same order; the last run names the test."""
    found = []
    for needed in alternatives:
        name = needed[-1]["name"]
        found.append(pytest.param(needed, id=name, marks=() if name in BY_DEFAULT else pytest.mark.matrix))
    return pytest.mark.parametrize("needs", found)


def each(build, engines=ENGINES, tunings=("full", "lora")):
    return needing(*[build(engine, tuning) for engine in engines for tuning in tunings])


@pytest.fixture(scope="module")
def hub():
    """The Hub's HTTP API on this machine; the processes find it by their environment."""
    with running_hub() as server:
        server.forbidden = {"tester/forbidden"}
        yield server


@pytest.fixture(scope="module")
def finished(request, start, hub, tmp_path_factory):
    """`finished(run)`: the folder of a run. Those that the selected tests need share their processes, as long as
    these live."""
    folder = tmp_path_factory.mktemp("runs")
    selected = (item for item in request.session.items if "needs" in item.fixturenames)
    needed = {run["name"]: run for item in selected for run in item.callspec.params["needs"]}
    # Engine by engine; who ends with a kill goes last, directly before the one that resumes.
    ordered = sorted(needed.values(), key=lambda run: (ends_killed(run), run["engine"]))
    outputs = do_in_turn(WORKER, [with_places(run, start) for run in ordered], folder, to_hub(hub, folder))

    def result(run: dict) -> Path:
        place = folder / run["name"]
        if run["killed_after"] is None:
            return folder_of_done(run, folder, outputs)
        assert not list(place.glob("done*"))
        assert "Signal 9 (SIGKILL)" in outputs[run["name"]] and outputs[run["name"]].endswith("exit status 1")
        return place

    return result


def ends_killed(run: dict) -> bool:
    return run["killed_after"] is not None or run["resumes"] is True


def to_hub(hub, folder: Path) -> dict[str, str]:
    """An environment whose Hub is on this machine."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "hf_home"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


@pytest.fixture
def found(finished, needs) -> list[Path]:
    return [finished(run) for run in needs]


@pytest.fixture(scope="module")
def single(start, tmp_path_factory):
    """`single(tuning)`: the output folder and the log of the long run in one process."""

    @functools.cache
    def run(tuning: str) -> tuple[Path, list[dict]]:
        folder = tmp_path_factory.mktemp("single")
        return folder, train_alone(long_run("ddp", tuning), start, folder).state.log_history

    return run


@pytest.fixture
def evaluate_alone(start, tmp_path):
    """`evaluate_alone(saved, pairs)`: the metrics of saved weights of full tuning in one process, a pair at a time, of
    the first pairs by each of some numbers."""
    from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer

    def evaluate(saved: Path, *pairs: int) -> list[dict]:
        settings = {**COMMON_ARGS, "per_device_eval_batch_size": 1, "report_to": "none", "use_cpu": True}
        args = DiffusionSDPOConfig(str(tmp_path), disable_tqdm=True, **settings)
        data = datasets.load_from_disk(start["pairs"])
        policy = tuned_pipeline(saved, start)
        trainer = DiffusionSDPOTrainer(policy, start["base"], args, None, data)
        return [trainer.evaluate(data.select(range(count))) for count in pairs]

    return evaluate


@pytest.fixture(scope="module")
def base(start) -> dict[str, torch.Tensor]:
    return dict(UNet2DConditionModel.from_pretrained(start["base"], subfolder="unet").named_parameters())


# ---- What a run left behind ----------------------------------------------------------------------------------------


def facts_of(folder: Path) -> dict:
    return json.loads((folder / "facts.json").read_text())


def logged(folder: Path, name: str) -> list[float]:
    return [entry[name] for entry in json.loads((folder / "log.json").read_text()) if name in entry]


def walk_of(folder: Path) -> list[dict]:
    return torch.load(folder / "walk.pt")


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the saved weights of full tuning or of a LoRA, by their names in the file."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    return load_file(file if file.is_file() else folder / "pytorch_lora_weights.safetensors")


def tuned_pipeline(folder: Path, start: dict[str, str]) -> StableDiffusionPipeline:
    """Load saved weights as a user does, without this package."""
    pipeline = StableDiffusionPipeline.from_pretrained(start["base"])
    if (folder / "unet").is_dir():
        pipeline.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    else:
        pipeline.load_lora_weights(str(folder))
    return pipeline


def draw(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "np"}
    return torch.from_numpy(pipeline("a cat", latents=noise, **arguments).images)


def moved(weights: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([(weights[name] - before[name]).flatten() for name in sorted(before)])


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    unequal = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert not unequal, unequal


# ---- Killed and resumed --------------------------------------------------------------------------------------------


@needing(
    *[killed_runs(engine, tuning) for engine in EVERY_ENGINE for tuning in ("full", "lora")],
    killed_runs("ddp", "lora", "kept-", **KEPT, learning_rate=WORSE["lora"]),
    *[killed_runs(engine, "full", "kept-", **KEPT, learning_rate=WORSE["full"]) for engine in SHARDING],
    *[killed_runs(engine, "full", "bf16-", bf16=True) for engine in EVERY_ENGINE],
    *[killed_runs(engine, "lora", "sync-", **FOLLOWING) for engine in EVERY_ENGINE],
    *[killed_runs(engine, "full", "sync-", **FOLLOWING) for engine in SHARDING],
)
def test_a_run_that_lost_a_process_resumes_as_if_undisturbed(found):
    undisturbed, killed, resumed = found
    assert not (killed / "facts.json").exists()
    facts = facts_of(resumed)
    assert facts["began_at"] == facts["steps_taken"] == 2  # it took steps 3 and 4, and not all of them again
    assert_equal(saved_weights(killed / "saved"), saved_weights(undisturbed / "saved"))
    for name in ("safeguard/scale", "loss", "grad_norm", "eval_loss", "budget/scale", "budget/winner_change"):
        assert logged(resumed, name)[-2:] == logged(undisturbed, name)[-2:], name
    if (undisturbed / "saved" / "ema").exists():
        averages = [saved_weights(run / "saved" / "ema") for run in (killed, undisturbed)]
        assert_equal(*averages)
        assert min(logged(undisturbed, "budget/scale")) < 1
    assert len(logged(undisturbed, "safeguard/scale")) == STEPS


# ---- What is saved -------------------------------------------------------------------------------------------------


def beside_ddp(engine: str, tuning: str) -> list[dict]:
    return [long_run("ddp", tuning), long_run(engine, tuning)]


@each(beside_ddp, engines=EVERY_ENGINE)
def test_what_an_engine_saves_loads_in_diffusers_and_is_what_ddp_saves(found, needs, start):
    ddp, ours = (saved_weights(folder / "saved") for folder in found)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    assert ours.keys() == ddp.keys()
    before = walk_of(found[0])[0]["policy"]
    if needs[-1]["tuning"] == "lora":
        before = {f"unet.{name}": tensor for name, tensor in before.items()}
    assert apart(moved(ours, before), moved(ddp, before)) < 1e-3
    untuned = draw(StableDiffusionPipeline.from_pretrained(start["base"]))
    drawn, by_ddp = (draw(tuned_pipeline(folder / "saved", start)) for folder in reversed(found))
    assert (drawn - untuned).abs().max() > 1e-3
    torch.testing.assert_close(drawn, by_ddp, rtol=0, atol=1e-4)


def kto_run(engine: str, tuning: str) -> dict:
    """Only winners pull, so the mean over all images, with which `kto` compares each, is soon far above 0."""
    args = {"loss_type": "kto", "beta": 2e4, "loss_kwargs": {"kto_loser_weight": 0.0}, "optim": "sgd"}
    args |= {"safeguard": "output", "learning_rate": 3e-3, "eval_strategy": "steps", "eval_steps": STEPS}
    return build_run(engine, tuning, "kto", args, evaluated=EVALUATED)


@each(lambda engine, tuning: [kto_run(engine, tuning)], engines=EVERY_ENGINE, tunings=("full",))
def test_kto_compares_with_the_images_of_both_processes(found, needs, start, tmp_path):
    alone = train_alone(needs[0], start, tmp_path)
    ours, before = saved_weights(found[0] / "saved"), walk_of(found[0])[0]["policy"]
    theirs = saved_weights(tmp_path)
    assert apart(moved(ours, before), moved(theirs, before)) < 1e-3
    gains = [
        entry["rewards/chosen"] + entry["rewards/rejected"] for entry in alone.state.log_history if "loss" in entry
    ]
    assert gains[-1] > 0.2  # twice beta / 2 times the mean gain
    (validated,) = (entry["eval_loss"] for entry in alone.state.log_history if "eval_loss" in entry)
    assert logged(found[0], "eval_loss") == [pytest.approx(validated, rel=1e-3)]


# ---- The reference -------------------------------------------------------------------------------------------------


@each(lambda engine, tuning: [long_run(engine, tuning)])
def test_a_reference_is_held_as_the_policy_is_and_never_changes(found, needs, base):
    engine, tuning = needs[0]["engine"], needs[0]["tuning"]
    facts, walk = facts_of(found[0]), walk_of(found[0])
    assert facts["reference"] == {"full": "frozen", "lora": "adapter_off"}[tuning]
    # Each tensor is cut in two, and rounded up.
    expected = pytest.approx(0.5, abs=0.01) if engine in SHARDING else 1.0
    assert facts["share_at_begin"] == facts["share"] == expected
    assert_equal(walk[0]["reference"], base)
    assert_equal(walk[-1]["reference"], base)
    assert moved(walk[-1]["policy"], walk[0]["policy"]).norm() > 0


def following(engine: str, tuning: str, alpha: float) -> dict:
    args = {**FOLLOWING, "ref_model_mixup_alpha": alpha, "max_steps": 2}
    return build_run(engine, tuning, f"following-{alpha}", {"optim": "adamw_torch", **args}, every_step=True)


@needing(*[[following(engine, tuning, 0.25)] for engine in EVERY_ENGINE for tuning in ("full", "lora")])
def test_a_reference_follows_the_policy_at_its_pace(found, needs):
    alpha = needs[0]["args"]["ref_model_mixup_alpha"]
    facts, (start, *steps, _) = facts_of(found[0]), walk_of(found[0])
    assert facts["reference"] == {"full": "frozen", "lora": "ref_adapter"}[needs[0]["tuning"]]
    assert len(steps) == 2
    expected = start["reference"]
    assert_equal(expected, start["policy"])
    for step in steps:
        assert moved(step["policy"], expected).norm() > 0
        expected = {name: alpha * step["policy"][name] + (1 - alpha) * expected[name] for name in expected}
        torch.testing.assert_close(step["reference"], expected, rtol=0, atol=1e-6)


def first_step(engine: str, tuning: str, bf16: bool) -> dict:
    return build_run(engine, tuning, f"first-{'bf16' if bf16 else 'fp32'}", {"bf16": bf16, "max_steps": 1})


def assert_neutral(folder: Path) -> None:
    """At the first step, policy and reference agree to the last bit."""
    for name in ("rewards/margins", "errors/winner_change", "errors/loser_change"):
        assert logged(folder, name)[0] == 0.0, name


@needing(
    *[
        [first_step(engine, tuning, bf16)]
        for engine in EVERY_ENGINE
        for tuning in ("full", "lora")
        for bf16 in (False, True)
    ]
)
def test_policy_and_reference_begin_as_one_in_every_precision(found):
    assert_neutral(found[0])


# ---- One process reads the model -----------------------------------------------------------------------------------


def mapped(engine: str, tuning: str, kind: str = "", **args) -> list[dict]:
    """A run whose processes each read the model, and the same run, in which the second maps what the first has read."""
    args = {"optim": "adamw_torch", "max_steps": 2, **args}
    kinds = {f"{kind}read": True, f"{kind}mapped": False}
    given = {"moved": tuning == "full", "dora": kind == "dora-"}  # a moved policy has a reference, which is read too
    return [build_run(engine, tuning, name, args, each_loads=each, **given) for name, each in kinds.items()]


@needing(
    *[
        mapped(engine, tuning, kind, **args)
        for engine in SHARDING
        for tuning, kind, args in (
            ("full", "kept-", {"ema_decay": 0.5}),
            ("full", "sync-", FOLLOWING),
            ("full", "bf16-", {"bf16": True}),
            ("full", "errors-", {"bf16": True, "precompute_ref_errors": True, "precompute_epochs": 1}),
            ("lora", "dora-", {}),
            ("lora", "sync-", FOLLOWING),
        )
    ]
)
def test_a_process_that_maps_the_model_trains_as_one_that_reads_it(found):
    read, mapped = (folder / "saved" for folder in found)
    assert_equal(saved_weights(mapped), saved_weights(read))
    if (read / "ema").exists():
        assert_equal(saved_weights(mapped / "ema"), saved_weights(read / "ema"))
    for name in ("loss", "safeguard/scale", "grad_norm"):
        assert logged(found[1], name) == logged(found[0], name), name


# ---- Drawings, evaluation ------------------------------------------------------------------------------------------


@each(lambda engine, tuning: [long_run(engine, tuning)])
def test_drawings_are_those_of_one_process(found, needs, single):
    alone, log = single(needs[0]["tuning"])
    names = sorted(file.name for file in (alone / "samples").iterdir())
    assert len(names) == 2  # before and after
    assert sorted(file.name for file in (found[0] / "saved" / "samples").iterdir()) == names
    for name in names:
        ours, theirs = (Image.open(folder / "samples" / name) for folder in (found[0] / "saved", alone))
        extrema = ImageChops.difference(ours.convert("RGB"), theirs.convert("RGB")).getextrema()
        assert max(high for _, high in extrema) <= 2, name
    logs = [json.loads((found[0] / "saved" / "trainer_state.json").read_text())["log_history"], log]
    name = "samples/brightness:score"
    scores = [{entry["step"]: entry[name] for entry in entries if name in entry} for entries in logs]
    assert list(scores[0]) == [0, STEPS] and scores[0] == pytest.approx(scores[1], abs=2)
    first, last = (Image.open(found[0] / "saved" / "samples" / f"step-00000{step}-0.png") for step in (0, STEPS))
    assert ImageChops.difference(first, last).getbbox() is not None


def assert_evaluated_alike(log: list[dict], expected: list[dict], tolerance: float = 3e-4) -> None:
    """Rounding follows the kernels that a CPU has: margins of 0.01 differed by 1e-4 on one of two."""
    ours, theirs = (next(entry for entry in entries if "eval_loss" in entry) for entries in (log, expected))
    timing = ("time", "second")
    names = [name for name in theirs if name.startswith("eval_") and not any(word in name for word in timing)]
    assert {"eval_loss", "eval_errors/winner", "eval_rewards/margins"} <= set(names)
    for name in names:
        assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), name


@each(beside_ddp)
def test_evaluation_is_that_of_ddp_and_of_one_process(found, needs, single):
    _, alone = single(needs[0]["tuning"])
    ddp, ours = (json.loads((folder / "log.json").read_text()) for folder in found)
    assert_evaluated_alike(ours, ddp)
    # One process may have more threads, which add up in another order; AdamW and beta make more of it.
    assert_evaluated_alike(ours, alone, tolerance=1e-3)


def unevenly_evaluated(engine: str, tuning: str, pairs: int, streamed: bool = False) -> dict:
    args = {"max_steps": 1, "optim": "sgd", "eval_strategy": "steps", "eval_steps": 1}
    kind = f"{'streamed' if streamed else 'evaluated'}-{pairs}"
    return build_run(engine, tuning, kind, args, evaluated=pairs, streamed=streamed)


@needing(
    *[[unevenly_evaluated(engine, "full", pairs, streamed=True)] for engine in EVERY_ENGINE for pairs in (1, 5, 8)]
)
def test_every_pair_of_a_stream_counts_once(found, needs, evaluate_alone):
    """There are two streams. The second one has a pair for one process only."""
    folder, pairs = found[0], needs[0]["evaluated"]
    log, alone = json.loads((folder / "log.json").read_text()), evaluate_alone(folder / "saved", pairs, 1)
    for name, count, expected in zip(("whole", "single"), (pairs, 1), alone, strict=True):
        prefix = f"eval_{name}_"
        entry = next(entry for entry in log if f"{prefix}loss" in entry)
        assert entry[f"{prefix}compared"] == entry[f"{prefix}errors/pairs"] == count
        ours = {metric.replace(prefix, "eval_"): value for metric, value in entry.items() if "compared" not in metric}
        assert_evaluated_alike([ours], [expected])


# ---- Publishing ----------------------------------------------------------------------------------------------------


@each(lambda engine, tuning: [long_run(engine, tuning)])
def test_all_processes_together_publish_one_whole_artefact(found, needs, hub, tmp_path):
    repo = hub.repos[needs[0]["args"]["hub_model_id"]]
    assert len(repo.commits) == 1
    weights = {
        "full": {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"},
        "lora": {"pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"},
    }[needs[0]["tuning"]]
    samples = {f"samples/step-00000{step}-0.png" for step in (0, STEPS)}
    reports = {"README.md", "diffusion_sdpo_setup.json", "verdict.json"}
    plots = {"curves.png", "noise_bins.png"}  # where matplotlib is installed
    # Neither checkpoints nor shards nor pickles, which lie in the same folder.
    assert set(repo.files) - {".gitattributes"} - plots == weights | samples | reports
    for name, content in repo.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert_equal(saved_weights(tmp_path), saved_weights(found[0] / "saved"))


def publishing(engine: str, kind: str, **given) -> dict:
    """Two steps, whose repository is created before the training."""
    args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "push_to_hub": True, **given.pop("args", {})}
    return build_run(engine, "lora", kind, args, **given)


def told(folder: Path) -> list[str]:
    """Return the errors of both processes."""
    return [(folder / f"refused{rank}.txt").read_text() for rank in (0, 1)]


@needing([publishing("ddp", "unmade", refused=True, args={"hub_model_id": "tester/forbidden"})])
def test_a_repository_that_cannot_be_made_ends_all_processes_before_training(found):
    first, second = told(found[0])
    assert "tester/forbidden" in first and "403" in first
    assert "Process 0" in second and "403" in second
    assert not list((found[0] / "saved").glob("checkpoint-*"))


# ---- Bad input -----------------------------------------------------------------------------------------------------


def refused(engine: str, kind: str, **given) -> dict:
    return build_run(engine, "full", kind, {"max_steps": 1}, refused=True, **given)


def refusal(folder: Path) -> str:
    """Return the error that both processes raised."""
    first, second = ((folder / f"refused{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    return first


@needing([build_run("ddp", "lora", "other-max_steps", {"max_steps": 4}, refused=True, differs={"max_steps": 5})])
def test_processes_with_other_settings_are_refused(found):
    assert "`max_steps` is" in refusal(found[0])


WRITER = long_run("zero2", "full")
OFFLOADED = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
}


@needing([WRITER, refused("ddp", "of-zero2", output=WRITER["output"], resumes=True)])
def test_a_checkpoint_is_resumed_by_the_engine_that_wrote_it(found):
    assert "engine was 'zero2, 2 processes', is 'plain'" in refusal(found[-1])


@needing([refused("zero2", "offloaded", engine_settings={"deepspeed": OFFLOADED})])
def test_an_offloaded_optimizer_is_refused(found):
    message = refusal(found[0])
    assert "`safeguard='parameter'`" in message and "`offload_optimizer_device: none`" in message
    assert "offload_optimizer_device: none" in message

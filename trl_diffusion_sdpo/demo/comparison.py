"""The demo: trains SFT, Diffusion-DPO, Diffusion-SDPO and the recipe for keeping winners from one small model on the
same pairs, evaluates them on held-out pairs and by the oracle, and writes a report."""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers.utils.logging as diffusers_logging
import numpy as np
import torch
import transformers.utils.logging as transformers_logging
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PrinterCallback

from ..guidance import preference_guidance
from ..saving.interrupts import CheckpointOnInterrupt
from ..trainer import DiffusionSDPOConfig, DiffusionSDPOTrainer
from .methods import (
    GENTLE_METHODS,
    GUIDANCE_SCALES,
    GUIDED_METHOD,
    METHODS,
    GuidedScorer,
    ImageScorer,
    Method,
    OracleCallback,
    ProgressCallback,
)
from .pairs import eval_pairs, off_policy_pairs, on_policy_pairs
from .pipeline import load_base_pipeline, load_pipeline
from .report import write_report
from .results import GENERATED_FILE, RESULT_FILE, Curves, DemoResult, Guided, MethodResult, Score
from .world import IMAGE_SIZE

logger = logging.getLogger(__name__)

PAIRS = ("off_policy", "on_policy")
STEPS = 240
GENTLE_DIVISOR = 2  # the gentle methods train for half of the steps
LOGS = 30  # points of the curve of lambda
THREADS = 4  # at most; networks this small do not get faster with more
SETTINGS_FILE = "settings.json"
CHOSEN = ("seed", "max_steps", "pairs", "samples_per_prompt")  # by the caller
RUNS_FOLDER, BASE_KEY = "runs", "base"
VERSION = 2  # of what the results mean: 2 has images with classifier-free guidance, and fewer of them while training
# Offsets of the seed, so that held-out pairs and scored latents differ from those of training.
_HELD_OUT_SEED, _SCORE_SEED = 10_000, 20_000

SHARED = {
    "per_device_train_batch_size": 32,
    "optim": "adamw_torch",
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 20,
    "random_flip": False,
    "resolution": IMAGE_SIZE,
}


def run_demo(
    output_dir: str | Path,
    *,
    seed: int = 0,
    max_steps: int | None = None,
    pairs: str = "off_policy",
    gentle: bool = False,
    samples_per_prompt: int = 3,
    evaluations: int = 4,
    guidance_scales: Sequence[float] = GUIDANCE_SCALES,
) -> DemoResult:
    """Train every method from the packaged base model on the same pairs, on the CPU, and write a report.

    A second call with the same folder trains unfinished methods only; an interrupted one resumes from its last
    checkpoint.

    Args:
        output_dir (`str` or `Path`): Folder of the report, and of each tuned pipeline in `runs/<method>`.
        seed (`int`): Seed of the pairs, the noise and the generated images.
        max_steps (`int`, *optional*): Optimizer steps of each method; 240 if unset.
        pairs (`str`): `"off_policy"`, two rendered images, or `"on_policy"`, two images of the base model.
        gentle (`bool`): Whether to train Diffusion-DPO and Diffusion-SDPO with the gentle settings too.
        samples_per_prompt (`int`): Images for each of the 72 prompts that the oracle scores.
        evaluations (`int`): Number of evaluations of each method.
        guidance_scales (`Sequence[float]`): Scales of classifier-free guidance from which each model's best is chosen,
            beside 1, which is none.

    Returns:
        `DemoResult`: The numbers, the images, the files written and a summary.

    Raises:
        ValueError: If an argument is out of range, or the folder holds a demo with other settings.
        KeyboardInterrupt: After Ctrl-C, when the checkpoint is written.
    """
    _check(seed, max_steps, pairs, samples_per_prompt, evaluations, guidance_scales)
    chosen = {"seed": seed, "max_steps": max_steps or STEPS, "pairs": pairs, "samples_per_prompt": samples_per_prompt}
    settings = _settings(**chosen, evaluations=evaluations, guidance_scales=list(guidance_scales))
    folder = claim_folder(Path(output_dir), settings)
    started = time.monotonic()
    with _few_threads(), _no_loading_bars():
        comparison = Comparison(folder, settings)
        methods = [comparison.train(method, f"{i}/{len(METHODS)}") for i, method in enumerate(METHODS, 1)]
        if gentle:
            titles = [f"gentle {i}/{len(GENTLE_METHODS)}" for i in range(1, len(GENTLE_METHODS) + 1)]
            methods += map(comparison.train, GENTLE_METHODS, titles)
        guided = comparison.generate(methods)
        result = DemoResult(
            folder=folder,
            settings=settings,
            train_pairs=len(comparison.train_pairs),
            eval_pairs=len(comparison.eval_pairs),
            base=Score.of(comparison.base_scores),
            base_samples=comparison.base_samples,
            base_scores=comparison.base_scores,
            methods=methods,
            guided=guided,
            seconds=time.monotonic() - started,
        )
    summary, files = write_report(result)
    return replace(result, summary=summary, files=files)


class Comparison:
    """Trains methods on the same pairs, and scores them with the same prompts and latents."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings
        with tqdm(total=2, desc="Pairs and base model") as bar:
            base = load_base_pipeline()
            self.train_pairs, self.eval_pairs = demo_pairs(settings["pairs"], settings["seed"], base)
            bar.update()
            self.scorer = ImageScorer(settings["samples_per_prompt"], settings["seed"] + _SCORE_SEED)
            self.base_samples, self.base_scores = self.scorer(base)
            bar.update()

    def train(self, method: Method, number: str) -> MethodResult:
        """Train a method, or read its results if it is finished."""
        folder = self.folder / RUNS_FOLDER / method.key
        if (folder / RESULT_FILE).is_file():
            logger.info("%s is trained already, in %s.", method.label, folder)
            return MethodResult.read(folder)
        pipeline = load_base_pipeline()
        oracle = OracleCallback(pipeline, self.scorer, Score.of(self.base_scores))
        interrupt, progress = CheckpointOnInterrupt(), ProgressCallback(f"{number} {method.label}")
        args = self._arguments(method, folder)
        trainer = DiffusionSDPOTrainer(
            pipeline, None, args, self.train_pairs, self.eval_pairs, callbacks=[oracle, progress, interrupt]
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint="latest")
        finally:
            progress.close()
            interrupt.restore_handlers()
        if trainer.state.global_step < trainer.state.max_steps:
            raise KeyboardInterrupt(f"{method.label} resumes from its checkpoint in {folder} when called again.")
        trainer.save_model()
        result = _result(method, trainer.state.log_history, *oracle.latest)
        result.write(folder)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return result

    def generate(self, methods: list[MethodResult]) -> dict[str, Guided]:
        """Images of every model with classifier-free guidance, and of the recipe with preference guidance; read where
        they are finished."""
        scorer = GuidedScorer(self.scorer, self.settings["guidance_scales"])
        base = load_base_pipeline()
        from_base = partial(preference_guidance, reference=base.unet, **GUIDED_METHOD.settings)
        jobs: list[tuple[str, str, dict[str, Any]]]
        jobs = [(BASE_KEY, BASE_KEY, {"plain": (self.base_samples, self.base_scores)})]
        jobs += [(method.key, method.key, {"plain": (method.samples, method.scores)}) for method in methods]
        jobs += [(GUIDED_METHOD.key, GUIDED_METHOD.of, {"context": from_base})]
        found = {}
        for key, model, options in tqdm(jobs, desc="Images with guidance"):
            folder = self.folder / RUNS_FOLDER / key
            if not (folder / GENERATED_FILE).is_file():
                tuned = base if model == BASE_KEY else load_pipeline(self.folder / RUNS_FOLDER / model)
                scorer(tuned, **options).write(folder)
            found[key] = Guided.read(folder)
        return found

    def _arguments(self, method: Method, folder: Path) -> DiffusionSDPOConfig:
        steps = self.settings["max_steps"]
        if method.gentle:
            steps = -(-steps // GENTLE_DIVISOR)
        interval = -(-steps // self.settings["evaluations"])
        return DiffusionSDPOConfig(
            output_dir=str(folder),
            max_steps=steps,
            seed=self.settings["seed"],
            use_cpu=True,
            dataloader_pin_memory=False,
            verify_images="none",
            dataloader_num_workers=0,  # the images are tiny
            per_device_eval_batch_size=64,
            eval_strategy="steps",
            eval_steps=interval,
            eval_on_start=True,
            save_steps=interval,
            save_total_limit=1,
            save_full_pipeline=True,
            logging_steps=max(1, steps // LOGS),
            report_to="none",
            disable_tqdm=True,  # `ProgressCallback` has one bar per method
            **{**SHARED, **method.settings},
        )


def _result(method: Method, history: list[dict[str, Any]], samples: np.ndarray, scores: np.ndarray) -> MethodResult:
    return MethodResult(
        key=method.key,
        label=method.label,
        gentle=method.gentle,
        settings=method.settings,
        seconds=[entry["seconds"] for entry in history if "oracle" in entry][-1],
        curves=read_curves(history),
        samples=samples,
        scores=scores,
    )


def read_curves(history: list[dict[str, Any]]) -> Curves:
    """Curves of one training, from the trainer's log history.

    The changes are differences of `eval_errors/*` to the first evaluation, as losses without a reference log no
    `eval_errors/*_change`. Where they do, the two are equal: all methods start from the base model, and all evaluations
    have the same noise.

    Of a step evaluated twice, as by a resumed run, the last entry counts.
    """
    evaluated = {entry["step"]: entry for entry in history if "eval_errors/winner" in entry}
    scored = {entry["step"]: entry for entry in history if "oracle" in entry}
    logged = {entry["step"]: entry["safeguard/scale"] for entry in history if "safeguard/scale" in entry}
    steps = sorted(evaluated)
    first = evaluated[steps[0]]
    return Curves(
        steps=steps,
        winner_change=[evaluated[step]["eval_errors/winner"] - first["eval_errors/winner"] for step in steps],
        loser_change=[evaluated[step]["eval_errors/loser"] - first["eval_errors/loser"] for step in steps],
        oracle=[Score(scored[step]["oracle"], scored[step]["oracle_stderr"]) for step in steps],
        scale_steps=sorted(logged),
        scale=[logged[step] for step in sorted(logged)],
    )


def _check(
    seed: int,
    max_steps: int | None,
    pairs: str,
    samples_per_prompt: int,
    evaluations: int,
    guidance_scales: Sequence[float],
) -> None:
    if pairs not in PAIRS:
        raise ValueError(f"`pairs` must be one of {', '.join(PAIRS)}, got {pairs!r}.")
    if seed < 0:
        raise ValueError(f"`seed` must be at least 0, got {seed}.")
    counts = {"max_steps": max_steps, "samples_per_prompt": samples_per_prompt, "evaluations": evaluations}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}. Leave it out for the default.")
    if len(set(guidance_scales)) < len(guidance_scales) or not all(scale > 1 for scale in guidance_scales):
        raise ValueError(
            f"`guidance_scales` must be different numbers above 1, got {list(guidance_scales)}. 1 is always among them."
        )


def _settings(**given: Any) -> dict[str, Any]:
    """What results depend on."""
    methods = {method.key: method.settings for method in (*METHODS, *GENTLE_METHODS, GUIDED_METHOD)}
    return {**given, "version": VERSION, **SHARED, "methods": methods}


def claim_folder(folder: Path, settings: dict[str, Any]) -> Path:
    """Write the settings to the folder and return it; refuse one with other settings, whose results are not comparable.

    The results of an earlier version are removed, to be made anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SETTINGS_FILE
    if file.is_file():
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored.get("version") != VERSION and all(stored.get(name) == settings[name] for name in CHOSEN):
            logger.warning("The results in %s are of an earlier version of the demo, and are made anew.", folder)
            with contextlib.suppress(FileNotFoundError):  # what stays would be read as new
                shutil.rmtree(folder / RUNS_FOLDER)
            stored = settings
        differing = [name for name in settings if stored.get(name) != settings[name]]
        if differing:
            listed = "; ".join(f"{name} was {stored.get(name)}, is {settings[name]}" for name in differing)
            rule = "`output_dir` must be new or hold a demo of the same settings"
            raise ValueError(f"{rule}; in {folder} {listed}. Choose another folder, or delete this one.")
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return folder


def demo_pairs(kind: str, seed: int, base: Any) -> tuple[Dataset, Dataset]:
    """Training and held-out pairs of the same kind, `"off_policy"` or `"on_policy"`; the latter of images of `base`."""
    if kind == "off_policy":
        return off_policy_pairs(seed), eval_pairs(seed)
    return on_policy_pairs(base, seed), on_policy_pairs(base, seed + _HELD_OUT_SEED, per_prompt=2)


@contextlib.contextmanager
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Disables the progress bars of model loading, which would interrupt those of training."""
    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()

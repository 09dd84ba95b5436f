"""Run the demo: tune one tiny model with SFT, Diffusion-DPO, Diffusion-SDPO as published and a stricter
Diffusion-SDPO ("recipe") on the same pairs, score the tuned models' images, and write a report."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...trainer import DiffusionSDPOConfig, DiffusionSDPOTrainer
from ...utils.errors import UserError
from ..guidance import preference_guidance
from .methods import BASE, GUIDED, GUIDED_FROM, METHODS, RUNS_FOLDER, Method
from .pairs import eval_pairs, off_policy_pairs
from .pipeline import load_base_pipeline, load_pipeline
from .report import write_report
from .results import Curves, DemoResult, ModelResult
from .scoring import CURVE_SCALE, GUIDANCE_SCALES, Guided, ImageScorer, OracleCallback, curve_score, generate_guided
from .world import IMAGE_SIZE

STEPS = 240
LOGS = 30  # logs of lambda per training, for the plot
THREADS = 4  # most CPU threads; the tiny network is not faster with more
_SCORE_SEED = 20_000  # added to the seed, so that scored images have other latents than training

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
    samples_per_prompt: int = 3,
    evaluations: int = 4,
    guidance_scales: Sequence[float] = GUIDANCE_SCALES,
) -> DemoResult:
    """Tune the packaged base model with every method on the same pairs, on the CPU, and write a report.

    Args:
        output_dir (`str` or `Path`): New or empty folder for the report, and for each tuned pipeline in
            `runs/<method>`.
        seed (`int`): Seed of the pairs, of the noise in training and of the generated images.
        max_steps (`int`, *optional*): Optimizer steps of each method; 240 if unset.
        samples_per_prompt (`int`): Number of images for each of the 72 prompts, for the oracle to score.
        evaluations (`int`): Number of evaluations during the training of each method.
        guidance_scales (`Sequence[float]`): Scales of classifier-free guidance to try for each model, besides scale 1
            (no guidance). The one with the best score is chosen.

    Returns:
        `DemoResult`: The numbers, which are also in `results.json`.
    """
    steps = STEPS if max_steps is None else max_steps
    if seed < 0 or steps < 1:
        raise UserError(f"`seed` must be at least 0 and `max_steps` at least 1, got {seed} and {steps}.")
    settings = {
        "seed": seed,
        "max_steps": steps,
        "samples_per_prompt": samples_per_prompt,
        "evaluations": evaluations,
        "guidance_scales": list(guidance_scales),
        "curve_scale": CURVE_SCALE,
        **SHARED,
    }
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"`output_dir` must be a new or empty folder, got {folder}. Use another folder.")
    started = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, THREADS))
    try:
        comparison = Comparison(folder, settings)
        curves = {
            method.key: comparison.train(method, f"{number}/{len(METHODS)}")
            for number, method in enumerate(METHODS, start=1)
        }
        guided = comparison.generate()
    finally:
        torch.set_num_threads(threads)
    result = DemoResult(
        settings=settings,
        versions={library.__name__: library.__version__ for library in (torch, diffusers, transformers)},
        threads=min(threads, THREADS),
        train_pairs=len(comparison.train_pairs),
        eval_pairs=len(comparison.eval_pairs),
        models={
            method.key: _result(method, guided[method.key], curves.get(method.key))
            for method in (BASE, *METHODS, GUIDED)
        },
        seconds=time.monotonic() - started,
    )
    write_report(result, {key: images.best.images for key, images in guided.items()}, folder)
    return result


def _result(method: Method, guided: Guided, curves: Curves | None) -> ModelResult:
    chosen_from = {f"{scale:g}": score for scale, score in guided.chosen_from.items()}
    scores = guided.best.score, guided.plain.score
    prompt_scores = guided.best.scores.mean(axis=1).tolist()
    return ModelResult(method.key, method.label, *scores, chosen_from, method.settings, prompt_scores, curves)


class Comparison:
    """Trains with each method on the same pairs, and scores the tuned models' images from the same latents."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = settings
        with tqdm(total=2, desc="Pairs and base model") as bar:
            self.train_pairs = off_policy_pairs(settings["seed"])
            self.eval_pairs = eval_pairs(settings["seed"])
            bar.update()
            self.scorer = ImageScorer(settings["samples_per_prompt"], settings["seed"] + _SCORE_SEED)
            self.base_score = curve_score(self.scorer, load_base_pipeline())
            bar.update()

    def train(self, method: Method, number: str) -> Curves:
        """Train with one method, save the tuned pipeline, and return its curves."""
        pipeline = load_base_pipeline()
        oracle = OracleCallback(pipeline, self.scorer, self.base_score)
        trainer = DiffusionSDPOTrainer(
            pipeline, None, self._arguments(method), self.train_pairs, self.eval_pairs, callbacks=[oracle]
        )
        trainer.remove_callback(PrinterCallback)
        with tqdm(total=trainer.args.max_steps, desc=f"{number} {method.label}", unit="step", mininterval=1.0) as bar:
            trainer.add_callback(BarCallback(bar))
            trainer.train()
        trainer.save_model()
        trainer.save_state()
        return Curves.of(trainer.state.log_history)

    def generate(self) -> dict[str, Guided]:
        """Generate images with every model under classifier-free guidance, with the recipe's also under preference
        guidance."""
        generate = partial(generate_guided, self.scorer, self.settings["guidance_scales"])
        base = load_base_pipeline()
        guided = {BASE.key: generate(base)}
        for method in tqdm(METHODS, desc="Images with guidance"):
            tuned = load_pipeline(self.folder / RUNS_FOLDER / method.key)
            guided[method.key] = generate(tuned)
            if method.key == GUIDED_FROM:
                from_base = partial(preference_guidance, reference=base.unet, **GUIDED.settings)
                guided[GUIDED.key] = generate(tuned, context=from_base)
        return guided

    def _arguments(self, method: Method) -> DiffusionSDPOConfig:
        steps = self.settings["max_steps"]
        return DiffusionSDPOConfig(
            output_dir=str(self.folder / RUNS_FOLDER / method.key),
            max_steps=steps,
            seed=self.settings["seed"],
            use_cpu=True,
            dataloader_pin_memory=False,
            verify_images="none",
            dataloader_num_workers=0,  # the images are tiny
            per_device_eval_batch_size=64,
            eval_strategy="steps",
            eval_steps=-(-steps // self.settings["evaluations"]),
            eval_on_start=True,
            save_strategy="no",
            save_full_pipeline=True,
            save_only_model=True,  # an interrupted demo cannot be resumed, as the message after Ctrl-C says
            logging_steps=max(1, steps // LOGS),
            report_to="none",
            disable_tqdm=True,  # `BarCallback` shows the progress
            **{**SHARED, **method.settings},
        )


class BarCallback(TrainerCallback):
    """Advances the progress bar of a method's training after each step, and shows the newest score beside it."""

    def __init__(self, bar: tqdm):
        self._bar = bar

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._bar.update(state.global_step - self._bar.n)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._bar.set_postfix_str(f"score {state.log_history[-1]['oracle']:.3f}")

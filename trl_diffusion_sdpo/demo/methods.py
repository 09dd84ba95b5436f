"""The methods that the demo compares, and the callbacks of their training: the oracle's score and a progress bar."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .oracle import oracle_score
from .pipeline import generate_images, score_latents, score_prompts
from .results import Score

HARD = {"learning_rate": 2e-4, "beta": 100.0}
GENTLE = {"learning_rate": 1e-4, "beta": 500.0}
UNSAFE = {"loss_type": "sigmoid", "safeguard": "none"}
SAFE = {"loss_type": "sigmoid", "safeguard": "output", "safeguard_mu": 0.6}
# A lower winner error for slightly less reward: a point of the front that benchmarks/front.py measures.
RECIPE = {"loss_type": "sigmoid", "safeguard": "parameter", "safeguard_mu": 0.8, "lr_scheduler_type": "cosine"}


@dataclass(frozen=True)
class Method:
    """One way to train."""

    key: str  # name of its folder
    label: str  # name to display
    settings: dict[str, Any] = field(default_factory=dict)  # fields of `DiffusionSDPOConfig`
    gentle: bool = False  # trained for half as many steps


METHODS = (
    Method("sft", "SFT", {"loss_type": "sft", "learning_rate": HARD["learning_rate"]}),
    Method("dpo", "Diffusion-DPO", UNSAFE | HARD),
    Method("sdpo", "Diffusion-SDPO", SAFE | HARD),
    Method("sdpo_recipe", "Diffusion-SDPO, recipe", RECIPE | HARD),
)
GENTLE_METHODS = (
    Method("dpo_gentle", "Diffusion-DPO, gentle", UNSAFE | GENTLE, gentle=True),
    Method("sdpo_gentle", "Diffusion-SDPO, gentle", SAFE | GENTLE, gentle=True),
)


class ImageScorer:
    """Generates images from fixed prompts and latents, `samples_per_prompt` for each of the 72 prompts, and scores them
    by the oracle."""

    def __init__(self, samples_per_prompt: int, seed: int):
        self.prompts = score_prompts(samples_per_prompt)
        self.latents = score_latents(samples_per_prompt, seed)

    def __call__(self, pipeline: StableDiffusionPipeline) -> tuple[np.ndarray, np.ndarray]:
        """Images `(N, 32, 32, 3)` and their scores `(N,)`; the UNet keeps its training mode."""
        training = pipeline.unet.training
        pipeline.unet.eval()
        try:
            with torch.no_grad():
                images = generate_images(pipeline, self.prompts, self.latents)
        finally:
            pipeline.unet.train(training)
        return images, oracle_score(images, self.prompts)


class OracleCallback(TrainerCallback):
    """Adds the oracle's score to the log history at every evaluation, and evaluates after the last step.

    The entry has `step`, `oracle`, `oracle_stderr` and `seconds`, the training time so far. Checkpoints store it with
    the log history. `base` is the score before training.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, scorer: ImageScorer, base: Score):
        self.pipeline, self.scorer, self.base = pipeline, scorer, base
        self.latest = (np.empty(0), np.empty(0))  # newest images and their scores
        self._start = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        trained = [entry["seconds"] for entry in state.log_history if "oracle" in entry]
        self._start = time.monotonic() - (trained[-1] if trained else 0.0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
            control.should_save = False  # the result is saved after training

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        score = self.base
        if state.global_step > 0:
            self.latest = self.scorer(self.pipeline)
            score = Score.of(self.latest[1])
        entry = {"oracle": score.mean, "oracle_stderr": score.stderr, "seconds": time.monotonic() - self._start}
        state.log_history.append({**entry, "step": state.global_step})


class ProgressCallback(TrainerCallback):
    """One progress bar for a method, with the newest score, in place of one for each evaluation."""

    def __init__(self, title: str):
        self.title = title
        self._bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        done, total = state.global_step, state.max_steps
        self._bar = tqdm(total=total, initial=done, desc=self.title, unit="step", mininterval=1.0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._bar.update(state.global_step - self._bar.n)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._bar.set_postfix_str(f"oracle {state.log_history[-1]['oracle']:.3f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.close()

    def close(self) -> None:
        """Close the bar, if it is open."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

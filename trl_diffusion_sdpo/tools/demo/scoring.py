"""Score a model: generate images of fixed prompts from fixed latents, and let the oracle score them."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .oracle import oracle
from .pipeline import generate_images, reported_captions, score_latents, score_prompts
from .results import Generated, Guided, Score

GUIDANCE_SCALES = (2.0, 3.0, 5.0)  # scales of classifier-free guidance to try
CHOOSING_SAMPLES = 2  # images per prompt and scale for choosing the best scale


class ImageScorer:
    """Generates `samples_per_prompt` images for each of the 72 prompts, and scores the images with the oracle."""

    def __init__(self, samples_per_prompt: int, seed: int):
        self.one_of_each = slice(None, None, samples_per_prompt)  # selects one image of each prompt
        self.prompts = score_prompts(samples_per_prompt)
        self.latents = score_latents(samples_per_prompt, seed)

    def __call__(
        self, pipeline: StableDiffusionPipeline, only: np.ndarray | slice = slice(None), **options: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return N generated images `(N, 32, 32, 3)` and their scores `(N,)`. The UNet's mode is restored.

        Args:
            only (`np.ndarray` or `slice`): Indices of the images to generate; all by default.
            options: Further arguments of [`generate_images`].
        """
        training = pipeline.unet.training
        prompts = np.array(self.prompts)[only].tolist()
        pipeline.unet.eval()
        try:
            with torch.no_grad():
                images = generate_images(pipeline, prompts, self.latents[only], **options)
        finally:
            pipeline.unet.train(training)
        return images, oracle(list(images), prompts).double().numpy()


class GuidedScorer:
    """Finds a model's best scale of classifier-free guidance on half of the prompts. Then scores images of the other
    half, without guidance and at this scale.

    Args:
        scorer ([`ImageScorer`]): Generates and scores the images.
        guidance_scales (`Sequence[float]`): Scales to try, besides scale 1 (no guidance).
    """

    def __init__(self, scorer: ImageScorer, guidance_scales: Sequence[float]):
        self._scorer = scorer
        self._scales = guidance_scales
        samples = len(scorer.prompts) // len(reported_captions())
        self._reported = np.repeat(reported_captions(), samples)
        self._choosing = ~self._reported & (np.arange(len(scorer.prompts)) % samples < CHOOSING_SAMPLES)

    def __call__(
        self, pipeline: StableDiffusionPipeline, plain: tuple[np.ndarray, np.ndarray] | None = None, **options: Any
    ) -> Guided:
        """Return a model's images and scores, without guidance and at the best scale.

        Args:
            plain (`tuple`, *optional*): All images without guidance and their scores, if already generated.
            options: Further arguments of [`generate_images`].
        """
        started = time.monotonic()
        images, scores = self._scorer(pipeline, **options) if plain is None else plain
        chosen_from = {1.0: float(scores[self._choosing].mean())}
        for scale in self._scales:
            _, guided = self._scorer(pipeline, self._choosing, guidance_scale=scale, **options)
            chosen_from[scale] = float(guided.mean())
        without = best = Generated(1.0, images[self._reported], scores[self._reported])
        scale = max(chosen_from, key=chosen_from.__getitem__)
        if scale != 1:
            best = Generated(scale, *self._scorer(pipeline, self._reported, guidance_scale=scale, **options))
        return Guided(without, best, chosen_from, time.monotonic() - started)


class OracleCallback(TrainerCallback):
    """Adds the oracle's score and the training time so far to the log history at every evaluation. Also requests an
    evaluation after the last step. `base` is the score to log before the first step: that of the base model."""

    def __init__(self, pipeline: StableDiffusionPipeline, scorer: ImageScorer, base: Score):
        self.pipeline = pipeline
        self.scorer = scorer
        self.base = base
        self.latest = (np.empty(0), np.empty(0))  # images and scores of the newest evaluation
        self._start = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        score = self.base
        if state.global_step > 0:
            is_last = state.global_step >= state.max_steps
            self.latest = self.scorer(self.pipeline, slice(None) if is_last else self.scorer.one_of_each)
            score = Score.of(self.latest[1])
        entry = {"oracle": score.mean, "oracle_stderr": score.stderr, "seconds": time.monotonic() - self._start}
        state.log_history.append({**entry, "step": state.global_step})

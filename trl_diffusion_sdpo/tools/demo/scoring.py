"""Score a model: generate images of fixed prompts from fixed latents, for the oracle to score."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .oracle import oracle
from .pipeline import generate_images, reported_captions, score_latents, score_prompts
from .results import Score

GUIDANCE_SCALES = (2.0, 3.0, 5.0)  # scales of classifier-free guidance to try
CHOOSING_SAMPLES = 2  # images per prompt and scale for choosing the best
CURVE_SCALE = 3.0  # guidance scale of the scores during training, the same for all methods


class ImageScorer:
    """Generates `samples_per_prompt` images for each of the 72 prompts, and scores them with the oracle."""

    def __init__(self, samples_per_prompt: int, seed: int):
        self.samples_per_prompt = samples_per_prompt
        self.prompts = score_prompts(samples_per_prompt)
        self.latents = score_latents(samples_per_prompt, seed)
        # Which images the demo reports, and which choose the guidance scale.
        self.reported = np.repeat(reported_captions(), samples_per_prompt)
        self.choosing = ~self.reported & (np.arange(len(self.prompts)) % samples_per_prompt < CHOOSING_SAMPLES)

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


@dataclass(frozen=True)
class Generated:
    """Generated images of the 36 prompts that the demo reports."""

    guidance_scale: float  # scale of classifier-free guidance; 1 is no guidance
    images: np.ndarray  # (36, n, 32, 32, 3), uint8: n images per prompt
    scores: np.ndarray  # (36, n)

    @property
    def score(self) -> Score:
        """The oracle's mean score of these images."""
        return Score.of(self.scores, self.guidance_scale)


@dataclass(frozen=True)
class Guided:
    """A model's images without classifier-free guidance and, from the same latents, at the best guidance scale."""

    plain: Generated
    best: Generated
    chosen_from: dict[float, float]  # guidance scale -> mean oracle score on the other 36 prompts


def generate_guided(
    scorer: ImageScorer, guidance_scales: Sequence[float], pipeline: StableDiffusionPipeline, **options: Any
) -> Guided:
    """Find a model's best scale of classifier-free guidance on half of the prompts, and generate and score images of
    the other half, without guidance and at this scale.

    Args:
        scorer ([`ImageScorer`]): Generates and scores the images.
        guidance_scales (`Sequence[float]`): Scales to try, besides scale 1 (no guidance).
        pipeline (`StableDiffusionPipeline`): The model.
        options: Further arguments of [`generate_images`].
    """

    def reported(scale: float) -> Generated:
        images, scores = scorer(pipeline, scorer.reported, guidance_scale=scale, **options)
        samples = scorer.samples_per_prompt
        return Generated(scale, images.reshape(-1, samples, *images.shape[1:]), scores.reshape(-1, samples))

    chosen_from = {}
    for scale in (1.0, *guidance_scales):
        _, scores = scorer(pipeline, scorer.choosing, guidance_scale=scale, **options)
        chosen_from[scale] = float(scores.mean())
    best = max(chosen_from, key=chosen_from.__getitem__)
    plain = reported(1.0)
    return Guided(plain, plain if best == 1 else reported(best), chosen_from)


class OracleCallback(TrainerCallback):
    """Logs the score of the reported images at guidance scale 3 at every evaluation, and requests one after the last
    step. `base` is the base model's score, logged before the first step."""

    def __init__(self, pipeline: StableDiffusionPipeline, scorer: ImageScorer, base: Score):
        self.pipeline = pipeline
        self.scorer = scorer
        self.base = base

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        score = self.base if state.global_step == 0 else curve_score(self.scorer, self.pipeline)
        entry = {"oracle": score.mean, "oracle_stderr": score.stderr, "oracle_guidance_scale": score.guidance_scale}
        state.log_history.append({**entry, "step": state.global_step})


def curve_score(scorer: ImageScorer, pipeline: StableDiffusionPipeline) -> Score:
    """Return the score of the reported images at the guidance scale of the curves."""
    _, scores = scorer(pipeline, scorer.reported, guidance_scale=CURVE_SCALE)
    return Score.of(scores.reshape(-1, scorer.samples_per_prompt), CURVE_SCALE)

"""The images of `trl-diffusion-sdpo sweep-scale`: their prompts, how they are generated, and what scores them."""

from __future__ import annotations

import argparse
import bisect
import contextlib
import copy
import functools
import importlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

    from ..reporting.scale_images import ScaleImages, Scorer
    from ..saving.interpolation import SavedRun, ScaledWeights
    from ..trainer import DiffusionSDPOTrainer

GRID_FILES = {"weights": "images_weights.png", "prediction": "images_prediction.png"}
# Options that have no effect without images.
OF_IMAGES = ("prompts", "seed", "sample_guidance_scale", "sample_inference_steps", "scorer")


def add_options(add: Any) -> None:
    """Declare the options of the images."""
    add("--no_images", action="store_true", help="Evaluate the pairs only.")
    add(
        "--prompts",
        nargs="+",
        metavar="TEXT",
        help="Prompts of the images, or a .txt file with one in each line; if unset, `sample_prompts` of the run, else "
        "the first 8 of the evaluated pairs.",
    )
    add("--seed", type=int, metavar="N", help="Of the images' noise; the run's if unset.")
    add("--sample_guidance_scale", type=float, metavar="G", help="Classifier-free guidance; the run's if unset.")
    add("--sample_inference_steps", type=int, metavar="N", help="Denoising steps; the run's if unset.")
    add(
        "--scorer",
        metavar="MODULE:FUNCTION",
        help="Your function that scores images: it takes a list of PIL images and a list of prompts, and returns a "
        "number for each, larger for better.",
    )


def check(options: argparse.Namespace) -> None:
    """Raise `ValueError` on options that are wrong whatever the run is."""
    given = [name for name in OF_IMAGES if vars(options)[name] is not None]
    if options.no_images and given:
        raise ValueError(
            f"`--no_images` generates no images, and `--{given[0]}` is for images. Leave one of them out."
        )
    if options.sample_inference_steps is not None and options.sample_inference_steps < 1:
        raise ValueError(f"`--sample_inference_steps` must be at least 1, got {options.sample_inference_steps}.")
    guidance_scale = options.sample_guidance_scale
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise ValueError(f"`--sample_guidance_scale` must be a finite number, got {guidance_scale}.")
    if options.prompts is not None:
        options.prompts = _given_prompts(options.prompts)


def load_scorer(name: str) -> Scorer:
    """A function by its name, `module:function`; modules of the working directory are found.

    Raises:
        `ValueError`: If there is none of this name.
    """
    module, _, function = name.partition(":")
    if not (module and function):
        raise ValueError(f"A scorer is named as module:function, such as my_scores:pick_score, got {name}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = functools.reduce(getattr, function.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The scorer {name} cannot be imported: {error}.") from error
    if not callable(found):
        raise ValueError(f"The scorer {name} must be a function, got a {type(found).__name__}.")
    return cast(Any, found)


def make(
    options: argparse.Namespace,
    run: SavedRun,
    trainer: DiffusionSDPOTrainer,
    weights: ScaledWeights,
    prompts: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    scorer: Scorer | None,
) -> dict[str, Any]:
    """Generate and score the missing images, and draw all; `rows` are those of the sweep. Returns the scores, the
    scorer's name and the guidance scale, as [`~trl_diffusion_sdpo.reporting.recommended_scale.recommend`] takes
    them. Without a scorer, those of the one that an earlier call had."""
    from tqdm.auto import tqdm

    from ..reporting.scale_images import ScaleImages

    folder = Path(trainer.args.output_dir)
    sampler = Sampler(options, run, trainer, weights, prompts)
    images = ScaleImages(folder, sampler.settings(run), sampler.prompts, sampler.seed)
    scales = images.add_scales(options.scales)
    sampler.generate(images)
    images.write_index()
    if scorer is not None:
        with tqdm(desc="Scores", unit="image", leave=False) as bar:
            images.score(options.scorer, scorer, bar.update)
    name = options.scorer or images.only_scorer
    scores = images.scores(name)
    _draw(images, scales, folder, rows, scores)
    print(f"The images are in {images.folder}, and side by side in {' and '.join(GRID_FILES.values())} beside them.")
    return {"scores": scores, "scorer": name if scores else None, "guidance_scale": sampler.guidance_scale}


class Sampler:
    """Generates the images of a sweep.

    Args:
        trainer ([`~trl_diffusion_sdpo.DiffusionSDPOTrainer`]): Its denoiser is the base.
        weights ([`~trl_diffusion_sdpo.saving.interpolation.ScaledWeights`]): Of the run.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        run: SavedRun,
        trainer: DiffusionSDPOTrainer,
        weights: ScaledWeights,
        prompts: Sequence[str],
    ):
        from ..saving.resuming import stored_settings
        from ..trainer.sample_images import SampleImagesCallback

        stored = stored_settings(run.folder)  # empty for a run from the Hub
        self._trainer, self._weights, self._is_full = trainer, weights, run.lora is None
        own = options.sample_guidance_scale
        self.guidance_scale: float | None = stored.get("sample_guidance_scale") if own is None else own
        steps = options.sample_inference_steps or stored.get("sample_inference_steps")
        self.steps: int = steps or trainer.args.sample_inference_steps
        self.seed: int = trainer.args.seed if options.seed is None else options.seed
        self.prompts = list(prompts)
        self._callback = SampleImagesCallback(
            trainer.family.pipeline,
            self.prompts,
            every_n_steps=None,
            num_inference_steps=self.steps,
            call_options=trainer.family.generation_kwargs(self.guidance_scale),
            seed=self.seed,
            resolution=cast(Any, trainer.args.resolution),
            denoiser_name=trainer.family.denoiser_name,
            frozen=trainer.frozen_components,
        )

    def settings(self, run: SavedRun) -> dict[str, Any]:
        """Everything that the images depend on, besides form, scale, prompt and seed."""
        return {
            "weights": self._weights.fingerprint,
            "base": run.setup["weights_before_training"],
            "guidance_scale": self.guidance_scale,
            "steps": self.steps,
            "resolution": self._trainer.args.resolution,
            "mixed_precision": self._trainer.args.mixed_precision,
            "dtype": str(self._trainer.family.dtype),
        }

    def generate(self, images: ScaleImages) -> None:
        """Generate the missing images, writing each at once."""
        from tqdm.auto import tqdm

        from ..engines.engine_settings import training_autocast
        from ..reporting.scale_images import Cell

        missing = images.missing()
        guided = any(form == "prediction" for form, _ in missing)
        # The base has to be beside the tuned weights; of a LoRA, it is the LoRA switched off.
        reference = copy.deepcopy(self._trainer.denoiser).eval() if guided and self._is_full else None
        autocast = training_autocast(self._trainer.args)
        with tqdm(total=sum(map(len, missing.values())), desc="Images", unit="image", disable=not missing) as bar:
            for (form, scale), indices in missing.items():

                def keep(index: int, image: Any, form: str = form, scale: float = scale) -> None:
                    images.save(Cell(form, scale, index), image)
                    bar.update()

                bar.set_postfix_str(f"{form}, scale {scale:g}")
                context = functools.partial(_guided, scale, reference, autocast) if form == "prediction" else None
                with self._weights.active(1.0 if form == "prediction" else scale):
                    self._callback.generate(autocast, only=indices, within=context, on_image=keep)


def _draw(
    images: ScaleImages,
    scales: Sequence[float],
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Mapping[float, Sequence[float]]],
) -> None:
    """Draw a grid for each form; above those of the weights is how the winners' error changes."""
    from ..reporting.scale_images import draw_grid
    from ..reporting.scale_sweep import percent

    changes = {
        row["scale"]: f"winners {percent(row['winner_change_relative'], row.get('winner_change_relative_stderr'))}"
        for row in rows
    }
    for form, file in GRID_FILES.items():
        heads = changes if form == "weights" else {}
        draw_grid(images, form, scales, folder / file, heads=heads, scores=scores.get(form, {}))


@contextlib.contextmanager
def _guided(
    scale: float, reference: nn.Module | None, autocast: contextlib.AbstractContextManager, pipeline: DiffusionPipeline
) -> Iterator[None]:
    """Preference guidance of a pipeline; a reference of its own computes in the precision of the tuned model."""
    from ..guidance import preference_guidance
    from ..trainer.sample_images import in_training_precision

    same = contextlib.nullcontext() if reference is None else in_training_precision(reference, autocast)
    # Whether it helps a distilled model is what its images are compared for.
    with same, preference_guidance(pipeline, scale, reference=reference, allow_distilled=True):
        yield


def _given_prompts(given: Sequence[str]) -> list[str]:
    """Prompts, or those in a text file."""
    if len(given) == 1 and given[0].endswith(".txt"):
        try:
            given = Path(given[0]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"Prompts are read from a text file in UTF-8; that of `--prompts` cannot: {error}"
            ) from error
    prompts = [prompt.strip() for prompt in given if prompt.strip()]
    if not prompts:
        raise ValueError("`--prompts` must name at least one prompt, or a text file with one in each line; got none.")
    return prompts


def named_prompts(options: argparse.Namespace, run: SavedRun) -> list[str] | None:
    """The prompts of `--prompts`, else of the run; `None` if neither names any.

    Raises:
        `ValueError`: If they are too few for a scorer.
    """
    from ..saving.resuming import stored_settings

    named = options.prompts or stored_settings(run.folder).get("sample_prompts")
    return _enough(options, named) if named else None


def find_prompts(options: argparse.Namespace, run: SavedRun, dataset: Any) -> list[str]:
    """The prompts of the images: named ones, else the first of the evaluated pairs.

    Raises:
        `ValueError`: If there are none, or too few for a scorer.
    """
    return named_prompts(options, run) or _enough(options, _first_prompts(dataset))


def _enough(options: argparse.Namespace, prompts: list[str]) -> list[str]:
    from ..reporting.recommended_scale import FEWEST_IMAGES

    if options.scorer is not None and len(prompts) < FEWEST_IMAGES:
        raise ValueError(
            f"Scores of fewer than {FEWEST_IMAGES} prompts do not count, and there are {len(prompts)}. Name "
            f"{FEWEST_IMAGES} or more with `--prompts`, or leave `--scorer` out."
        )
    return prompts


def _first_prompts(dataset: Any) -> list[str]:
    """The first distinct prompts of the evaluated pairs that are not empty, in their order."""
    from ..reporting.scale_images import PROMPTS

    found: list[str] = []

    def others(count: int) -> list[str]:
        """Prompts of the first `count` pairs that are not found yet."""
        return [
            prompt
            for prompt in dataset.first(count).prompts(of_losers=False)
            if prompt.strip() and prompt not in found
        ]

    count = PROMPTS
    while count < len(dataset) and len(others(count)) < PROMPTS:
        count *= 2  # a scan for each pair would take the square of their number
    while len(found) < PROMPTS and others(count):
        found += others(bisect.bisect_left(range(count), True, key=lambda first: bool(others(first))))
    if not found:
        raise ValueError(
            "Images need prompts, and those of the evaluated pairs are empty. Name some with `--prompts`."
        )
    return found

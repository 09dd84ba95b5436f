"""Make pairs from good images: each is chosen, and the rejected one is made from it or its prompt, by a model or, for
`degraded`, without one."""

from __future__ import annotations

import hashlib
import inspect
import io
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import PIL
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
from PIL import Image, ImageFilter, ImageOps, ImageStat
from tqdm.auto import tqdm

from ...data.image_folders import SIDES
from ...data.images import ImageReader, UndecodableImageError
from ...models.generation import call_options, draw_images, quiet_copy
from ...utils.errors import UserError
from ...utils.files import file_facts
from ...utils.score_scale import SCALE_COLUMN
from ..evaluation import Candidate
from ..evaluation.images import (
    SCORES_FOLDER,
    ImageSettings,
    facts_of,
    image_path,
    load_candidate,
    peers_of_this_run,
    record_settings,
    saturation,
    writing_images,
)
from ..evaluation.prompts import PromptList
from ..rewards import Scorer
from .generate import Pairing, refuse_picks, score_given_pairs, scorers_and_judge
from .manifest import ListedImage, read_manifest, write_manifest
from .publish import ALIGNED_ADVICE, write_dataset

logger = logging.getLogger(__name__)

# Function from an image's index, the winner and random numbers to the loser, for `local` after its mask.
_Maker = Callable[[int, Image.Image, np.random.Generator], dict[str, Image.Image]]
Recipe = Literal["spin", "partial", "local", "degraded"]
VERSION = 2  # of the recipes: images that an earlier version made are not used again
MULTIPLE = 16  # images are cropped to sides that are multiples of this, which every supported VAE accepts
COLOURLESS = 0.02  # `saturation` below which `local` leaves an image out; grey photographs have 0
# How `degraded` makes an image worse -> the range of the amount, which is drawn evenly.
DEGRADATIONS = {
    "blur": (0.01, 0.03),  # radius of a Gaussian, as a share of the shorter side
    "jpeg": (5, 25),  # quality of JPEG
    "noise": (0.1, 0.3),  # standard deviation of Gaussian noise, as a share of the range of values
    "fade": (0.4, 0.8),  # share of a uniform grey that washes out the colours
}
PURPOSES = {
    "spin": "Each chosen image is paired with an image that the model generated from its prompt (SPIN).",
    "partial": "Each chosen image is paired with a copy that was noised and then denoised by the model. The two images "
    "of a pair share most of their content.",
    "local": "Each chosen image is paired with a copy in which the model has redrawn one region (LocalDPO), more often "
    "one of high contrast. Outside of this region, the two images are equal. The column `mask` marks the region, so "
    "that training counts errors only there.",
    "degraded": "Each chosen image is paired with a copy that is blurred, compressed as JPEG, noisy or washed out.",
}


def pairs_from_images(
    recipe: Recipe,
    model: Candidate | None,
    images: str | Path,
    output_dir: str | Path,
    settings: ImageSettings,
    strength: float = 0.6,
    scorers: Sequence[Scorer] = (),
    pairing: Pairing | None = None,
) -> int:
    """Make a rejected image (the loser) for each image of a folder (the winner), and write `pairs.jsonl` for training.

    Call it again with the same arguments to continue after an interruption, or with other scorers or another `pairing`
    to reuse the images. Processes that accelerate launches share the work.

    With scorers, the rows have `chosen_score`, `rejected_score` and `score_scales`, as those of [`generate_pairs`].

    Args:
        recipe (`str`): `"spin"` (the loser is generated from the prompt alone), `"partial"` (the winner is noised to
            `strength` and denoised), `"local"` (the model redraws a [`region`] of the winner, whose mask is saved) or
            `"degraded"` (the winner is [`degraded`]).
        model (`Candidate`, *optional*): The model that makes the losers. `"degraded"` needs `None`.
        images (`str` or `Path`): Folder of good images with a `manifest.jsonl`, as `pairs from-images` writes it.
        output_dir (`str` or `Path`): Folder for winners, losers, masks, pairs and a card.
        settings (`ImageSettings`): Seeds (only the first is used) and arguments of the pipeline. With `height` and
            `width` among them, winners are cropped and resized to this size, otherwise only cropped to sides that are
            multiples of 16 pixels. `"degraded"` takes no other arguments.
        strength (`float`, *optional*, defaults to `0.6`): Noise level to which `"partial"` and `"local"` noise an image
            before they denoise it, in `(0, 1]`.
        scorers (`Sequence[Scorer]`, *optional*): Scorers, which must prefer the winner: other pairs are left out. A
            judge such as `vlm_judge` compares the two images.
        pairing (`Pairing`, *optional*): How several scorers make one reward, and with `margin`, by how much the
            winner's must be higher. Here, z-scores are over all images, so `margin` is in standard deviations of the
            reward.

    Returns:
        `int`: Number of pairs. The log and the card say how many images were left out, and why: those that cannot be
            read, have a side below 16 pixels, for `"local"` have nearly no colour (a mean difference between the
            largest and the smallest channel below 2 %), or are not preferred by the scorers.

    Raises:
        `ValueError`: If a value is out of range, the folder has no images with prompts, diffusers has no
            image-to-image or inpainting pipeline for the model, the scorers confirm no pair, or a person picked the
            pairs of the output folder.
    """
    if recipe not in get_args(Recipe):
        raise UserError(f"`recipe` must be one of {', '.join(get_args(Recipe))}, got {recipe!r}.")
    if (model is None) != (recipe == "degraded"):
        raise UserError(
            f"All recipes need a model except `degraded`, which takes none. Got the recipe {recipe} and "
            f"{'no model' if model is None else 'a model'}. {'Pass one' if model is None else 'Leave it out'}."
        )
    if not 0 < strength <= 1:
        raise UserError(f"`strength` must be in (0, 1], got {strength}.")
    source = Path(images)
    folder = Path(output_dir)
    if source.resolve() == folder.resolve():
        raise UserError(f"`output_dir` must not be the folder of the images, got {source} for both. Use a new folder.")
    refuse_picks(folder)
    pairing = pairing or Pairing()
    scorers_and_judge(scorers, pairing)  # raises before images are made
    call_kwargs = {**(settings.call_kwargs or {}), **((model.call_kwargs if model is not None else None) or {})}
    size = (call_kwargs.pop("width", None), call_kwargs.pop("height", None))
    if not all(side is None or (isinstance(side, int) and side >= MULTIPLE) for side in size):
        raise UserError(f"`width` and `height` in `call_kwargs` must be whole numbers from {MULTIPLE} on, got {size}.")
    if model is None and call_kwargs:
        raise UserError(f"`call_kwargs` of `degraded` can only have `width` and `height`, got {call_kwargs}.")
    listed, left_out = read_manifest(source)
    if not listed:
        raise UserError(f"{source} must have images with prompts, but all were left out: {dict(left_out)}.")

    # Record what the losers depend on. Each process makes its share of those that are missing.
    peers = peers_of_this_run()
    prompts = PromptList(tuple(image.prompt for image in listed))
    files = repr([(image.name, image.prompt, file_facts(source / image.name)) for image in listed])
    facts: dict[str, Any] = {
        "recipe": recipe,
        "version": VERSION,
        "images": hashlib.sha256(files.encode()).hexdigest(),
    }
    if model is None:
        facts |= {"seeds": list(settings.seeds), "size": list(size), "pillow": PIL.__version__}
    else:
        facts |= {"strength": strength, **facts_of(model, None, prompts.prompts, settings)}
    peers.first(lambda: record_settings(folder / "images" / "rejected", facts))
    job = _Losers(recipe, strength, model, source, listed, folder, settings)
    made = {*peers.first(job.made)}
    share = [index for index in range(len(listed)) if index not in made][peers.index :: peers.count]
    for unusable in peers.gather_results(lambda: job.make(share, call_kwargs, size) if share else Counter()):
        left_out += unusable

    # Write the pairs, those that the scorers confirm.
    pairs = job.made()
    if not pairs:
        raise UserError(f"None of the {len(listed)} images of {source} can be used: {_counted(left_out)}.")
    scores: dict[int, dict[str, Any]] = {}
    if scorers:
        rows = [(index, settings.seeds[0]) for index in pairs]
        rewards, confirmed, scale = score_given_pairs(scorers, pairing, folder, rows, prompts, settings.device)
        for index, values in zip(pairs, rewards.tolist(), strict=True):
            scores[index] = {
                **dict(zip((f"{side}_score" for side in SIDES), values, strict=True)),
                SCALE_COLUMN: [scale],
            }
        pairs = [index for index, is_confirmed in zip(pairs, confirmed, strict=True) if is_confirmed]
        left_out["that the scorers do not prefer by enough"] += len(confirmed) - len(pairs)
        if not pairs:
            raise UserError(
                f"The scorers must prefer some chosen image, with `margin` by at least that much, but left out all "
                f"{len(confirmed)} pairs. Lower `margin`, or use other scorers."
            )
    peers.first(lambda: job.write(pairs, scores, +left_out))
    return len(pairs)


@dataclass(frozen=True)
class _Losers:
    """The losers that a recipe makes of the listed images of `source`, and their files in `folder`."""

    recipe: Recipe
    strength: float
    model: Candidate | None
    source: Path
    listed: list[ListedImage]
    folder: Path
    settings: ImageSettings

    @property
    def kinds(self) -> tuple[str, ...]:
        return (*SIDES, "mask") if self.recipe == "local" else SIDES

    def file(self, kind: str, index: int) -> Path:
        return image_path(self.folder, kind, index, self.settings.seeds[0])

    def made(self) -> list[int]:
        """Return the indices of the images that have a loser."""
        return [index for index in range(len(self.listed)) if self.file("rejected", index).is_file()]

    def make(
        self, indices: Sequence[int], call_kwargs: dict[str, Any], size: tuple[int | None, int | None]
    ) -> Counter[str]:
        """Make the losers of these images. Return how many images cannot be used, by reason."""
        seed = self.settings.seeds[0]
        left_out: Counter[str] = Counter()
        make: _Maker | None = None
        with writing_images() as write:
            for index in tqdm(indices, desc=self.recipe, unit="image"):
                image = self.listed[index]
                winner = _winner(self.source / image.name, size, needs_colour=self.recipe == "local")
                if isinstance(winner, str):
                    left_out[winner] += 1
                    continue
                if make is None:  # the model is loaded for the first image that needs it
                    make = self._maker(call_kwargs)
                    for kind in self.kinds:
                        self.file(kind, 0).parent.mkdir(parents=True, exist_ok=True)
                    for name in (*SIDES, "+".join(SIDES)):  # whose rows are about to change
                        for scores in (self.folder / SCORES_FOLDER).glob(f"*/{name}.json"):
                            scores.unlink(missing_ok=True)
                made = {"chosen": winner, **make(index, winner, np.random.default_rng([index, seed]))}
                # The loser is last: if its file exists, so do the others.
                write([(self.file(kind, index), each, image.prompt, seed) for kind, each in made.items()])
        return left_out

    def _maker(self, call_kwargs: dict[str, Any]) -> _Maker:
        """Return the function that makes a loser, and for `local` its mask."""
        if self.model is None:
            return lambda index, winner, rng: {"rejected": degraded(winner, rng)}
        family = load_candidate(self.model, self.settings)
        pipeline: Any = quiet_copy(_drawing_pipeline(self.recipe, family.pipeline))
        accepted = inspect.signature(pipeline.__call__).parameters
        steps = call_kwargs.get("num_inference_steps")
        if steps is None and "num_inference_steps" in accepted:
            steps = accepted["num_inference_steps"].default
        if self.recipe != "spin" and isinstance(steps, int) and int(steps * self.strength) < 1:
            raise UserError(
                f"`strength` x `num_inference_steps` must be at least 1, because the model denoises this many steps. "
                f"Got {self.strength} x {steps}. Increase one of them."
            )
        options = call_options(family, call_kwargs, "call_kwargs")

        def make(index: int, winner: Image.Image, rng: np.random.Generator) -> dict[str, Image.Image]:
            prompt = self.listed[index].prompt
            made = {"mask": region(winner, rng)} if self.recipe == "local" else {}
            inputs: dict[str, Any] = {"image": winner, "strength": self.strength}
            inputs |= {"width": winner.width, "height": winner.height}
            inputs |= {f"{kind}_image": image for kind, image in made.items()}
            inputs = {name: value for name, value in inputs.items() if name in accepted}
            generator = self.settings.generator(f"{index}\n{prompt}", self.settings.seeds[0])
            loser = draw_images(pipeline, prompt, generator, **inputs, **options)[0].resize(winner.size)
            made["rejected"] = Image.composite(loser, winner, made["mask"]) if "mask" in made else loser
            return made

        return make

    def write(self, pairs: Sequence[int], scores: Mapping[int, Mapping[str, Any]], left_out: Counter[str]) -> None:
        """Write the manifest, the pairs and the card."""
        rows: list[dict[str, Any]] = []
        shown = []
        for index in pairs:
            prompt = self.listed[index].prompt
            names = {kind: self.file(kind, index).relative_to(self.folder).as_posix() for kind in self.kinds}
            rows.append({"prompt": prompt, "seed": self.settings.seeds[0], **names, **scores.get(index, {})})
            shown += [ListedImage(names["chosen"], prompt, {}), ListedImage(names["rejected"], prompt, {})]
        write_manifest(self.folder, shown)
        facts: dict[str, object] = {"Recipe": self.recipe}
        if left_out:
            facts["Images that were left out"] = _counted(left_out)
            logger.info("Left out of %d images: %s.", len(pairs) + left_out.total(), _counted(left_out))
        if self.recipe in ("partial", "local"):
            facts["Strength"] = self.strength
        advice = ""
        if self.recipe != "spin":
            advice = ALIGNED_ADVICE
            logger.warning(
                "Train on these pairs only with the safeguard (the default): without one, pairs of an image and its "
                "changed copy ruined a small model (docs/measurements.md#aligned)."
            )
        write_dataset(self.folder, rows, PURPOSES[self.recipe], self.model, facts, advice)


def _counted(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items())


def _drawing_pipeline(recipe: Recipe, pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Return the pipeline that makes a recipe's losers: text-to-image, image-to-image or inpainting."""
    if recipe == "spin":
        return pipeline
    kind: Any = AutoPipelineForImage2Image if recipe == "partial" else AutoPipelineForInpainting
    try:
        return kind.from_pipe(pipeline)
    except ValueError as error:
        raise UserError(
            f"The recipe `{recipe}` needs an image-to-image or inpainting pipeline, and diffusers has none for "
            f"{type(pipeline).__name__}. Use the recipe `spin`, or another model for the losers."
        ) from error


def _winner(path: Path, size: tuple[int | None, int | None], *, needs_colour: bool) -> Image.Image | str:
    """Return the image in a file, cropped and resized to `size` (width, height), or cropped to a multiple of 16 pixels
    where that is `None`. Return the reason, and log it, if the image cannot be used."""
    try:
        image = ImageReader().decode(path)
    except UndecodableImageError as error:
        logger.warning("%s is left out: the image %s", path.name, error)
        return "that cannot be read"
    width, height = (wanted or side // MULTIPLE * MULTIPLE for wanted, side in zip(size, image.size, strict=True))
    if width and height:
        winner = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        if not needs_colour or saturation(np.asarray(winner)) >= COLOURLESS:
            return winner
    reason = "without colour" if width and height else f"with a side below {MULTIPLE} pixels"
    logger.warning("%s is left out: an image %s", path.name, reason)
    return reason


def region(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return the mask of a random region with a smooth, wavy edge, inside a box of 0.4 to 0.8 of the image's sides.

    The box is drawn with a probability proportional to the local contrast: the standard deviation of the grey levels in
    its middle half.

    Returns:
        `PIL.Image.Image`: A grey image, 255 inside the region and 0 outside.
    """
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    height, width = (int(side * rng.uniform(0.4, 0.8)) for side in grey.shape)
    lower, right = (
        grey.shape[0] - height + height // 4 + height // 2,
        grey.shape[1] - width + width // 4 + width // 2,
    )
    middles = grey[height // 4 : lower, width // 4 : right]
    mean, square = (_box_means(values, height // 2, width // 2) for values in (middles, middles**2))
    contrast = np.sqrt(np.maximum(square - mean**2, 0)) + 1e-4  # which draws evenly if the image has one grey level
    top, left = np.unravel_index(rng.choice(contrast.size, p=contrast.ravel() / contrast.sum()), contrast.shape)
    # Three waves, whose heights sum to a quarter, bend the edge of an ellipse.
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    waves = zip(rng.dirichlet(np.ones(3)) / 4, (2, 3, 4), rng.uniform(0, 2 * np.pi, 3), strict=True)
    edge = 0.75 + sum(size * np.cos(count * np.arctan2(y, x) + phase) for size, count, phase in waves)
    mask = np.zeros(grey.shape, np.uint8)
    mask[top : top + height, left : left + width] = 255 * (np.hypot(x, y) <= edge)
    return Image.fromarray(mask)


def _box_means(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the means of `values` in all boxes of this size."""
    sums = np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = sums[height:] - sums[:-height]
    return (sums[:, width:] - sums[:, :-width]) / (height * width)


def degraded(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return a copy of an image that is worse in one way of `DEGRADATIONS`, drawn at random."""
    kind = rng.choice([*DEGRADATIONS])
    amount = rng.uniform(*DEGRADATIONS[kind])
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(amount * min(image.size)))
    if kind == "jpeg":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=round(amount))
        return Image.open(file).convert("RGB")
    if kind == "noise":
        noisy = np.asarray(image) + rng.normal(0, 255 * amount, (image.height, image.width, 3))
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    grey = round(ImageStat.Stat(image.convert("L")).mean[0])
    return Image.blend(image, Image.new("RGB", image.size, (grey, grey, grey)), amount)

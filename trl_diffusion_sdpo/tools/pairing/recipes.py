"""Make pairs from good images: each is chosen, and a model makes the rejected one."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
from PIL import Image, ImageDraw, ImageOps
from tqdm.auto import tqdm

from ...data.images import ImageReader, UndecodableImageError
from ...models.generation import call_options, draw_images, quiet_copy
from ...utils.errors import UserError
from ...utils.files import file_facts
from ..evaluation import Candidate
from ..evaluation.images import (
    ImageSettings,
    facts_of,
    load_candidate,
    peers_of_this_run,
    record_settings,
    writing_images,
)
from .manifest import ListedImage, read_manifest, write_manifest
from .publish import ALIGNED_ADVICE, write_dataset

logger = logging.getLogger(__name__)

Recipe = Literal["spin", "partial", "local"]
MULTIPLE = 16  # images are cropped to sides that are multiples of this, which every supported VAE accepts
PURPOSES = {
    "spin": "Each chosen image is paired with an image that the model generated from its prompt (SPIN).",
    "partial": "Each chosen image is paired with a copy that was noised and then denoised by the model. The two images "
    "of a pair share most of their content.",
    "local": "Each chosen image is paired with a copy in which the model has redrawn one region (LocalDPO). Outside of "
    "this region, the two images are equal. The column `mask` marks the region, so that training counts errors only "
    "there.",
}


def pairs_from_images(
    recipe: Recipe,
    model: Candidate,
    images: str | Path,
    output_dir: str | Path,
    settings: ImageSettings,
    strength: float = 0.6,
) -> int:
    """Make a rejected image (the loser) for each image of a folder (the winner), and write `pairs.jsonl` for training.

    Call it again with the same arguments to continue after an interruption. Processes that accelerate launches share
    the work.

    Args:
        recipe (`str`): `"spin"` (the loser is generated from the prompt alone), `"partial"` (the winner is noised to
            `strength` and denoised) or `"local"` (the model redraws a random region of the winner, whose mask is
            saved).
        model (`Candidate`): The model that makes the losers.
        images (`str` or `Path`): Folder of good images with a `manifest.jsonl`, as `pairs from-images` writes it.
        output_dir (`str` or `Path`): Folder for winners, losers, masks, pairs and a card.
        settings (`ImageSettings`): Seeds (only the first is used) and arguments of the pipeline. With `height` and
            `width` among them, winners are cropped and resized to this size, otherwise only cropped to sides that are
            multiples of 16 pixels.
        strength (`float`, *optional*, defaults to `0.6`): Noise level to which `"partial"` and `"local"` noise an image
            before they denoise it, in `(0, 1]`.

    Returns:
        `int`: Number of pairs. Images that cannot be read or have a side below 16 pixels are left out; the card says
            how many.

    Raises:
        `ValueError`: If a value is out of range, the folder has no images with prompts, or diffusers has no
            image-to-image or inpainting pipeline for the model.
    """
    if recipe not in get_args(Recipe):
        raise UserError(f"`recipe` must be one of {', '.join(get_args(Recipe))}, got {recipe!r}.")
    if not 0 < strength <= 1:
        raise UserError(f"`strength` must be in (0, 1], got {strength}.")
    source = Path(images)
    folder = Path(output_dir)
    if source.resolve() == folder.resolve():
        raise UserError(f"`output_dir` must not be the folder of the images, got {source} for both. Use a new folder.")
    call_kwargs = {**(settings.call_kwargs or {}), **(model.call_kwargs or {})}
    size = (call_kwargs.pop("width", None), call_kwargs.pop("height", None))
    if not all(side is None or (isinstance(side, int) and side > 0) for side in size):
        raise UserError(f"`width` and `height` in `call_kwargs` must be whole numbers above 0, got {size}.")
    listed, left_out = read_manifest(source)
    if not listed:
        raise UserError(f"{source} must have images with prompts, but all were left out: {dict(left_out)}.")

    # Record what the losers depend on. Each process makes its share of those that are missing.
    peers = peers_of_this_run()
    files = hashlib.sha256(repr([(image.name, file_facts(source / image.name)) for image in listed]).encode())
    facts = facts_of(model, None, [image.prompt for image in listed], settings)
    facts |= {"recipe": recipe, "strength": strength, "images": files.hexdigest()}
    peers.first(lambda: record_settings(folder / "images" / "rejected", facts))
    job = _Losers(recipe, strength, model, source, listed, folder, settings)
    made = {*peers.first(job.made)}
    share = [index for index in range(len(listed)) if index not in made][peers.index :: peers.count]
    peers.gather_results(lambda: job.make(share, call_kwargs, size) if share else None)

    # Write the pairs.
    pairs = job.made()
    if not pairs:
        raise UserError(
            f"A pair needs an image that can be read and has at least {MULTIPLE} pixels on each side. None of the "
            f"{len(listed)} images of {source} is such an image. Look at the files."
        )
    peers.first(lambda: job.write(pairs))
    return len(pairs)


@dataclass(frozen=True)
class _Losers:
    """The losers that a recipe makes of the listed images of `source`, and their files in `folder`."""

    recipe: Recipe
    strength: float
    model: Candidate
    source: Path
    listed: list[ListedImage]
    folder: Path
    settings: ImageSettings

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("chosen", "rejected", "mask") if self.recipe == "local" else ("chosen", "rejected")

    def file(self, kind: str, index: int) -> Path:
        return self.folder / "images" / kind / f"{index:05d}.png"

    def made(self) -> list[int]:
        """Return the indices of the images that have a loser."""
        return [index for index in range(len(self.listed)) if self.file("rejected", index).is_file()]

    def make(self, indices: Sequence[int], call_kwargs: dict[str, Any], size: tuple[int | None, int | None]) -> None:
        """Make the losers of these images, leaving out images that cannot be used."""
        family = load_candidate(self.model, self.settings)
        pipeline = quiet_copy(_drawing_pipeline(self.recipe, family.pipeline))
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
        seed = self.settings.seeds[0]
        for kind in self.kinds:
            self.file(kind, 0).parent.mkdir(parents=True, exist_ok=True)
        with writing_images() as write:
            for index in tqdm(indices, desc=self.recipe, unit="image"):
                prompt = self.listed[index].prompt
                winner = _winner(self.source / self.listed[index].name, size)
                if winner is None:
                    continue
                made = {"chosen": winner}
                inputs = {"image": winner, "strength": self.strength, "width": winner.width, "height": winner.height}
                if self.recipe == "local":
                    made["mask"] = region(winner.size, np.random.default_rng([index, seed]))
                    inputs["mask_image"] = made["mask"]
                inputs = {name: value for name, value in inputs.items() if name in accepted}
                generator = self.settings.generator(f"{index}\n{prompt}", seed)
                loser = draw_images(pipeline, prompt, generator, **inputs, **options)[0].resize(winner.size)
                made["rejected"] = Image.composite(loser, winner, made["mask"]) if self.recipe == "local" else loser
                # The loser is last: if its file exists, so do the others.
                write([(self.file(kind, index), image, prompt, seed) for kind, image in made.items()])

    def write(self, pairs: Sequence[int]) -> None:
        """Write the manifest, the pairs and the card."""
        rows: list[dict[str, Any]] = []
        shown = []
        for index in pairs:
            prompt = self.listed[index].prompt
            names = {kind: self.file(kind, index).relative_to(self.folder).as_posix() for kind in self.kinds}
            rows.append({"prompt": prompt, "seed": self.settings.seeds[0], **names})
            shown += [ListedImage(names["chosen"], prompt, {}), ListedImage(names["rejected"], prompt, {})]
        write_manifest(self.folder, shown)
        facts: dict[str, object] = {
            "Recipe": self.recipe,
            "Images that were left out": len(self.listed) - len(pairs),
        }
        advice = ""
        if self.recipe != "spin":
            facts["Strength"] = self.strength
            advice = ALIGNED_ADVICE
        write_dataset(self.folder, rows, PURPOSES[self.recipe], self.model, facts, advice)


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


def _winner(path: Path, size: tuple[int | None, int | None]) -> Image.Image | None:
    """Return the image in a file, cropped and resized to `size` (width, height), or cropped to a multiple of 16 pixels
    where that is `None`. If the image is unusable or too small, log why and return `None`."""
    try:
        image = ImageReader().decode(path)
    except UndecodableImageError as error:
        logger.warning("%s is left out: the image %s", path.name, error)
        return None
    width, height = (wanted or side // MULTIPLE * MULTIPLE for wanted, side in zip(size, image.size, strict=True))
    if not width or not height:
        logger.warning("%s is left out: both sides must have at least %d pixels", path.name, MULTIPLE)
        return None
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def region(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Return the mask of a random ellipse whose axes are 0.3 to 0.7 of the image's sides.

    Returns:
        `PIL.Image.Image`: A grey image, 255 inside the ellipse and 0 outside.
    """
    axes = np.array(size) * rng.uniform(0.3, 0.7, size=2)
    corner = rng.uniform(0, np.array(size) - axes)
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse([*corner, *(corner + axes)], fill=255)
    return mask

"""Generate the images of an evaluation, one for each model, prompt and seed. All models start from the same noise."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from ...engines.processes import gather_objects
from ...families import Family
from ...families.base import refuse_sources
from ...models.adapters import active_adapter
from ...models.generation import call_options, draw_images, in_own_precision, noise_generator, quiet_copy
from ...models.loading import load_model
from ...models.text_checks import hide_truncation_warnings, note_on_long_prompts
from ...saving.starting_point import INDEX_FILE, attach_adapter, starting_point
from ...utils.errors import UserError
from ...utils.files import write_atomically
from ...utils.identity import (
    describe_pipeline,
    describe_source,
    differences,
    listed,
    plain,
    read_description,
    write_description,
)
from ...utils.processes import ALONE, Peers
from ..rewards.scorer import usable_device
from .candidate import Candidate
from .scales import scaled

Noise = Literal["prompt", "shared"]
Protocol = Literal["authors"]
ImageToWrite = tuple[Path, Image.Image, str, int]  # with its prompt and seed
SETTINGS_FILE = "settings.json"
SCORES_FOLDER = "scores"
PNG_LEVEL = 1  # of compression: faster than PIL's default, for somewhat larger files
_FORMAT = 2  # of the settings file; images of earlier formats are not used again

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSettings:
    """Settings with which all models generate images.

    Args:
        seeds (`tuple[int, ...]`, *optional*, defaults to `(0,)`): Seeds of the initial noise. Each prompt gets one
            image per seed.
        noise (`"prompt"` or `"shared"`, *optional*, defaults to `"prompt"`): With `"prompt"`, the initial noise depends
            on prompt and seed; with `"shared"`, on the seed alone, as in the evaluation of the Diffusion-SDPO authors.
        call_kwargs (`dict`, *optional*): Arguments of the pipelines' calls, such as `guidance_scale`,
            `num_inference_steps`, `height` and `width`.
        batch_size (`int`, *optional*, defaults to `4`): Images per call of the pipeline.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Dtype in which pipelines are loaded.
        device (`str`, *optional*, defaults to `"cpu"`): Device on which pipelines and scorers run.
        protocol (`"authors"`, *optional*): Draw as the Diffusion-SDPO authors do: Euler steps where they can replace
            the pipeline's scheduler, SDXL's empty negative prompt encoded, and the VAE in float32. `noise`,
            `call_kwargs` and `dtype` are not changed.

    Raises:
        `ValueError`: If a setting is out of range, or torch cannot use `device` on this machine.
    """

    seeds: tuple[int, ...] = (0,)
    noise: Noise = "prompt"
    call_kwargs: dict[str, Any] | None = None
    batch_size: int = 4
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    protocol: Protocol | None = None

    def __post_init__(self) -> None:
        if self.protocol not in (None, "authors"):
            raise UserError(f"`protocol` must be `authors` or unset, got {self.protocol!r}.")
        usable_device(self.device)
        if self.noise not in ("prompt", "shared"):
            raise UserError(f"`noise` must be `prompt` or `shared`, got {self.noise!r}.")
        if self.batch_size < 1 or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(
                f"`batch_size` must be at least 1, and `seeds` must be one or more different numbers, got "
                f"{self.batch_size} and {self.seeds}."
            )

    def noise_seed(self, prompt: str, seed: int) -> int:
        """Return the seed of `generator`."""
        if self.noise == "shared":
            return seed % 2**64  # as torch maps negative seeds
        return int.from_bytes(hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()[:4], "big")

    def generator(self, prompt: str, seed: int) -> torch.Generator:
        """Return the random generator for an image's initial noise."""
        return noise_generator(self.noise_seed(prompt, seed))


def peers_of_this_run() -> Peers:
    """Return the group of processes that accelerate launched, to share work among them."""
    state = PartialState()
    return Peers(state.process_index, state.num_processes, gather_objects)


def image_path(folder: Path, candidate: str, prompt_index: int, seed: int) -> Path:
    """Return the path of a model's image for a prompt and seed."""
    return folder / "images" / candidate / f"{prompt_index:05d}-{seed}.png"


def settings_path(folder: Path, candidate: str) -> Path:
    """Return the path of the record of how a model's images were generated."""
    return folder / "images" / candidate / SETTINGS_FILE


def generate_images(
    candidate: Candidate,
    prompts: Sequence[str],
    settings: ImageSettings,
    folder: Path,
    peers: Peers = ALONE,
    base: Candidate | None = None,
) -> None:
    """Generate a model's images in batches, except those whose images are all in the folder already. Call it in all
    processes.

    Batches are always the same, so a resumed call writes the same bytes as an uninterrupted one.

    Args:
        base (`Candidate`, *optional*): The base model. Needed if the candidate has a `scale` and no LoRA: its weights
            are then mixed with the base's, or the base guides the generation.

    Raises:
        `ValueError`: If the folder has images of this model generated with other settings or prompts, or the model
            cannot be loaded.
    """
    target = folder / "images" / candidate.name
    peers.first(lambda: record_settings(target, facts_of(candidate, base, prompts, settings)))
    rows = [(index, seed) for index in range(len(prompts)) for seed in settings.seeds]
    batches = [rows[start : start + settings.batch_size] for start in range(0, len(rows), settings.batch_size)]
    missing = peers.first(
        lambda: [
            batch for batch in batches if not all(image_path(folder, candidate.name, *row).is_file() for row in batch)
        ]
    )
    share = missing[peers.index :: peers.count]
    peers.gather_results(lambda: _generate(candidate, base, prompts, settings, folder, share) if share else None)


def _generate(
    candidate: Candidate,
    base: Candidate | None,
    prompts: Sequence[str],
    settings: ImageSettings,
    folder: Path,
    batches: list[list[tuple[int, int]]],
) -> None:
    family = load_candidate(candidate, settings)
    refuse_sources(family, "Evaluation")
    pipeline = quiet_copy(family.pipeline)
    if settings.protocol is not None:
        _draw_as_the_authors(pipeline)
    needs_base = candidate.scale is not None and active_adapter(family.denoiser) is None
    if needs_base and (base is None or base is candidate):
        raise UserError(
            f"A model with a scale and without a LoRA needs a base model, but {candidate.name} has none. List the base "
            "model first."
        )
    reference = load_candidate(base, settings).denoiser if needs_base and base is not None else None
    call_kwargs = {**(settings.call_kwargs or {}), **(candidate.call_kwargs or {})}
    options = call_options(family, call_kwargs, "call_kwargs")
    hide_truncation_warnings(family)  # which come once a batch
    note = note_on_long_prompts(family, prompts) if batches[0][0][0] == 0 else ""  # one process has the first prompt
    if note:
        logger.warning("%s: %s", candidate.name, note)
    bar = tqdm(total=sum(map(len, batches)), desc=candidate.name, unit="image")
    vae_precision = contextlib.nullcontext() if settings.protocol is None else in_own_precision(pipeline.vae)
    with bar, vae_precision, scaled(candidate, pipeline, family.denoiser, reference), writing_images() as write:
        for batch in batches:
            texts = [prompts[index] for index, _ in batch]
            generators = [settings.generator(text, seed) for text, (_, seed) in zip(texts, batch, strict=True)]
            try:
                images = draw_images(pipeline, texts, generators, **options)
            except (TypeError, ValueError, ArithmeticError, LookupError) as error:
                raise UserError(
                    f"The {type(pipeline).__name__} of {candidate.name} cannot draw with the `call_kwargs` "
                    f"{call_kwargs}: {error}"
                ) from error
            paths = [image_path(folder, candidate.name, *row) for row in batch]
            write([*zip(paths, images, texts, (seed for _, seed in batch), strict=True)])
            bar.update(len(batch))


def load_candidate(candidate: Candidate, settings: ImageSettings) -> Family:
    """Load a model and its LoRA onto the device of the settings, and return its family."""
    if isinstance(candidate.model, DiffusionPipeline):
        family = load_model(candidate.model).family
    else:
        start = starting_point(candidate.model, candidate.lora)
        options = start.with_recorded({"dtype": settings.dtype if settings.protocol is None else torch.float32})
        family = load_model(start.pipeline, model_init_kwargs=options, denoiser_folder=start.denoiser).family
        if start.adapter is not None:
            attach_adapter(family.pipeline, family.denoiser_name, start.adapter)
        if settings.protocol is not None:  # the VAE stays in float32
            for name, part in family.pipeline.components.items():
                if name != "vae" and isinstance(part, torch.nn.Module):
                    part.to(settings.dtype)
    family.pipeline.to(settings.device)
    return family


def _draw_as_the_authors(pipeline: Any) -> None:
    """Give a pipeline Euler steps, unless they cannot replace its scheduler (as for flow matching), and let it encode
    SDXL's empty negative prompt."""
    scheduler = pipeline.scheduler
    if EulerDiscreteScheduler in scheduler.compatibles:
        pipeline.scheduler = EulerDiscreteScheduler.from_config(scheduler.config)
    if pipeline.config.get("force_zeros_for_empty_prompt"):
        pipeline.register_to_config(force_zeros_for_empty_prompt=False)


def facts_of(
    candidate: Candidate, base: Candidate | None, prompts: Sequence[str], settings: ImageSettings
) -> dict[str, Any]:
    """Return all that a model's images depend on, which [`record_settings`] compares with that of earlier images in the
    folder."""
    files, has_lora = _described(candidate)
    base_files = None
    if base is not None and candidate.scale is not None and not has_lora:
        base_files, _ = _described(base)
    facts = {
        **asdict(replace(candidate, model="")),
        "model": candidate.model if isinstance(candidate.model, str) else type(candidate.model).__name__,
        "files": files,
        "base_files": base_files,
        "noise": settings.noise,
        "seeds": list(settings.seeds),
        "shared_call_kwargs": settings.call_kwargs or {},
        "batch_size": settings.batch_size,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "device": torch.device(settings.device).type,
        "protocol": settings.protocol,
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "diffusers": diffusers.__version__,
    }
    return plain(facts)


def _described(candidate: Candidate) -> tuple[dict[str, Any], bool]:
    """Describe a loaded pipeline or all that a candidate is loaded from. Also return whether it has a LoRA."""
    if isinstance(candidate.model, DiffusionPipeline):
        has_lora = active_adapter(load_model(candidate.model).family.denoiser) is not None
        return describe_pipeline(candidate.model), has_lora
    start = starting_point(candidate.model, candidate.lora)
    sources = {"denoiser": start.denoiser, "lora": start.adapter}
    described = {name: _described_source(source) for name, source in sources.items() if source is not None}
    pipeline = _described_source(start.pipeline, **start.options)
    return {"options": start.options, "pipeline": pipeline, **described}, start.adapter is not None


def _described_source(source: str, **where: Any) -> dict[str, Any]:
    if not Path(source).exists():  # even the first call needs the commit on the Hub, before it loads the model
        try:
            hf_hub_download(source, INDEX_FILE, revision=where.get("revision"))
        except HFValidationError:  # a path that does not exist, as loading it says
            return {"source": source}
        except (OSError, HfHubHTTPError):  # not on the Hub, a LoRA, or no network
            pass
    return describe_source(source, **where)


def record_settings(target: Path, facts: dict[str, Any]) -> None:
    """Write the settings of a model's images into the folder. Raise `ValueError` if it has images generated with
    others."""
    facts = {**facts, "format": _FORMAT}
    path = target / SETTINGS_FILE
    if any(target.glob("*.png")):
        before = read_description(path)
        if before is None or before.get("format") != _FORMAT:
            raise UserError(
                f"{target} has images, and {SETTINGS_FILE} does not say all that they depend on, because an earlier "
                "version of this package wrote it or it was deleted. Use another output folder, or delete that folder."
            )
        found = differences(before, facts)
        if found:
            raise UserError(
                f"{target} has images that were generated with other settings or models: {listed(found)}. Use another "
                "output folder, or delete that folder."
            )
    else:
        for scores in (target.parents[1] / SCORES_FOLDER).glob("*/*.json"):
            if target.name in scores.stem.split("+"):  # a judge's file is named by its two models, joined by +
                scores.unlink(missing_ok=True)  # its images were deleted
    write_description(path, facts)


@contextlib.contextmanager
def writing_images() -> Iterator[Callable[[Sequence[ImageToWrite]], None]]:
    """Yield a function that writes images in a thread, in their order, while the caller draws the next ones.

    One batch waits at most: the function first waits for the batch before, and raises its error. So does leaving the
    context.
    """
    waiting: list[Future[None]] = []

    def write(images: Sequence[ImageToWrite]) -> None:
        if waiting:
            waiting.pop().result()
        waiting.append(thread.submit(_write, images))

    with ThreadPoolExecutor(1, "images") as thread:
        yield write
        if waiting:
            waiting.pop().result()


def _write(images: Sequence[ImageToWrite]) -> None:
    for path, image, prompt, seed in images:
        write_atomically(path, png_bytes(image, prompt, seed))


def png_bytes(image: Image.Image, prompt: str, seed: int) -> bytes:
    """Return an image as the bytes of a PNG file, with prompt and seed in the metadata."""
    text = PngInfo()
    text.add_itxt("prompt", prompt)
    text.add_text("seed", str(seed))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", pnginfo=text, compress_level=PNG_LEVEL)
    return buffer.getvalue()


# ---- Measurements without a scorer ----------------------------------------------------------------------------------


def is_black(image: Image.Image) -> bool:
    """Return whether every pixel is black, as after a safety checker."""
    return image.convert("L").getextrema() == (0, 0)


def saturation(images: np.ndarray) -> float:
    """Return how colourful images are, in `[0, 1]`: the difference between a pixel's largest and smallest channel,
    averaged over all pixels. Grey images have 0.

    This is chroma. HSV's saturation divides it by the largest channel, so rounding errors dominate in dark pixels.

    Args:
        images (`np.ndarray` of shape `(..., 3)`, uint8): The images.
    """
    return float(np.ptp(images / 255, axis=-1).mean())


def diversity(images: np.ndarray) -> float:
    """Return the mean distance (root mean squared difference of pixel values in `[0, 1]`) between two images of one
    prompt.

    Args:
        images (`np.ndarray` of shape `(N, H, W, 3)`, uint8): Images of one prompt.

    Returns:
        `float`: Distance in `[0, 1]`, or NaN for fewer than two images.
    """
    if len(images) < 2:
        return float("nan")
    pixels = images.reshape(len(images), -1) / 255
    first, second = np.triu_indices(len(pixels), 1)
    return float(np.linalg.norm(pixels[first] - pixels[second], axis=1).mean() / pixels.shape[1] ** 0.5)

"""The interface of scorers, base classes for them, and loading by name."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import inspect
import logging
import math
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any, Protocol, TypeGuard

import torch
from accelerate.utils.memory import clear_device_cache
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors import SafetensorError

from ... import __version__
from ...utils.errors import UserError
from ...utils.identity import (
    describe_component,
    describe_files,
    describe_source,
    differences,
    listed,
    plain,
    read_description,
    short_hash,
    write_description,
)
from ...utils.score_scale import ScoreScale
from ...utils.secrets import masked, names_secret

logger = logging.getLogger(__name__)


class Scorer(Protocol):
    """Callable that scores images for their prompts; higher is better.

    Args:
        images (`Sequence[PIL.Image.Image]`): N images.
        prompts (`Sequence[str]`): N prompts, one for each image.

    Returns:
        `torch.Tensor` of shape `(N,)`: float32 scores on the CPU.
    """

    name: str

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor: ...


class KnownScorer:
    """Base class of this package's scorers, which may know the scale of their scores.

    Attributes:
        score_scale (`ScoreScale`): What the scores mean, as far as known. A subclass or an instance may set it.
    """

    name: str
    score_scale: ScoreScale = ScoreScale()


class BatchedScorer(KnownScorer, ABC):
    """Base class of scorers that work in batches. Implement `score_batch`.

    Example:

    ```python
    from PIL import ImageStat


    class Brightness(BatchedScorer):
        def score_batch(self, images, prompts):
            return torch.tensor([ImageStat.Stat(image.convert("L")).mean[0] for image in images])

    scores = Brightness("brightness", batch_size=8)(images, prompts)
    ```

    Args:
        name (`str`): Name in tables and files. Scorers with different scores need different names.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Device of the scorer's model.
        batch_size (`int`, *optional*, defaults to `16`): Images per batch.

    Raises:
        `ValueError`: If `batch_size` is below 1, or when the scorer is called, if the numbers of images and prompts
            differ or a score is not finite.
    """

    def __init__(self, name: str, *, device: str | torch.device = "cpu", batch_size: int = 16):
        if batch_size < 1:
            raise UserError(f"`batch_size` of a scorer must be at least 1, got {batch_size}.")
        self.name = name
        self.device = torch.device(device)
        self.batch_size = batch_size

    @abstractmethod
    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        """Return the scores `(N,)` of a batch of N RGB images, at most `batch_size`."""

    def to(self, device: str | torch.device) -> None:
        """Move the scorer's networks to a device."""
        self.device = torch.device(device)
        for part in self._parts():
            part.to(self.device)

    def weight_bytes(self) -> int:
        """Return the bytes of the scorer's networks."""
        total = 0
        for part in self._parts():
            tensors = () if isinstance(part, BatchedScorer) else (*part.parameters(), *part.buffers())
            total += part.weight_bytes() if isinstance(part, BatchedScorer) else sum(t.nbytes for t in tensors)
        return total

    def _parts(self) -> list[Any]:
        return [part for part in vars(self).values() if isinstance(part, torch.nn.Module | BatchedScorer)]

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        if len(images) != len(prompts):
            raise UserError(
                f"`{self.name}` needs one prompt for each image, got {len(images)} images and {len(prompts)} prompts. "
                "Pass lists of equal length."
            )
        scores = [torch.empty(0)]
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            with torch.inference_mode():
                scored = self.score_batch([image.convert("RGB") for image in images[batch]], list(prompts[batch]))
            scores.append(checked_scores(scored, prompts[batch], self.name))
        return torch.cat(scores)


class FunctionScorer(KnownScorer):
    """A scorer from a function that takes a list of N images and one of N prompts and returns N numbers.

    Raises:
        `ValueError`: When it is called, if the function does not return one finite score per image.
    """

    def __init__(self, name: str, function: Callable[[list[Image.Image], list[str]], Any]):
        self.name = name
        self.function = function

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        return checked_scores(self.function(list(images), list(prompts)), prompts, self.name)


@contextlib.contextmanager
def on_device(scorer: Scorer, device: str | torch.device) -> Iterator[None]:
    """Move a scorer from the CPU to a device within the context, so that it takes memory there only while it scores.

    A scorer that is not on the CPU or is not a [`BatchedScorer`] stays where it is.

    Raises:
        `ValueError`: If torch cannot use the device on this machine.
    """
    device = usable_device(device)
    if not _moves(scorer, device):
        yield
        return
    try:
        scorer.to(device)
        yield
    finally:
        scorer.to("cpu")
        clear_device_cache()


def fitting(scorers: Sequence[Scorer], device: str | torch.device) -> list[list[int]]:
    """Return the numbers of the scorers in groups, in their order. The scorers of a group can be on a device together.

    What [`on_device`] moves there for a group takes at most half of the free memory, unless it is one scorer; the rest
    is for activations. Without scorers, there is one empty group.
    """
    device = usable_device(device)
    space = _free_bytes(device) / 2
    groups: list[list[int]] = [[]]
    taken = 0
    for number, scorer in enumerate(scorers):
        size = scorer.weight_bytes() if _moves(scorer, device) else 0
        if groups[-1] and taken + size > space:
            groups.append([])
            taken = 0
        groups[-1].append(number)
        taken += size
    if len(groups) > 1:
        logger.info(
            "The scorers do not fit into the memory of %s together, so images are decoded once for each of %d groups: "
            "%s.",
            device,
            len(groups),
            "; ".join(", ".join(scorers[number].name for number in group) for group in groups),
        )
    return groups


def _moves(scorer: Scorer, device: torch.device) -> TypeGuard[BatchedScorer]:
    return isinstance(scorer, BatchedScorer) and scorer.device.type == "cpu" and device.type != "cpu"


def _free_bytes(device: torch.device) -> float:
    if device.type not in ("cuda", "xpu"):  # others share the memory of the CPU, where the scorers are already
        return math.inf
    clear_device_cache()
    return torch.get_device_module(device).mem_get_info(device)[0]


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device with this name, or raise `ValueError` if torch cannot use it on this machine."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise UserError(
            f"`device` must be a device that torch can use on this machine, such as cpu, got {device!r}: {reason}. "
            "Leave it out to use a GPU if there is one."
        ) from error


def checked_scores(scores: Any, prompts: Sequence[str], name: str) -> torch.Tensor:
    """Validate a scorer's output, and return it as a float32 tensor `(N,)` on the CPU.

    Raises:
        `ValueError`: If they are not N finite numbers.
    """
    try:
        scores = torch.as_tensor(scores).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"`{name}` must return numbers, got {str(scores)[:200]}. {error}") from error
    if scores.shape != (len(prompts),):
        raise UserError(
            f"`{name}` must return one score for each image, got shape {tuple(scores.shape)} for {len(prompts)} "
            "images."
        )
    finite = torch.isfinite(scores)
    if not finite.all():
        first = int(finite.int().argmin())
        raise UserError(
            f"`{name}` must return finite scores, got {scores[first].item()} for the prompt {prompts[first]!r}. Check "
            "this image, or use `dtype=torch.float32`."
        )
    return scores


# Settings that do not change scores.
_SPEED = ("device", "batch_size", "timeout", "max_unreadable", "api_key_variable")
_UNNAMED = (*_SPEED, "url", "name")  # settings left out of scorers' names
_SOURCES = ("model", "processor", "head", "tokenizer", "base")  # settings that name folders or Hub ids
_LONGEST_WORD = 40  # characters of a value in a scorer's name
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What loading may raise: wrong settings, a missing library, no download, weights of another layout.
_LOADING_ERRORS = (
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ImportError,
    OSError,
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
)

# Name of a scorer -> function or class that builds it, or "module:function", imported on first use.
_BUILDERS: dict[str, str | Callable[..., Scorer]] = {
    "pickscore": "clip:pickscore",
    "clip_score": "clip:clip_score",
    "clip_score_hessel": "clip:clip_score_hessel",
    "hpsv2": "clip:hpsv2",
    "hpsv2.1": "clip:hpsv21",
    "aesthetic": "aesthetic:AestheticScorer",
    "image_reward": "image_reward:ImageRewardScorer",
    "vqa_score": "vqa_score:VQAScorer",
    "hpsv3": "hpsv3:HPSv3Scorer",
    "vlm_server": "vlm_server:VLMServerScorer",
    "vlm_judge": "vlm_server:VLMServerJudge",
}


def register_scorer(name: str) -> Callable[[Callable[..., Scorer]], Callable[..., Scorer]]:
    """Return a decorator that registers a function or class from which [`load_scorer`] builds a scorer of this name.

    Raises:
        `ValueError`: If the name is already registered or contains a colon.

    Example:

    ```python
    from trl_diffusion_sdpo.tools.rewards import FunctionScorer, load_scorer, register_scorer


    @register_scorer("corner")
    def corner(**settings):
        return FunctionScorer("corner", lambda images, prompts: [sum(image.getpixel((0, 0))) for image in images])


    scorer = load_scorer("corner")
    ```
    """
    if ":" in name or name in _BUILDERS:
        raise UserError(
            f"A scorer's name must not be registered yet and must not contain a colon, got {name!r}. Use another."
        )

    def register(builder: Callable[..., Scorer]) -> Callable[..., Scorer]:
        _BUILDERS[name] = builder
        return builder

    return register


def scorer_names() -> list[str]:
    """Return the names of all registered scorers, for [`load_scorer`]."""
    return sorted(_BUILDERS)


def load_scorer(name: str, **settings: Any) -> Scorer:
    """Load a scorer by its registered name, or a scorer or function by its import path `module:function`.

    Args:
        name (`str`): A name in [`scorer_names`], or the import path `package.module:function` of a scorer or of a
            function from a list of images and a list of prompts to one number per image.
        settings: Settings of a registered scorer, such as `device`, `batch_size`, `model` and `revision`.

    Raises:
        `ValueError`: If there is no such scorer or function, its settings are wrong, or it cannot be loaded.

    Example:

    ```python
    from trl_diffusion_sdpo.tools.rewards import load_scorer

    scorer = load_scorer("pickscore", device="cuda")
    scores = scorer([image], ["a red circle"])  # (1,)
    ```
    """
    builder = _BUILDERS.get(name)
    if isinstance(builder, str):
        module, _, attribute = builder.partition(":")
        builder = getattr(import_module(f".{module}", __package__), attribute)
    if builder is not None:
        if isinstance(dtype := settings.get("dtype"), str):  # JSON and YAML have no dtypes
            if dtype not in _DTYPES:
                raise UserError(f"`dtype` of a scorer must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
            settings = {**settings, "dtype": _DTYPES[dtype]}
        try:
            scorer = builder(**settings)
        except _LOADING_ERRORS as error:
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise UserError(
                f"The scorer {name!r} cannot be loaded: {reason}. Check its settings and files."
            ) from error
        scorer.name += _variant(scorer.name, settings)
        vars(scorer)[_LOADED] = {"scorer": name, "builder": _code(builder), **_described_settings(builder, settings)}
        return scorer
    if ":" not in name:
        raise UserError(
            f"There is no scorer {name!r}. Use one of {', '.join(f'`{known}`' for known in scorer_names())}, or your "
            "own function as `module:function`."
        )
    if settings:
        raise UserError(
            f"A scorer that is named as `module:function` takes no settings, got {sorted(settings)} for {name!r}. "
            "Leave out the settings."
        )
    module, _, attribute = name.partition(":")
    try:
        function = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"The scorer {name!r} cannot be imported as `module:function`: {error}. Check the name."
        ) from error
    if not callable(function):
        raise UserError(f"The scorer {name!r} must name a function, got a {type(function).__name__}. Check the name.")
    return function if isinstance(function, (BatchedScorer, FunctionScorer)) else FunctionScorer(name, function)


def _variant(name: str, settings: Mapping[str, Any]) -> str:
    """Return a suffix for a scorer's name, such as `(revision=v2)`, with the settings that change scores."""
    words = []
    for key, value in settings.items():
        if key in _UNNAMED or names_secret(key):
            continue
        text = str(value).removeprefix("torch.")
        end = text.rstrip("/").rpartition("/")[2]
        word = text
        if text.count("/") > 1 or os.path.isabs(text):  # two folders may have the same name
            word = f"{end[:_LONGEST_WORD]}-{_hash(text, 4)}"
        elif len(text) > _LONGEST_WORD:
            word = _hash(text, 8)
        elif name.endswith(f"({end})"):  # such as `vqa_score(model)`
            continue
        words.append(f"{key}={word}")
    return f"({', '.join(words)})" if words else ""


def _hash(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


# ---- What saved scores depend on ------------------------------------------------------------------------------------

_LOADED = "_loaded"  # attribute of a scorer with what `load_scorer` knows of it


def describe_scorer(scorer: Scorer) -> dict[str, Any]:
    """Return what a scorer's scores depend on, as JSON: name, code, and the settings and weights that [`load_scorer`]
    used. Only a scorer with the same description uses saved scores again.

    Of a scorer that [`load_scorer`] did not load, only the name shows its settings.
    """
    made_by = scorer.function if isinstance(scorer, FunctionScorer) else type(scorer)
    return plain({"name": scorer.name, "code": _code(made_by), **vars(scorer).get(_LOADED, {})})


def scale_of(scorer: Scorer) -> ScoreScale:
    """Return the scale of a scorer's scores, under its name."""
    known = scorer.score_scale if isinstance(scorer, KnownScorer) else ScoreScale()
    return replace(known, scorer=scorer.name)


def saved_scores(folder: Path, scorer: Scorer) -> Path:
    """Return the path, without an ending, of the scores that a scorer saves in a folder. Its description lies beside
    them as JSON.

    The path has a hash of the description, so scores of another scorer of this name are never read or overwritten. If
    there are any, log what differs.
    """
    description = describe_scorer(scorer)
    name = file_name(scorer.name)
    path = folder / f"{name}-{short_hash(description)[:8]}"
    file = path.with_name(f"{path.name}.json")
    if not file.is_file():
        for other in sorted(folder.glob(f"{glob.escape(name)}-{'[0-9a-f]' * 8}.json")):
            differ = listed(differences(read_description(other) or {}, description))
            logger.info(
                "%s are scores of another %s, so images are scored again: %s.", other.stem, scorer.name, differ
            )
        write_description(file, description)
    return path


def file_name(scorer: str) -> str:
    """Return a scorer's name as a file name."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in scorer)


def _code(made_by: Any) -> dict[str, Any]:
    """Describe a function or class: its name, and this package's version or the facts of the file that defines it."""
    made_by = made_by if isinstance(made_by, FunctionType | type) else type(made_by)
    module = inspect.getmodule(made_by)
    described = {"name": f"{made_by.__module__}:{made_by.__qualname__}"}
    if made_by.__module__.startswith(f"{__package__.partition('.')[0]}."):
        return {**described, "version": __version__}
    file = None if module is None else vars(module).get("__file__")
    return {**described, "file": describe_files([Path(file)])} if file and Path(file).is_file() else described


def _described_settings(builder: Callable[..., Scorer], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the settings of a scorer, defaults included, and the folders and Hub ids that they name."""
    bound = inspect.signature(builder).bind(**settings)
    bound.apply_defaults()
    whole = {**bound.arguments, **settings}
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            whole.pop(parameter.name, None)
    used = {key: value for key, value in whole.items() if key not in _SPEED}
    modules = {key: describe_component(value) for key, value in used.items() if isinstance(value, torch.nn.Module)}
    sources = {
        key: describe_source(used[key], revision=used.get("revision"))
        for key in _SOURCES
        if isinstance(used.get(key), str | Path)
    }
    return {"settings": masked({**used, **modules}), "sources": sources}


def hub_file(model: str, name: str, revision: str | None = None) -> Path:
    """Return the path of a model's file, downloaded from the Hub if `model` is not a folder with it."""
    local = Path(model) / name
    return local if local.is_file() else Path(hf_hub_download(model, name, revision=revision))

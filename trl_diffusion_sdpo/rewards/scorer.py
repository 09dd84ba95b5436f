"""Define the interface of scorers and base classes for scorers, and load scorers by name."""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils.memory import clear_device_cache
from huggingface_hub import hf_hub_download
from PIL import Image


class Scorer(Protocol):
    """Interface of a scorer: a callable that scores images for their prompts. Higher scores are better.

    Args:
        images (`Sequence[PIL.Image.Image]`): N images.
        prompts (`Sequence[str]`): N prompts, one for each image.

    Returns:
        `torch.Tensor` of shape `(N,)`: float32 scores on the CPU.
    """

    name: str

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor: ...


class BatchedScorer(ABC):
    """Base class of scorers that score images in batches. A subclass implements `score_batch`.

    Example:

    ```python
    from PIL import ImageStat


    class Brightness(BatchedScorer):
        def score_batch(self, images, prompts):
            return torch.tensor([ImageStat.Stat(image.convert("L")).mean[0] for image in images])

    scores = Brightness("brightness", batch_size=8)(images, prompts)
    ```

    Args:
        name (`str`): Name of the scorer in tables and files. Scorers with different scores need different
            names.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Device of the scorer's model.
        batch_size (`int`, *optional*, defaults to `16`): Number of images per batch.

    Raises:
        `ValueError`: If `batch_size` is below 1. Calling the scorer raises `ValueError` if the numbers of images and
            prompts differ, or if a score is not finite.
    """

    def __init__(self, name: str, *, device: str | torch.device = "cpu", batch_size: int = 16):
        if batch_size < 1:
            raise ValueError(f"`batch_size` of a scorer must be at least 1, got {batch_size}.")
        self.name = name
        self.device = torch.device(device)
        self.batch_size = batch_size

    @abstractmethod
    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        """Return the scores `(N,)` of one batch of N RGB images, where N is at most `batch_size`."""

    def to(self, device: str | torch.device) -> None:
        """Move the scorer's networks to a device."""
        self.device = torch.device(device)
        for part in vars(self).values():
            if isinstance(part, torch.nn.Module | BatchedScorer):
                part.to(self.device)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        if len(images) != len(prompts):
            raise ValueError(
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


class FunctionScorer:
    """A scorer that calls a function. The function takes a list of N images and a list of N prompts and returns N
    numbers.

    Raises:
        `ValueError`: When the scorer is called, if the function does not return one finite score per image.
    """

    def __init__(self, name: str, function: Callable[[list[Image.Image], list[str]], Any]):
        self.name = name
        self.function = function

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        return checked_scores(self.function(list(images), list(prompts)), prompts, self.name)


@contextlib.contextmanager
def on_device(scorer: Scorer, device: str | torch.device) -> Iterator[None]:
    """Return a context manager that moves a scorer from the CPU to a device, and back to the CPU at the end. The scorer
    thus occupies the device's memory only while it scores.

    A scorer that is not on the CPU or is not a [`BatchedScorer`] is not moved.
    """
    device = torch.device(device)
    if not isinstance(scorer, BatchedScorer) or scorer.device.type != "cpu" or device.type == "cpu":
        yield
        return
    try:
        scorer.to(device)
        yield
    finally:
        scorer.to("cpu")
        clear_device_cache()


def checked_scores(scores: Any, prompts: Sequence[str], name: str) -> torch.Tensor:
    """Validate the output of a scorer, and return it as a float32 tensor `(N,)` on the CPU.

    Raises:
        `ValueError`: If the scores are not N numbers, or a score is not finite.
    """
    try:
        scores = torch.as_tensor(scores).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`{name}` must return numbers, got {str(scores)[:200]}. {error}") from error
    if scores.shape != (len(prompts),):
        raise ValueError(
            f"`{name}` must return one score for each image, got shape {tuple(scores.shape)} for {len(prompts)} "
            "images."
        )
    finite = torch.isfinite(scores)
    if not finite.all():
        first = int(finite.int().argmin())
        raise ValueError(
            f"`{name}` must return finite scores, got {scores[first].item()} for the prompt {prompts[first]!r}. Check "
            "this image, or use `dtype=torch.float32`."
        )
    return scores


# Settings that do not change scores. Names of scorers do not contain these settings.
_SPEED = ("device", "batch_size", "url", "timeout", "max_unreadable", "api_key_variable")
_LONGEST_WORD = 40  # characters; in a scorer's name, the value of a longer setting is replaced by a hash

# Name of a scorer -> function or class that builds the scorer, or "module:function", imported on first use.
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
    """Return a decorator that registers a function or class under a name. [`load_scorer`] then calls it to build a
    scorer.

    Raises:
        `ValueError`: If the name is already registered or contains a colon.

    Example:

    ```python
    from trl_diffusion_sdpo.rewards import FunctionScorer, load_scorer, register_scorer


    @register_scorer("corner")
    def corner(**settings):
        return FunctionScorer("corner", lambda images, prompts: [sum(image.getpixel((0, 0))) for image in images])


    scorer = load_scorer("corner")
    ```
    """
    if ":" in name or name in _BUILDERS:
        raise ValueError(
            f"A scorer's name must not be registered yet and must not contain a colon, got {name!r}. Use another."
        )

    def register(builder: Callable[..., Scorer]) -> Callable[..., Scorer]:
        _BUILDERS[name] = builder
        return builder

    return register


def scorer_names() -> list[str]:
    """Return the names of all registered scorers. [`load_scorer`] accepts these names."""
    return sorted(_BUILDERS)


def load_scorer(name: str, **settings: Any) -> Scorer:
    """Return the scorer with a registered name, or the scorer or function with an import path `module:function`.

    Args:
        name (`str`): A name in [`scorer_names`], or the import path `package.module:function` of a scorer or of a
            function that takes a list of images and a list of prompts and returns one number per image.
        settings: Settings of a registered scorer, such as `device`, `batch_size`, `model` and `revision`.

    Raises:
        `ValueError`: If there is no such scorer or function, its settings are wrong, or it cannot be loaded.

    Example:

    ```python
    from trl_diffusion_sdpo.rewards import load_scorer

    scorer = load_scorer("pickscore", device="cuda")
    scores = scorer([image], ["a red circle"])  # (1,)
    ```
    """
    builder = _BUILDERS.get(name)
    if isinstance(builder, str):
        module, _, attribute = builder.partition(":")
        builder = getattr(import_module(f".{module}", __package__), attribute)
    if builder is not None:
        try:
            scorer = builder(**settings)
        except (TypeError, ImportError, OSError) as error:  # wrong settings, a missing library, no download
            raise ValueError(f"The scorer {name!r} cannot be loaded: {error}") from error
        scorer.name += _variant(scorer.name, settings)
        return scorer
    if ":" not in name:
        raise ValueError(
            f"There is no scorer {name!r}. Use one of {', '.join(f'`{known}`' for known in scorer_names())}, or the "
            "import path `module:function` of your own function."
        )
    if settings:
        raise ValueError(
            f"A scorer that is named as `module:function` takes no settings, got {sorted(settings)} for {name!r}. "
            "Leave out the settings."
        )
    module, _, attribute = name.partition(":")
    try:
        function = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"The scorer {name!r} cannot be imported as `module:function`: {error}. Check the name."
        ) from error
    if not callable(function):
        raise ValueError(f"The scorer {name!r} must name a function, got a {type(function).__name__}. Check the name.")
    return function if isinstance(function, (BatchedScorer, FunctionScorer)) else FunctionScorer(name, function)


def _variant(name: str, settings: dict[str, Any]) -> str:
    """Return a suffix for a scorer's name, such as `(revision=v2)`, which lists the settings that change scores.
    Scorers that give different scores thus have different names."""
    words = []
    for key, value in settings.items():
        word = str(value).rstrip("/").split("/")[-1]
        if len(word) > _LONGEST_WORD:
            word = hashlib.sha256(word.encode()).hexdigest()[:8]
        if key not in _SPEED and word not in name:
            words.append(f"{key}={word}")
    return f"({', '.join(words)})" if words else ""


def hub_file(model: str, name: str, revision: str | None = None) -> Path:
    """Return the path of a model's file. If `model` is not a folder with this file, download the file from the Hub."""
    local = Path(model) / name
    return local if local.is_file() else Path(hf_hub_download(model, name, revision=revision))

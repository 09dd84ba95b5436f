"""What a run saved, read back onto its base at any scale: 0 is the base, 1 the tuned weights, between them a mix."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn

from ..losses import loss_spec
from ..losses.preference import LOSS_KWARG_RANGES
from ..models.adapters import base_tensors
from ..models.ema import EMA_FOLDER
from ..trainer.saving import COMPONENT_CONFIGS
from .weights import (
    ALWAYS_BEFORE,
    PEFT_FILE,
    SETUP_FILE,
    fingerprint,
    read_weights,
    remove_local_paths,
    save_weights,
    trained_weights,
    write_setup,
)

logger = logging.getLogger(__name__)

# In which pairs are drawn and measured, so that an evaluation of a saved run is that which the run itself logged.
SETTINGS_OF_EVALUATION = (
    "vae_dtype",
    "resolution",
    "image_interpolation",
    "timestep_range",
    "timesteps",
    "weighting_scheme",
    "logit_mean",
    "logit_std",
    "mode_scale",
    "timestep_weighting",
    "guidance_scale",
    "snr_gamma",
    "noise_offset",
    "input_perturbation",
    "num_noise_bins",
    "seed",
    "data_seed",
)
LOSS_WITH_A_MARGIN = "sigmoid"  # for runs whose own loss reads no reference
_LORA_A, _LORA_B = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")
_NEEDED = ("tuning", "loss_type", "denoiser_class", "weights_before_training")


@dataclass(frozen=True)
class SavedRun:
    """A folder that `save_model` wrote, or a checkpoint.

    Args:
        folder (`Path`): Where it is.
        weights (`Path`): The folder of the weights: the same, or that of their average below it.
        setup (`dict[str, Any]`): What the run wrote about itself.
        lora (`LoraConfig`, *optional*): Of a LoRA's run, to be put on the base; of tuning of all weights `None`.
    """

    folder: Path
    weights: Path
    setup: dict[str, Any]
    lora: LoraConfig | None

    @property
    def of_average(self) -> bool:
        """Whether the weights are the average of the run's."""
        return self.weights != self.folder

    def evaluation_settings(self) -> dict[str, Any]:
        """Arguments under which the trainer measures margins against the base as the run itself did."""
        spec = loss_spec(self.setup["loss_type"])
        names = list(SETTINGS_OF_EVALUATION)
        if spec.needs_reference:
            names += ["loss_type", "beta", *LOSS_KWARG_RANGES]
        stored = {**ALWAYS_BEFORE, **self.setup}
        given = {name: stored[name] for name in names if stored.get(name) is not None}
        return {"loss_type": LOSS_WITH_A_MARGIN, **given, "safeguard": "none"}

    def check_base(self, denoiser: nn.Module) -> None:
        """Raise `ValueError` where a denoiser without adapters does not hold the weights that the run began with."""
        began, here = self.setup["weights_before_training"], fingerprint(base_tensors(denoiser))
        if began != here:
            raise ValueError(
                f"A run is scaled over the base that it began with. {self.folder} began with a "
                f"{self.setup['denoiser_class']} of the fingerprint {began}; this one is a {type(denoiser).__name__} "
                f"of the fingerprint {here}. Pass the run's own base, revision and `dtype`."
            )


def read_run(folder: str | Path, *, average: bool = False) -> SavedRun:
    """Read what a run wrote about itself.

    Args:
        folder (`str` or `Path`): What `save_model` wrote, or a checkpoint.
        average (`bool`): Whether its average of the weights is meant.

    Raises:
        `ValueError`: If there is no such folder, it holds no run, or a LoRA that cannot be scaled.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"The run must be a folder that the trainer saved, and there is no folder {folder}.")
    setup = _read_setup(folder)
    weights = folder / EMA_FOLDER if average else folder
    if not weights.is_dir():
        raise ValueError(
            f"An average of the weights needs the output folder of a run with `ema_decay`; {folder} has no "
            f"{weights.name}. A checkpoint keeps its average in another form."
        )
    lora = None
    if setup["tuning"] == "lora":
        lora = _read_lora_config(weights)
    other = "was a LoRA" if setup.get("reference") == "ref_adapter" else None
    if setup.get("given_reference"):
        other = "was given as `ref_model`"
    if setup.get("sync_ref_model"):
        other = "followed the policy (`sync_ref_model`)"
    if other is not None:
        logger.warning(
            "The run's own reference %s. What follows is measured against, and scaled from, the base as it was before "
            "training, without adapters: where that is another model, numbers differ from those that the run logged.",
            other,
        )
    return SavedRun(folder, weights, setup, lora)


class ScaledWeights:
    """A denoiser's trained weights on the line from its base to what a run made of it.

    The contribution of a LoRA is linear in its factor B, which is scaled alone. All weights are
    `base + scale (tuned - base)`, in float32. Scales above 1 go beyond the tuned weights.

    Args:
        denoiser (`nn.Module`): It holds the base; with a LoRA's run, a fresh LoRA of the same shape on it.
        denoiser_name (`str`): Of the folder of all weights.
        adapter (`str`, *optional*): Name of the LoRA.
        folder (`Path`): What [`save_weights`] wrote.

    Raises:
        `ValueError`: If the folder holds other weights, or some that no scale applies to.
    """

    def __init__(self, denoiser: nn.Module, denoiser_name: str, adapter: str | None, folder: Path):
        self._denoiser, self._adapter = denoiser, adapter
        weights = trained_weights(denoiser, adapter)
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        self.tuned = read_weights(
            folder, denoiser=denoiser, denoiser_name=denoiser_name, adapter=adapter, shapes=shapes
        )
        if adapter is not None:
            _check_linear(self.tuned)
        elif {name: tuple(weight.shape) for name, weight in self.tuned.items()} != shapes:
            raise ValueError(f"{folder / denoiser_name} holds the weights of another architecture than the base's.")
        self.before = {name: weight.detach().cpu().clone() for name, weight in weights.items()}

    @property
    def fingerprint(self) -> str:
        """A short mark of the tuned weights."""
        return fingerprint(self.tuned)

    @contextlib.contextmanager
    def active(self, scale: float) -> Iterator[None]:
        """Have the denoiser hold the weights at a scale, then exactly those that it held before."""
        self._write(functools.partial(self._at, scale))
        try:
            yield
        finally:
            self._write(self.before.__getitem__)

    def _at(self, scale: float, name: str) -> torch.Tensor:
        if self._adapter is not None:
            return scaled_factor(name, self.tuned[name], scale)
        return between(self.before[name], self.tuned[name], scale)

    @torch.no_grad()
    def _write(self, value_of: Callable[[str], torch.Tensor]) -> None:
        for name, weight in trained_weights(self._denoiser, self._adapter).items():
            weight.copy_(value_of(name))


def scaled_factor(name: str, tuned: torch.Tensor, scale: float) -> torch.Tensor:
    """A tensor of a LoRA, by its PEFT name, in the LoRA whose contribution is `scale` times as large."""
    return tuned * scale if _is_one_of(name, _LORA_B) else tuned


def between(base: torch.Tensor, tuned: torch.Tensor, scale: float) -> torch.Tensor:
    """`base + scale (tuned - base)`, exactly `base` at 0 and `tuned` at 1; a tensor of whole numbers is the nearer's.

    Returns:
        `torch.Tensor`: In the dtype of `base`.
    """
    if not base.is_floating_point():
        return base if scale < 0.5 else tuned
    return torch.lerp(base.float(), tuned.float(), scale).to(base.dtype)


def save_scaled(
    folder: Path,
    *,
    run: SavedRun,
    scale: float,
    weights: ScaledWeights,
    pipeline: DiffusionPipeline,
    denoiser_name: str,
    adapter: str | None,
) -> None:
    """Write a run's weights at a scale in the forms in which the run wrote its own, and the scale into the set-up.

    Args:
        folder (`Path`): Where to.
        run ([`SavedRun`]): Whose set-up goes along.
        scale (`float`): Of the weights.
        weights ([`ScaledWeights`]): Of the pipeline's denoiser.
        pipeline (`DiffusionPipeline`): The base; written as well if the run wrote its whole pipeline.
        denoiser_name (`str`): The pipeline's name for the denoiser.
        adapter (`str`, *optional*): Name of the LoRA.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with weights.active(scale):
        save_weights(
            folder,
            pipeline=pipeline,
            denoiser=pipeline.components[denoiser_name],
            denoiser_name=denoiser_name,
            adapter=adapter,
            full_pipeline=adapter is None and (run.folder / "model_index.json").is_file(),
        )
    remove_local_paths([folder / "model_index.json"])
    remove_local_paths(folder / name / file for name in pipeline.components for file in COMPONENT_CONFIGS)
    write_setup(folder, {**run.setup, "scale": scale, "scaled_average": run.of_average})


def check_free_folder(folder: Path, run: SavedRun) -> None:
    """Raise `ValueError` where scaled weights would be written over or between other files than scaled weights."""
    taken = {run.folder.resolve(), run.weights.resolve()}
    if folder.resolve() in taken:
        raise ValueError(f"`baked_dir` must be another folder than the run's, got {folder} for both.")
    if folder.is_dir() and any(folder.iterdir()) and "scale" not in _json(folder / SETUP_FILE):
        raise ValueError(f"`baked_dir` must be new, empty or of earlier scaled weights; {folder} holds other files.")


def _read_setup(folder: Path) -> dict[str, Any]:
    setup = _json(folder / SETUP_FILE)
    missing = [name for name in _NEEDED if name not in setup]
    if missing:
        raise ValueError(
            f"The run must be a folder that the trainer saved, with {SETUP_FILE} in it; that of {folder} is not there "
            f"or lacks {', '.join(missing)}."
        )
    return setup


def _json(file: Path) -> dict[str, Any]:
    """What a file holds; nothing where it is not there or is no JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_lora_config(folder: Path) -> LoraConfig:
    if not (folder / "adapter_config.json").is_file() or not (folder / PEFT_FILE).is_file():
        raise ValueError(f"The run of a LoRA must hold adapter_config.json and {PEFT_FILE}; {folder} does not.")
    config = LoraConfig.from_pretrained(str(folder))
    if config.use_dora:
        raise ValueError(
            "A DoRA cannot be scaled: its magnitudes make it no linear function of the trained weights. Train with "
            "`use_dora=False` to choose a scale afterwards."
        )
    config.init_lora_weights = True  # the stored weights take the place of any start
    config.inference_mode = False
    return config


def _check_linear(weights: dict[str, torch.Tensor]) -> None:
    others = [name for name in weights if not _is_one_of(name, (*_LORA_A, *_LORA_B))]
    if others:
        raise ValueError(
            f"Only factors A and B of a LoRA can be scaled; this one also holds {len(others)} tensors such as "
            f"{others[0]}."
        )


def _is_one_of(name: str, kinds: tuple[str, ...]) -> bool:
    return any(kind in name.split(".") for kind in kinds)

"""Weights of a run at any scale between its base (0) and its result (1)."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from ..losses import LOSS_KWARG_RANGES, interpolate, loss_spec
from ..models.adapters import base_tensors
from ..models.ema import EMA_FOLDER
from .setup import ARGS_FILE, SETUP_FILE, fingerprint, read_setup, write_setup
from .weights import LORA_A, LORA_B, PEFT_CONFIG_FILE, PEFT_FILE, WeightFiles, factor_of

logger = logging.getLogger(__name__)

SUM_SETTINGS = ("loss_weights", "margin_clamp")
LOSS_SETTINGS = ("loss_type", "beta", *SUM_SETTINGS, *LOSS_KWARG_RANGES)
LOSS_WITH_A_MARGIN = "sigmoid"  # measures runs whose loss has no reference
_REQUIRED = ("tuning", "loss_type", "denoiser_class", "weights_before_training")


@dataclass(frozen=True)
class SavedRun:
    """A run that `save_model` wrote, or a checkpoint."""

    folder: Path
    weights: Path  # `folder`, or the folder of the averaged weights in it
    setup: dict[str, Any]  # content of the set-up file
    lora: LoraConfig | None  # configuration of the LoRA; `None` if all weights were tuned

    @property
    def is_average(self) -> bool:
        """Whether the weights are an average over training steps."""
        return self.weights != self.folder

    def evaluation_settings(self, names: Iterable[str]) -> dict[str, Any]:
        """Return settings with which the trainer measures margins against the base as the run did. `names` are the
        settings besides those of the loss."""
        names = [name for name in names if name not in LOSS_SETTINGS]
        terms = {name: self.setup[name] for name in SUM_SETTINGS if self.setup.get(name) is not None}
        if loss_spec(self.setup["loss_type"], **terms).needs_reference:
            names += LOSS_SETTINGS
        stored = {name: self.setup[name] for name in names if self.setup.get(name) is not None}
        return {"loss_type": LOSS_WITH_A_MARGIN, **stored, "safeguard": "none"}

    def check_base(self, denoiser: nn.Module) -> None:
        """Raise `ValueError` if a denoiser without adapters does not hold the weights that the run started from."""
        began, here = self.setup["weights_before_training"], fingerprint(base_tensors(denoiser))
        if began != here:
            raise ValueError(
                f"A run is scaled over the base that it began with. {self.folder} began with a "
                f"{self.setup['denoiser_class']} of the fingerprint {began}; this one is a {type(denoiser).__name__} "
                f"of the fingerprint {here}. Pass the run's own base, revision and `dtype`."
            )


def read_run(folder: str | Path, *, average: bool = False) -> SavedRun:
    """Read a run's set-up and its LoRA configuration.

    Args:
        folder (`str` or `Path`): Output folder of a run, or a checkpoint.
        average (`bool`): Whether to take the averaged weights of `ema_decay`.

    Raises:
        `ValueError`: If the folder does not exist, holds no run, or holds a LoRA that cannot be scaled.
    """
    folder = Path(folder)
    setup = read_setup(folder)
    missing = [name for name in _REQUIRED if name not in setup]
    if missing:
        raise ValueError(
            f"The run must be a folder that the trainer saved. {folder} has no {SETUP_FILE} with {', '.join(missing)}."
        )
    if "scale" in setup:
        raise ValueError(
            f"A run is scaled from the weights that it trained. {folder} holds weights of scale {setup['scale']:g} "
            "already, written by `--bake`. Pass the run's own folder."
        )
    weights = folder / EMA_FOLDER if average else folder
    if not weights.is_dir():
        raise ValueError(
            f"Averaged weights are in the output folder of a run with `ema_decay`, not in its checkpoints; {folder} "
            f"has no {weights.name}."
        )
    _warn_of_other_reference(setup)
    return SavedRun(folder, weights, setup, _read_lora_config(weights) if setup["tuning"] == "lora" else None)


def _warn_of_other_reference(setup: dict[str, Any]) -> None:
    other = "was a LoRA" if setup.get("reference") == "ref_adapter" else None
    if setup.get("given_reference"):
        other = "was given as `ref_model`"
    if setup.get("sync_ref_model"):
        other = "followed the policy (`sync_ref_model`)"
    if other is not None:
        logger.warning(
            "The run's reference %s. Here the reference is the base before training, without adapters, so numbers can "
            "differ from those that the run logged.",
            other,
        )


class ScaledWeights:
    """A denoiser's trained weights at any scale between its base and a run's result.

    A LoRA's contribution is linear in its factor B, so only B is scaled. Fully tuned weights become
    `base + scale (tuned - base)`, in float32. Scales above 1 extrapolate.

    Args:
        files ([`WeightFiles`]): Files of the base denoiser, which has a new LoRA of the run's shape if it tuned one.
        run ([`SavedRun`]): The run.

    Raises:
        `ValueError`: If the run holds other weights, or weights that cannot be scaled.
    """

    def __init__(self, files: WeightFiles, run: SavedRun):
        self._files, self._run = files, run
        self.tuned = files.read(run.weights)
        if run.lora is not None:
            _check_linear(self.tuned)
        elif {name: tuple(weight.shape) for name, weight in self.tuned.items()} != files.shapes:
            raise ValueError(f"{run.weights} holds the weights of another architecture than the base's.")
        self._base = {name: weight.detach().cpu().clone() for name, weight in files.tensors().items()}

    @property
    def fingerprint(self) -> str:
        """A short hash of the tuned weights."""
        return fingerprint(self.tuned)

    @contextlib.contextmanager
    def active(self, scale: float) -> Iterator[None]:
        """Load the weights at a scale into the denoiser. At the end, load exactly the weights that it held before."""
        self._load(functools.partial(self._at, scale))
        try:
            yield
        finally:
            self._load(self._base.__getitem__)

    def save(self, folder: Path, scale: float) -> None:
        """Write the weights at a scale in the formats of the run, with its set-up and the scale. If the run wrote a
        whole pipeline, write the base's other components as well."""
        full_pipeline = self._run.lora is None and (self._run.folder / "model_index.json").is_file()
        with self.active(scale):
            self._files.save(folder, full_pipeline=full_pipeline)
        write_setup(folder, {**self._run.setup, "scale": scale, "scaled_average": self._run.is_average})
        if (self._run.folder / ARGS_FILE).is_file():  # names the run's base
            shutil.copyfile(self._run.folder / ARGS_FILE, folder / ARGS_FILE)

    def _at(self, scale: float, name: str) -> torch.Tensor:
        if self._run.lora is not None:
            return scaled_factor(name, self.tuned[name], scale)
        return interpolate(self._base[name], self.tuned[name], scale)

    @torch.no_grad()
    def _load(self, value_of: Callable[[str], torch.Tensor]) -> None:
        for name, weight in self._files.tensors().items():
            weight.copy_(value_of(name))


def scaled_factor(name: str, tuned: torch.Tensor, scale: float) -> torch.Tensor:
    """Scale a tensor of a LoRA, by its PEFT name, so that the LoRA's contribution is multiplied by `scale`."""
    return tuned * scale if factor_of(name) in LORA_B else tuned


def check_free_folder(folder: Path, run: SavedRun) -> None:
    """Raise `ValueError` if the folder of scaled weights holds other files."""
    if folder.resolve() in {run.folder.resolve(), run.weights.resolve()}:
        raise ValueError(f"`baked_dir` must be another folder than the run's, got {folder} for both.")
    if folder.is_dir() and any(folder.iterdir()) and "scale" not in read_setup(folder):
        raise ValueError(f"`baked_dir` must be new, empty or of earlier scaled weights; {folder} holds other files.")


def _read_lora_config(folder: Path) -> LoraConfig:
    if not (folder / PEFT_CONFIG_FILE).is_file() or not (folder / PEFT_FILE).is_file():
        raise ValueError(f"The run of a LoRA must hold {PEFT_CONFIG_FILE} and {PEFT_FILE}; {folder} does not.")
    config = LoraConfig.from_pretrained(str(folder))
    if config.use_dora:
        raise ValueError(
            "A DoRA cannot be scaled, because its magnitudes make it non-linear in the trained weights. Train with "
            "`use_dora=False` to choose a scale afterwards."
        )
    config.init_lora_weights = True  # overwritten by the stored weights
    config.inference_mode = False
    return config


def _check_linear(weights: dict[str, torch.Tensor]) -> None:
    others = [name for name in weights if factor_of(name) not in (*LORA_A, *LORA_B)]
    if others:
        raise ValueError(
            f"Only factors A and B of a LoRA can be scaled. This LoRA also holds {len(others)} tensors such as "
            f"{others[0]}."
        )

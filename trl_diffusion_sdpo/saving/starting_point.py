"""Finds the pipeline, the denoiser and the LoRA from which a run starts. The output folder of an earlier run, passed as
the model, determines all three."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from ..models.adapters import (
    POLICY_ADAPTER,
    active_adapter,
    adapter_state,
    add_lora,
    base_tensors,
    check_stored_lora,
)
from ..models.ema import EMA_FOLDER
from ..utils._compat import LORA_ADAPTER_METADATA_KEY, loads_lora
from ..utils.errors import UserError
from ..utils.files import json_object
from ..utils.secrets import without_secrets
from .resuming import stored_settings
from .setup import SETUP_FILE, fingerprint, read_setup
from .weights import PEFT_CONFIG_FILE, PEFT_FILE, check_fits, ranks, read_lora, shapes_of, split_key

logger = logging.getLogger(__name__)

# Key of `recorded_base` in `training_args.json` and, if it names no local folder, also in the set-up file.
BASE = "base_model"
LORA_FILE = "pytorch_lora_weights.safetensors"
INDEX_FILE = "model_index.json"
_OPTIONS = ("revision", "variant", "config")  # arguments of `from_pretrained` that change which weights are loaded
_DEFAULTS = {"revision": (None, "main")}  # a recorded value takes precedence over these
_OF_TEXT = ("text_encoder", "lora_te")


@dataclass(frozen=True)
class StartingPoint:
    """Folders, files or Hub ids from which to load a policy: pipeline, denoiser and LoRA."""

    pipeline: str  # Hub id, folder or file of the pipeline
    options: Mapping[str, Any] = field(default_factory=dict)  # arguments with which an earlier run loaded the pipeline
    denoiser: str | None = None  # folder of an earlier run that tuned all weights of the denoiser
    adapter: str | None = None  # folder, file or Hub id of a LoRA on the denoiser

    def with_recorded(self, options: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the arguments with which to load the pipeline. Those in `options`, which the user passed, replace
        those that an earlier run recorded, except default values."""
        chosen = {key: value for key, value in (options or {}).items() if value not in _DEFAULTS.get(key, (None,))}
        return {**(options or {}), **self.options, **chosen}


@dataclass(frozen=True)
class Origin:
    """Model from which a run started."""

    name_or_path: str | None  # Hub id, folder or file of the pipeline; `None` for a pipeline object
    base: dict[str, Any] | None  # result of `recorded_base`
    fingerprint: str  # hash of the denoiser's weights before training
    reference: str  # kind of reference, such as a second adapter
    gave_reference: bool  # whether the user passed a reference model


def starting_point(name_or_path: str | os.PathLike, adapter: str | os.PathLike | None = None) -> StartingPoint:
    """Return from where to load a policy: pipeline, denoiser and LoRA.

    Args:
        name_or_path (`str` or `os.PathLike`): A pipeline, or the weights of an earlier run: its output folder, one of
            its checkpoints, or its folder of averaged weights.
        adapter (`str` or `os.PathLike`, *optional*): A LoRA to train further.

    Raises:
        `ValueError`: If the earlier run did not record its pipeline, that pipeline's folder no longer exists, or both
            arguments name a LoRA.
    """
    folder = Path(name_or_path)
    run = run_of(folder)
    setup = read_setup(run)
    chosen = None if adapter is None else os.fspath(adapter)
    if "tuning" not in setup or (folder / INDEX_FILE).is_file():
        return StartingPoint(os.fspath(name_or_path), adapter=chosen)
    if setup["tuning"] == "full":
        base = _read_base(run, needs_denoiser=False)
        return StartingPoint(base["pipeline"], base["options"], denoiser=str(folder), adapter=chosen)
    if adapter is not None:
        raise UserError(
            f"A policy can have only one LoRA. The run in {folder} trained a LoRA, and `adapter_name_or_path` names "
            f"another: {chosen}. Leave out `adapter_name_or_path`, or pass the base pipeline of that run as the model."
        )
    base = _read_base(run, needs_denoiser=True)
    return StartingPoint(base["pipeline"], base["options"], denoiser=base["denoiser"], adapter=str(folder))


def recorded_base(
    name_or_path: str | None, options: Mapping[str, Any], denoiser_folder: str | None
) -> dict[str, Any] | None:
    """Describe, for the run's files, the model from which a run starts. Paths are absolute. `None` for a pipeline
    object or an address with a secret."""
    if name_or_path is None or without_secrets(name_or_path) != name_or_path:
        return None
    recorded = {key: options[key] for key in _OPTIONS if options.get(key) is not None}
    if "config" in recorded:
        recorded["config"] = _absolute(recorded["config"])
    denoiser = None if denoiser_folder is None else _absolute(denoiser_folder)
    return {"pipeline": _absolute(name_or_path), "options": recorded, "denoiser": denoiser}


def public_base(base: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the result of [`recorded_base`], or `None` if it has a path of this machine."""
    if base is None:
        return None
    names = [base["pipeline"], base["denoiser"], *base["options"].values()]
    return None if any(os.path.isabs(name) for name in names if name is not None) else dict(base)


def attach_adapter(pipeline: DiffusionPipeline, denoiser_name: str, source: str, *, seed: int = 0) -> str:
    """Load a trained LoRA into a pipeline's denoiser.

    Args:
        source (`str`): Folder in PEFT's or diffusers' format, a `.safetensors` file that the pipeline's
            `load_lora_weights` reads, or a Hub id. Of a folder with both formats, PEFT's is read, which has exactly the
            trained weights.
        seed (`int`): Seed of the LoRA's random initialization, which the trained weights replace.

    Returns:
        `str`: Name of the adapter in the denoiser.

    Raises:
        `ValueError`: If `source` has no LoRA, the LoRA does not fit, or the denoiser already has an adapter.
    """
    denoiser = getattr(pipeline, denoiser_name)
    if active_adapter(denoiser) is not None:
        raise UserError(
            f"A policy can have only one LoRA, and the model already has one. Leave out the LoRA {source}."
        )
    path = _download_if_remote(source)
    _warn_of_another_base(denoiser, path)
    try:
        if path.is_dir() and (path / PEFT_CONFIG_FILE).is_file():
            _attach_peft(denoiser, path, seed)
        else:
            _attach_by_pipeline(pipeline, denoiser_name, path / LORA_FILE if path.is_dir() else path)
        name = active_adapter(denoiser)
    except (RuntimeError, LookupError, SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"The LoRA {source} cannot be loaded into a {type(denoiser).__name__}: {error}") from error
    if name is None:
        raise UserError(
            f"A LoRA to train further must have weights for the pipeline's {denoiser_name}, a "
            f"{type(denoiser).__name__}, and {source} has none. Check that it is a LoRA for this model."
        )
    _check_ranks(adapter_state(denoiser, name), source)
    return name


def _check_ranks(weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise `ValueError` if a LoRA's rank is higher than both dimensions of its layer, which adds nothing."""
    for module, rank in ranks(weights).items():
        largest = max(value.numel() // rank for key, value in weights.items() if split_key(key)[0] == module)
        if rank > largest:
            raise UserError(
                f"A LoRA's rank must not be higher than the dimensions of its layer. In {source}, it is {rank} in "
                f"{module}, whose larger dimension is {largest}. Use another LoRA."
            )


def _read_base(run: Path, *, needs_denoiser: bool) -> Any:
    """Return an earlier run's record of the model from which it started.

    Args:
        needs_denoiser (`bool`): Whether the recorded folder of the denoiser must still exist too.

    Raises:
        `ValueError`: If the run recorded no model, or a recorded folder no longer exists.
    """
    base = stored_settings(run).get(BASE) or read_setup(run).get(BASE)
    base = _checked(base) if isinstance(base, dict) else None
    if base is None:
        raise UserError(
            f"The files in {run} do not say from which pipeline the run started. Pass that pipeline as the model. If "
            f"the run trained a LoRA, also pass {run} as `adapter_name_or_path`."
        )
    for path in (base["pipeline"], base["denoiser"] if needs_denoiser else None):
        if path is not None and os.path.isabs(path) and not os.path.exists(path):
            raise UserError(
                f"The run in {run} started from {path}, which no longer exists. If {path} was moved, pass the new path "
                f"as the model. If the run trained a LoRA, also pass {run} as `adapter_name_or_path`."
            )
    return base


def _checked(base: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a record of [`recorded_base`] that was read from a file, or `None` if it cannot be one.

    The file may come from a stranger: options of `from_pretrained` that no run records are dropped.
    """
    pipeline = base.get("pipeline")
    denoiser = base.get("denoiser")
    options = base.get("options") or {}
    if not isinstance(pipeline, str) or not isinstance(denoiser, str | None) or not isinstance(options, dict):
        return None
    options = {name: value for name, value in options.items() if name in _OPTIONS and isinstance(value, str)}
    return {"pipeline": pipeline, "denoiser": denoiser, "options": options}


def run_of(folder: Path) -> Path:
    """Return the folder with a run's set-up file: for the subfolder of averaged weights, the parent."""
    return folder.parent if folder.name == EMA_FOLDER and not (folder / SETUP_FILE).is_file() else folder


def _warn_of_another_base(denoiser: nn.Module, lora: Path) -> None:
    """Warn if a run trained the LoRA on other weights than the denoiser's."""
    setup = read_setup(run_of(lora if lora.is_dir() else lora.parent))
    trained_on = setup.get("weights_before_training") if setup.get("tuning") == "lora" else None
    if trained_on is None or any(weight.is_meta for weight in denoiser.parameters()):  # a plan has no weights
        return
    here = fingerprint(base_tensors(denoiser))
    if here != trained_on:
        logger.warning(
            "The LoRA %s was trained on other weights than those of this %s (fingerprint %s, here %s). Load it on its "
            "own base model, with the same revision, `dtype` and quantization.",
            lora,
            type(denoiser).__name__,
            trained_on,
            here,
        )


def _attach_peft(denoiser: nn.Module, folder: Path, seed: int) -> None:
    file = folder / PEFT_FILE
    if not file.is_file():
        raise UserError(_no_lora(file))
    config, weights = read_lora(folder)
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # the trained weights replace it below
        config.inference_mode = False
    name = add_lora(denoiser, config, (), seed)
    check_fits(shapes_of(adapter_state(denoiser, name)), shapes_of(weights), file)
    if not any(weight.is_meta for weight in denoiser.parameters()):  # a plan has no weights
        set_peft_model_state_dict(denoiser, weights, adapter_name=name)


def _attach_by_pipeline(pipeline: Any, denoiser_name: str, file: Path) -> None:
    """Load a LoRA from a file with the pipeline's `load_lora_weights`."""
    if not loads_lora(type(pipeline)):
        raise UserError(
            f"A {type(pipeline).__name__} has no `load_lora_weights`, so it cannot load {file}. Use a folder in PEFT's "
            f"format, with the file {PEFT_CONFIG_FILE}."
        )
    if not file.is_file() or file.suffix != ".safetensors":
        raise UserError(_no_lora(file))
    with safe_open(file, "pt") as opened:
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        metadata = (opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}")
    of_text = next((key for key in shapes if key.startswith(_OF_TEXT)), None)
    if of_text is not None:
        raise UserError(
            f"The trainer does not tune text encoders, and {file} contains LoRA weights for them, such as {of_text}. "
            "The saved LoRA would not contain them. Fuse the LoRA into the base model, or remove these weights from "
            "the file."
        )
    denoiser = getattr(pipeline, denoiser_name)
    prefix = f"{denoiser_name}."
    try:
        settings = {key.removeprefix(prefix): value for key, value in json_object(metadata).items()}
    except ValueError as error:
        raise UserError(f"The settings in the LoRA {file} cannot be read: {error}. Copy the file again.") from error
    check_stored_lora(settings, shapes, file)
    pipeline.load_lora_weights(
        file.parent, weight_name=file.name, adapter_name=POLICY_ADAPTER, use_safetensors=True, local_files_only=True
    )
    if active_adapter(denoiser) is None or not any(key.startswith(prefix) and ".lora_A." in key for key in shapes):
        return  # another tool's format, whose names diffusers has converted
    # diffusers would ignore tensors without a place, and modules without tensors.
    stored = {key.removeprefix(prefix): shape for key, shape in shapes.items() if not key.endswith(".alpha")}
    check_fits(shapes_of(adapter_state(denoiser, POLICY_ADAPTER)), stored, file)
    described = _described_modules(denoiser, settings)
    absent = described - {layer for layer, _ in map(split_key, stored)}
    if absent:
        raise UserError(
            f"A LoRA must have tensors for each module that its file describes. {file} lacks those of {len(absent)} of "
            f"{len(described)} modules, such as {min(absent)}. Copy the file again."
        )


def _described_modules(denoiser: nn.Module, settings: Mapping[str, Any]) -> set[str]:
    """Return the names of the denoiser's layers that a LoRA with these settings has, or an empty set if more than
    `target_modules` chooses them."""
    targets = settings.get("target_modules")
    others = ("exclude_modules", "layers_to_transform", "target_parameters")
    if not isinstance(targets, list) or any(settings.get(name) for name in others):
        return set()
    endings = tuple(f".{target}" for target in targets)
    layers = (nn.Linear, nn.Conv2d, nn.Embedding, BaseTunerLayer)
    return {
        name for name, layer in denoiser.named_modules() if f".{name}".endswith(endings) and isinstance(layer, layers)
    }


def _no_lora(file: Path) -> str:
    return (
        f"A LoRA must be a folder with {PEFT_CONFIG_FILE} and {PEFT_FILE}, a folder with {LORA_FILE}, or a "
        f".safetensors file. There is no LoRA at {file}. Pickles (.bin, .pt, .ckpt) are never read."
    )


def _download_if_remote(source: str) -> Path:
    """Return the local folder or file of a LoRA, downloaded first if `source` is a Hub id."""
    if os.path.exists(source):
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=[PEFT_CONFIG_FILE, PEFT_FILE, LORA_FILE, SETUP_FILE]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"A LoRA must be a folder, a .safetensors file or a Hub id. No folder or file is named {source}, and it "
            f"cannot be downloaded from the Hub: {error}"
        ) from error


def _absolute(name: str) -> str:
    return os.path.abspath(name) if os.path.exists(name) else name

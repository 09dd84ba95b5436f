"""Load the user's `model` as a pipeline with its model family, and `ref_model` as a denoiser."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import PeftModel
from torch import nn

from ..families import Family, find_family
from ..utils.errors import UserError
from ..utils.import_utils import require
from .adapters import unwrap_peft_model
from .numerics import align_weights, torch_dtype
from .pipelines import as_text_to_image, load_denoiser, load_encoders, load_pipeline
from .single_file import is_single_file

# Entries of `model_init_kwargs` that also apply to the reference: dtype, access to the Hub, kind of files, memory.
SHARED_OPTIONS = (
    "dtype",
    "variant",
    "token",
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "low_cpu_mem_usage",
    "disable_mmap",
)


@dataclass(frozen=True)
class LoadedModel:
    """The model family object, with the pipeline whose denoiser trains, and where it was loaded from."""

    family: Family
    name_or_path: str | None  # Hub id or folder of the pipeline; `None` for a pipeline object without one
    options: dict[str, Any] = field(default_factory=dict)  # arguments of `from_pretrained`
    denoiser_folder: str | None = None  # folder from which the denoiser was loaded, if it is not that of the pipeline
    adapter_source: str | None = None  # folder, file or Hub id of a loaded LoRA that is trained further

    @property
    def pipeline(self) -> DiffusionPipeline:
        return self.family.pipeline

    @property
    def denoiser(self) -> nn.Module:
        return self.family.denoiser

    def load_encoders(self) -> DiffusionPipeline:
        """Load VAE and text encoders from disk, and return a pipeline with these components. `name_or_path` must be
        set."""
        assert self.name_or_path is not None
        return load_encoders(self.family, self.name_or_path, **self.options)

    def whole_pipeline(self) -> DiffusionPipeline:
        """Return the pipeline with all weights. If VAE and text encoders have no weights yet, load them from disk."""
        components = (getattr(self.pipeline, name) for name in self.family.frozen_components)
        return self.load_encoders() if any(is_absent(component) for component in components) else self.pipeline


def load_model(
    model: str | Path | DiffusionPipeline | nn.Module,
    *,
    processing_class: DiffusionPipeline | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    quantization_config: Any = None,
    device: torch.device | None = None,
    encoders: bool = True,
    denoiser: bool = True,
    denoiser_folder: str | None = None,
) -> LoadedModel:
    """Return the user's `model` as a pipeline with its model family, loaded if it is a Hub id or folder.

    Args:
        model (`str`, `Path`, `DiffusionPipeline` or `nn.Module`): A Hub id or folder, a pipeline, or a denoiser. The
            denoiser may be inside a [`~peft.PeftModel`].
        processing_class (`DiffusionPipeline`, *optional*): Pipeline with VAE, text encoders and scheduler for a `model`
            that is a denoiser. It is not changed.
        model_init_kwargs (`dict`, *optional*): Arguments of `from_pretrained` for a Hub id or folder. `dtype` may be a
            string.
        quantization_config (*optional*): Quantization of the denoiser's frozen weights, for a Hub id or folder.
        device (`torch.device`, *optional*): Device on which the denoiser will run. On a CPU, weights are copied if
            their memory is not aligned; see [`align_weights`].
        encoders (`bool`): Whether to load the weights of VAE and text encoders if `model` is a Hub id or folder. See
            [`~trl_diffusion_sdpo.models.pipelines.load_pipeline`].
        denoiser (`bool`): Whether to load the weights of the denoiser if `model` is a Hub id or folder.
        denoiser_folder (`str`, *optional*): Folder of a denoiser that replaces the denoiser in the Hub id or folder.

    Raises:
        `ValueError`: If `model` is of another type, or an argument does not apply to its type.
    """
    loaded = _resolve(
        model,
        processing_class,
        model_init_kwargs,
        quantization_config,
        "model",
        encoders=encoders,
        denoiser=denoiser,
        denoiser_folder=denoiser_folder,
    )
    loaded.family.prepare_denoiser(loaded.denoiser)
    _align_for(loaded.denoiser, device)
    return loaded


def load_reference(
    ref_model: str | Path | DiffusionPipeline | nn.Module,
    policy: LoadedModel,
    *,
    model_init_kwargs: dict[str, Any] | None = None,
    ref_model_init_kwargs: dict[str, Any] | None = None,
    denoiser_folder: str | None = None,
    device: torch.device | None = None,
) -> nn.Module:
    """Return the denoiser of `ref_model`, the only part that is loaded from a Hub id or folder.

    Args:
        policy ([`LoadedModel`]): The policy. Its dtype is the default for the reference, and its pipeline serves a
            `ref_model` that is a denoiser.
        model_init_kwargs (`dict`, *optional*): Arguments of the policy. Those in [`SHARED_OPTIONS`] also apply to a
            reference that is loaded, and `config` if both are single files; `revision` belongs to the policy's
            repository and never does.
        ref_model_init_kwargs (`dict`, *optional*): Arguments that override `model_init_kwargs`, for a Hub id or folder.
        denoiser_folder (`str`, *optional*): Folder of a denoiser that replaces the denoiser in the Hub id or folder.

    Raises:
        `ValueError`: If `ref_model` is of another type, or an argument does not apply to a denoiser.
    """
    if isinstance(ref_model, (str, Path)):
        shared = {key: value for key, value in (model_init_kwargs or {}).items() if key in SHARED_OPTIONS}
        config = policy.options.get("config")  # set only if the policy was loaded from a single file
        if config is not None and is_single_file(os.fspath(ref_model)):
            shared["config"] = config
        options = {**shared, **(ref_model_init_kwargs or {})}
        dtype = options.pop("dtype", None)
        dtype = policy.family.dtype if dtype is None else torch_dtype(dtype)
        denoiser = load_denoiser(ref_model, dtype=dtype, folder=denoiser_folder, **options)
    else:
        denoiser = _resolve(ref_model, policy.pipeline, None, None, "ref_model").denoiser
    policy.family.prepare_denoiser(denoiser)
    _align_for(denoiser, device)
    return denoiser


def _resolve(
    model: Any,
    processing_class: DiffusionPipeline | None,
    model_init_kwargs: dict[str, Any] | None,
    quantization_config: Any,
    role: str,
    **parts: Any,
) -> LoadedModel:
    if processing_class is not None and role == "model" and isinstance(model, (str, Path, DiffusionPipeline)):
        raise UserError(
            "`processing_class` is only for a `model` that is a UNet or transformer. Here `model` is a whole pipeline, "
            f"and `processing_class` a {type(processing_class).__name__}. Leave it out, or put its components into the "
            "pipeline."
        )
    if isinstance(model, (str, Path)):
        options = dict(model_init_kwargs or {})
        options["dtype"] = torch_dtype(options.pop("dtype", None))
        quantization = diffusers_quantization(quantization_config)
        if isinstance(quantization, diffusers.BitsAndBytesConfig):
            require("quantization", "A quantized base")
        pipeline = load_pipeline(str(model), denoiser_quantization=quantization, **parts, **options)
        return LoadedModel(find_family(pipeline), str(model), options, parts.get("denoiser_folder"))
    for name, value in (("model_init_kwargs", model_init_kwargs), ("quantization_config", quantization_config)):
        if value is not None and role == "model":
            raise UserError(
                f"`{name}` only applies if `{role}` is a Hub id or folder, got a {type(model).__name__}. Leave "
                f"`{name}` out."
            )
    if isinstance(model, DiffusionPipeline):
        return LoadedModel(find_family(as_text_to_image(model)), _origin(model))
    if not isinstance(model, (ModelMixin, PeftModel)):
        raise UserError(
            f"`{role}` must be a Hub id, a folder, a diffusers pipeline or its denoiser, got {type(model).__name__}."
        )
    if not isinstance(processing_class, DiffusionPipeline):
        raise UserError(
            f"If `{role}` is a UNet or transformer, `processing_class` must be the pipeline with its VAE, text "
            f"encoders and scheduler, got {type(processing_class).__name__}."
        )
    owner = as_text_to_image(processing_class)
    denoiser = unwrap_peft_model(model)
    pipeline = copy.copy(owner)  # a copy, so that the denoiser in the user's pipeline is not replaced
    denoiser_name = find_family(owner).denoiser_name
    expected = type(getattr(owner, denoiser_name))
    if not isinstance(denoiser, expected):
        raise UserError(
            f"`{role}` must be the {denoiser_name} of `processing_class`, a {expected.__name__}; got a "
            f"{type(denoiser).__name__}."
        )
    pipeline.register_modules(**{denoiser_name: denoiser})
    return LoadedModel(find_family(pipeline), _origin(owner))


def diffusers_quantization(config: Any) -> Any:
    """Convert a `BitsAndBytesConfig` of transformers, such as TRL's `get_quantization_config` returns, to one of
    diffusers. Other values are returned unchanged."""
    counterpart = {"BitsAndBytesConfig": diffusers.BitsAndBytesConfig}.get(type(config).__name__)
    if counterpart is None or isinstance(config, counterpart):
        return config
    return counterpart.from_dict(config.to_dict())


def is_absent(part: nn.Module) -> bool:
    """Return whether a component has no weights, because it was loaded on the meta device."""
    return any(weight.is_meta for weight in part.parameters())


def _align_for(denoiser: nn.Module, device: torch.device | None) -> None:
    """If the denoiser runs on a CPU, align its weights in memory; see [`align_weights`]. Copying weights to an
    accelerator aligns them anyway."""
    if device is not None and device.type == "cpu":
        align_weights(denoiser)


def _origin(pipeline: DiffusionPipeline) -> str | None:
    path = pipeline.config.get("_name_or_path")
    return os.fspath(path) if path else None  # `from_pretrained` may have stored a `Path`

"""Writes the tuned weights in the formats of diffusers and PEFT, and reads them back without loss."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file

from ..models.adapters import NAME, adapter_state, check_stored_lora, lora_scaling
from ..utils._compat import LORA_ADAPTER_METADATA_KEY, loads_lora, pattern_key
from ..utils.errors import UserError
from ..utils.files import json_object
from ..utils.secrets import without_secrets

COMPONENT_CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
LORA_A = ("lora_A", "lora_embedding_A")
LORA_B = ("lora_B", "lora_embedding_B")


class WeightFiles:
    """Reads and writes the weights that a run tunes: a LoRA, or all weights of the denoiser.

    Make it before an engine shards the weights: it records their shapes.

    Args:
        pipeline (`DiffusionPipeline`): Pipeline whose denoiser is tuned.
        denoiser_name (`str`): Attribute of the pipeline that holds the denoiser, such as `"unet"` or `"transformer"`.
        adapter (`str`, *optional*): Name of the LoRA, or `None` if all weights of the denoiser are tuned.
        whole_pipeline (`Callable`, *optional*): Returns the pipeline with text encoders and VAE, to save it whole if
            `pipeline` was loaded without them.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        denoiser_name: str,
        adapter: str | None,
        whole_pipeline: Callable[[], DiffusionPipeline] | None = None,
    ):
        self._pipeline = pipeline
        self._denoiser_name = denoiser_name
        self._adapter = adapter
        self._whole_pipeline = whole_pipeline
        tensors = self.tensors()
        self.shapes = shapes_of(tensors)
        copies = 1 if adapter is None else 2  # a LoRA is written in two formats
        self.bytes_needed = sum(tensor.nbytes for tensor in tensors.values()) * copies  # at least

    @property
    def _denoiser(self) -> ModelMixin:
        return self._pipeline.components[self._denoiser_name]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the LoRA's parameters or, for full tuning, the denoiser's parameters and buffers, not copied."""
        if self._adapter is None:
            return self._denoiser.state_dict(keep_vars=True)
        return adapter_state(self._denoiser, self._adapter)

    def describe(self) -> dict[str, Any]:
        """Return facts about the tuned model for the set-up file: `pipeline_class`, `denoiser_class`, `tuning` and
        `lora`."""
        lora = None
        if self._adapter is not None:
            config = self._denoiser.peft_config[self._adapter]
            names = ("r", "lora_alpha", "target_modules", "use_dora", "use_rslora")
            lora = {name: getattr(config, name) for name in names}
            if not isinstance(config.target_modules, str):
                lora["target_modules"] = sorted(config.target_modules)
        return {
            "pipeline_class": type(self._pipeline).__name__,
            "denoiser_class": type(self._denoiser).__name__,
            "tuning": "full" if lora is None else "lora",
            "lora": lora,
        }

    def save(
        self, folder: Path, weights: dict[str, torch.Tensor] | None = None, *, full_pipeline: bool = False
    ) -> None:
        """Write the LoRA in the formats of diffusers and PEFT or, for full tuning, the denoiser into a subfolder with
        its name.

        Args:
            folder (`Path`): Folder to write into, created if missing.
            weights (`dict[str, torch.Tensor]`, *optional*): Unsharded tensors to write, under the names of
                [`WeightFiles.tensors`]. By default, the model's current ones.
            full_pipeline (`bool`): For full tuning, whether to write the whole pipeline, not only the denoiser.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self._adapter is not None:
            config = self._denoiser.peft_config[self._adapter]
            tensors = self.tensors() if weights is None else weights
            save_adapter(tensors, config, type(self._pipeline), self._denoiser_name, folder)
            return
        pipeline = self._pipeline
        if full_pipeline and self._whole_pipeline is not None:
            pipeline = self._whole_pipeline()
        if weights is not None:
            pipeline = copy.copy(pipeline)
            pipeline.register_modules(**{self._denoiser_name: _with_weights(self._denoiser, weights)})
        if full_pipeline:
            pipeline.save_pretrained(folder, safe_serialization=True)
        else:
            denoiser = pipeline.components[self._denoiser_name]
            denoiser.save_pretrained(folder / self._denoiser_name, safe_serialization=True)
        configs = (folder / name / file for name in self._pipeline.components for file in COMPONENT_CONFIGS)
        _remove_local_paths([folder / "model_index.json", *configs])

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        """Read the weights that [`WeightFiles.save`] wrote. Raise `ValueError` if the folder has none."""
        if self._adapter is not None:
            return read_adapter(self.shapes, folder)
        source = folder / self._denoiser_name
        if not source.is_dir():
            hint = (
                " This checkpoint contains a LoRA. Pass its `peft_config` to resume."
                if (folder / PEFT_FILE).is_file()
                else ""
            )
            raise UserError(
                "To resume full tuning, the checkpoint must contain the folder "
                f"{self._denoiser_name}. {folder} does not.{hint}"
            )
        return type(self._denoiser).from_pretrained(source, use_safetensors=True).state_dict()


def _with_weights(denoiser: ModelMixin, weights: dict[str, torch.Tensor]) -> ModelMixin:
    """Return a second denoiser of the same architecture with these weights, not copied."""
    with init_empty_weights():
        twin = type(denoiser).from_config(denoiser.config)
    twin.load_state_dict(weights, strict=True, assign=True)
    return twin


def save_adapter(
    weights: dict[str, torch.Tensor],
    config: LoraConfig,
    pipeline_class: type[DiffusionPipeline],
    denoiser_name: str,
    folder: Path,
) -> None:
    """Write a LoRA in two formats: a file for [`~peft.PeftModel.from_pretrained`], and a file for
    `pipeline.load_lora_weights` if the pipeline has this method.

    PEFT's file has the weights as they were trained, and the LoRA's scale is in PEFT's configuration. In diffusers'
    file, the scale is already in the weights, because some tools read neither diffusers' metadata nor PEFT's
    configuration. Both files use PEFT's names of tensors: diffusers' conversion to older names loses all layers except
    attention.
    """
    weights = {key: value.detach().contiguous().cpu() for key, value in weights.items()}
    if loads_lora(pipeline_class):
        scaled, plain = folded(weights, config)
        settings = {f"{denoiser_name}.{name}": value for name, value in public_settings(plain).items()}

        def write(tensors: dict[str, torch.Tensor], file: str) -> None:
            # All settings in one metadata entry: safetensors writes several in random order, so an unchanged file would
            # differ and be uploaded again.
            save_file(tensors, file, {LORA_ADAPTER_METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)})

        layers = {f"{denoiser_name}_lora_layers": scaled}
        pipeline_class.save_lora_weights(folder, **layers, save_function=write)
    save_file({PEFT_PREFIX + key: value for key, value in weights.items()}, folder / PEFT_FILE, {"format": "pt"})
    text = json.dumps(public_settings(config), indent=2, sort_keys=True)
    (folder / PEFT_CONFIG_FILE).write_text(text, encoding="utf-8")


def read_adapter(shapes: dict[str, tuple[int, ...]], folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights that [`save_adapter`] wrote. Raise `ValueError` if their shapes differ from `shapes`."""
    file = folder / PEFT_FILE
    if not file.is_file():
        raise UserError(
            f"A checkpoint of a LoRA must contain {PEFT_FILE}, and {folder} does not. If the run tuned all weights, "
            "resume without `peft_config`."
        )
    state = _tensors_of(file)
    check_fits(shapes, shapes_of(state), file)
    return state


def read_lora(folder: Path) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """Read a LoRA in PEFT's format, which may come from a stranger: its configuration, and its tensors by name.

    A regular expression in `target_modules` or `exclude_modules` is never matched: the modules that have tensors
    replace it.

    Raises:
        `ValueError`: If the settings are damaged or not allowed; see [`check_stored_lora`].
    """
    file = folder / PEFT_CONFIG_FILE
    try:
        settings = json_object(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} must contain the settings of a LoRA: {error}. Copy the file again.") from error
    weights = _tensors_of(folder / PEFT_FILE)
    choices = (settings.get("target_modules"), settings.get("exclude_modules"))
    named: dict[str, Any] = {}
    if any(isinstance(choice, str) and not NAME.fullmatch(choice) for choice in choices):
        named = dict.fromkeys(("exclude_modules", "layers_pattern", "layers_to_transform"))
        named["target_modules"] = sorted(ranks(weights))
    check_stored_lora({**settings, **named}, shapes_of(weights), file)
    config = PeftConfig.from_pretrained(str(folder))
    vars(config).update(named)
    return config, weights


def check_fits(shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Raise `ValueError` if a LoRA's tensors in a file, by name and shape, are not those of the model's LoRA."""
    if shapes != stored:
        differing = sorted(set(shapes.items()) ^ set(stored.items()))[:4]
        raise UserError(
            f"A LoRA must fit the model, and {file} is for another architecture or configuration. It has {len(stored)} "
            f"tensors instead of {len(shapes)}. Names and shapes that differ: {differing}. Use the base model and the "
            "`peft_config` of the run that wrote it."
        )


def shapes_of(weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by name."""
    return {key: tuple(value.shape) for key, value in weights.items()}


def _tensors_of(file: Path) -> dict[str, torch.Tensor]:
    return {key.removeprefix(PEFT_PREFIX): value for key, value in load_file(file).items()}


def _remove_local_paths(configs: Iterable[Path]) -> None:
    """Delete `_name_or_path` from saved configurations if it is a local path, which may be private."""
    for file in configs:
        if not file.is_file():
            continue
        config = json.loads(file.read_text(encoding="utf-8"))
        if os.path.exists(str(config.get("_name_or_path", ""))):
            del config["_name_or_path"]
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---- The scale of a LoRA, `lora_alpha / r` ---------------------------------------------------------------------------


def split_key(key: str) -> tuple[str, str]:
    """Split `"blocks.0.to_q.lora_B.weight"` into `("blocks.0.to_q", "lora_B.weight")`."""
    module, _, part = key.rpartition(".lora_")
    return module, f"lora_{part}"


def ranks(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the LoRA's rank in each module. The keys of `weights` are PEFT's names of tensors."""
    first = {split_key(key)[0]: value for key, value in weights.items() if factor_of(key) in LORA_A}
    return {module: value.shape[0] for module, value in first.items()}


def scaling(config: LoraConfig, module: str, rank: int) -> float:
    """Return the factor by which PEFT multiplies a module's LoRA. Its alpha in `alpha_pattern` takes precedence over
    `lora_alpha`."""
    alpha = config.alpha_pattern.get(pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return lora_scaling(alpha, rank, rank_stabilized=config.use_rslora)


def folded(weights: Mapping[str, torch.Tensor], config: LoraConfig) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Multiply each module's scale into factor B of its LoRA.

    The product is exact if the scale is a power of two, as with `r=16, lora_alpha=32`. Otherwise each value is rounded
    once.

    Args:
        weights (`Mapping[str, torch.Tensor]`): PEFT's name of a tensor -> tensor.
        config ([`~peft.LoraConfig`]): Configuration of the LoRA, with the scales.

    Returns:
        `tuple`: New weights, and a configuration in which every alpha equals the rank, so that PEFT applies scale 1.
    """
    scales = {module: scaling(config, module, rank) for module, rank in ranks(weights).items()}
    scaled = {
        key: value * scales[split_key(key)[0]] if factor_of(key) in LORA_B else value for key, value in weights.items()
    }
    plain = copy.deepcopy(config)
    plain.lora_alpha = plain.r
    plain.alpha_pattern = dict(plain.rank_pattern)
    plain.use_rslora = False
    return scaled, plain


def public_settings(config: LoraConfig) -> dict[str, Any]:
    """Return a LoRA's configuration for a published file, in a fixed order and without paths of this machine."""
    settings: dict[str, Any] = {
        name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()
    }
    base = config.base_model_name_or_path
    is_local = base is not None and (os.path.isabs(base) or os.path.exists(base) or base.startswith(("~", ".")))
    if is_local or (base is not None and without_secrets(base) != base):
        settings["base_model_name_or_path"] = None
    return settings


def factor_of(key: str) -> str:
    """Return `"lora_B"` for `"blocks.0.to_q.lora_B.weight"`."""
    return split_key(key)[1].partition(".")[0]

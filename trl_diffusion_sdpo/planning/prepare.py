"""Makes the networks of a planned run on the meta device, by the trainer's own functions."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from PIL import Image
from transformers.training_args import OptimizerNames

from ..engines.engine import Engine as TrainingEngine
from ..families import Family
from ..families.base import refuse_sources
from ..families.single_file import configuration_of
from ..models.ema import EMAWeights
from ..models.frozen_components import working_pipeline
from ..models.loading import LoadedModel
from ..models.numerics import autocast_dtype, torch_dtype
from ..saving.starting_point import StartingPoint, attach_adapter, starting_point
from ..trainer.components import choose_trained_weights, make_reference
from ..trainer.config.complete import check_and_complete, image_sizes, loss_settings
from ..utils._compat import CHECKPOINTING, activation_checkpointing
from .fake_step import FrozenState, PlannedRun
from .plan import Plan, make_plan
from .sharding import Engine
from .skeleton import pipeline_of_folder

if TYPE_CHECKING:
    from trl import ModelConfig

    from ..trainer import DiffusionSDPOConfig


class PlannedSettings:
    """Settings of a run, from which plans are made. Each plan may change some settings.

    Args:
        training (`DiffusionSDPOConfig`): The trainer's settings.
        model (`trl.ModelConfig`): Settings of model, LoRA and quantization.
        engine ([`Engine`]): The engine and its number of processes.
        device (`str`): `"cuda"` or `"cpu"`.
    """

    def __init__(self, training: DiffusionSDPOConfig, model: ModelConfig, engine: Engine, device: str):
        self._training = training
        self._model = model
        self.engine = engine
        self._device = device
        if starting_point(str(model.model_name_or_path), training.adapter_name_or_path).adapter:
            model.use_peft = True  # the run trains an existing LoRA further

    def plan(self, **changes: Any) -> Plan:
        """Return the plan of the run with these settings changed. Raise `ValueError` if settings contradict each
        other."""
        training = copy.copy(self._training)
        model = copy.copy(self._model)
        for name, value in changes.items():
            setattr(model if name in vars(model) else training, name, value)
        return make_plan(prepare(training, model, self.engine), self._device)

    def tunings(self) -> dict[str, dict[str, Any]]:
        """Return the settings to change for LoRA, QLoRA and full tuning, each without and with activation
        checkpointing."""
        half = "bfloat16" if self._training.bf16 or self._training.fp16 else "float32"
        whole = {"load_in_4bit": False, "load_in_8bit": False}
        kinds: dict[str, dict[str, Any]] = {
            "LoRA": {**whole, "use_peft": True, "dtype": half},
            "QLoRA, 4 bits": {**whole, "use_peft": True, "dtype": half, "load_in_4bit": True},
            "full": {**whole, "use_peft": False, "dtype": "float32"},
        }
        return {
            f"{name}{', checkpointing' if saves else ''}": {**changes, CHECKPOINTING: saves}
            for name, changes in kinds.items()
            for saves in (False, True)
        }


def prepare(args: DiffusionSDPOConfig, model_args: ModelConfig, engine: Engine) -> PlannedRun:
    """Make the networks of a run and the settings of its simulated step."""
    from trl import get_peft_config

    stored = _stored(model_args)
    loaded = _loaded(model_args, args)
    family = loaded.family
    reads_sources = type(family).encode_edits is not Family.encode_edits  # the text encoder, beside the prompt
    if reads_sources:
        refuse_sources(family, "A plan")
    spec = args.loss_spec
    other = None if args.ref_model_name_or_path is None else copy.deepcopy(loaded.denoiser)
    lora = get_peft_config(model_args) if loaded.adapter_source is None else None
    adapter, added = choose_trained_weights(loaded, lora, args)
    trains = TrainingEngine(_no_accelerator, lambda: loaded.denoiser)
    reference = make_reference(loaded, other, args, spec, trains, adapter=adapter, added=added)
    average = None if args.ema_decay is None else EMAWeights(loaded.denoiser, adapter, args.ema_decay, trains)
    noise = check_and_complete(args, loaded, spec, adapter=adapter)

    half = autocast_dtype(args.mixed_precision)
    checkpoints, arguments = activation_checkpointing(args)
    height, width = max(image_sizes(args), key=lambda size: size[0] * size[1])  # the largest bucket needs most
    source = None
    if not reads_sources and (family.takes_source or (family.may_take_source and args.sample_sources)):
        pixels = family.source_pixels(Image.new("RGB", (width, height)))
        source = (pixels.shape[-2], pixels.shape[-1])
    frozen: FrozenState = "on device"
    if args.precompute_latents:
        frozen = "absent"
    elif args.offload_frozen_components:
        frozen = "while encoding"
    return PlannedRun(
        _working(loaded.family, args, half),
        reference,
        average,
        noise=noise,
        loss=loss_settings(args),
        resolution=(height, width),
        source=source,
        pairs=args.per_device_train_batch_size,
        autocast=half,
        checkpointing=arguments if checkpoints else None,
        anchor=(args.safeguard_anchor or spec.anchor) if args.safeguard == "parameter" else None,
        low_memory=args.safeguard_low_memory,
        accumulates=args.gradient_accumulation_steps > 1,
        two_prompts=args.dataset_format == "branch_prompts" and args.losers == "data",
        optimizer=OptimizerNames(args.optim).value,
        max_norm=args.max_grad_norm,
        engine=engine,
        frozen=frozen,
        stored=stored,
    )


def _no_accelerator() -> Accelerator:
    raise AssertionError("A plan does not train, so it has no accelerator.")


def _stored(model_args: ModelConfig) -> str | None:
    """Return the storage format of a quantized base model, or `None` if it is not quantized. Raise `ValueError` if a
    quantized base model is tuned without a LoRA."""
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return None
    if not model_args.use_peft:
        raise ValueError(
            "A quantized base needs a LoRA, because quantized weights cannot be trained. Add `--use_peft`."
        )
    if model_args.load_in_8bit:
        return "8bit"
    return "4bit nested" if model_args.use_bnb_nested_quant else "4bit"


def _loaded(model_args: ModelConfig, args: DiffusionSDPOConfig) -> LoadedModel:
    """Return the model on the meta device. If the run trains an existing LoRA further, attach this LoRA."""
    start = starting_point(str(model_args.model_name_or_path), args.adapter_name_or_path)
    family = _family(model_args, args, start)
    if start.adapter is None or not model_args.use_peft:
        return LoadedModel(family, None)
    attach_adapter(family.pipeline, family.denoiser_name, start.adapter)
    return LoadedModel(family, None, adapter_source=start.adapter)


def _family(model_args: ModelConfig, args: DiffusionSDPOConfig, start: StartingPoint) -> Family:
    init: Any = args.model_init_kwargs or {}
    options = start.with_recorded({"revision": model_args.model_revision, "dtype": model_args.dtype, **init})
    dtype = torch_dtype(options.pop("dtype"))
    access = {name: options[name] for name in ("revision", "token", "cache_dir") if name in options}
    return pipeline_of_folder(configuration_of(start.pipeline, options.get("config")), dtype, **access)


def _working(family: Any, args: DiffusionSDPOConfig, half: torch.dtype | None) -> Family:
    """Return the family with VAE and text encoders in the dtypes that they have in training."""
    meta = torch.device("meta")
    working = type(family)(working_pipeline(family, device=meta, half_dtype=half, vae_dtype=args.vae_dtype))
    working.guidance_scale, working.vae_encode_batch_size = args.guidance_scale, args.vae_encode_batch_size
    working.settle_dtype()
    return working

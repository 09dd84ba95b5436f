"""Makes the networks of a planned run on the meta device, with the trainer's own functions."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from PIL import Image

from ...engines.engine import Engine
from ...families import Family
from ...families.base import refuse_sources
from ...models.adapters import lora_config
from ...models.ema import EMAWeights
from ...models.frozen_components import working_pipeline
from ...models.loading import LoadedModel
from ...models.numerics import autocast_dtype, torch_dtype
from ...models.single_file import configuration_of
from ...saving.starting_point import starting_point
from ...trainer.components import choose_trained_weights, make_reference
from ...trainer.config.complete import check_and_complete
from ...utils._compat import CHECKPOINTING
from ...utils.errors import UserError
from .fake_step import PlannedRun, largest_size
from .plan import Plan, make_plan
from .planned_engine import PlannedEngine
from .skeleton import pipeline_of_folder

if TYPE_CHECKING:
    from trl import ModelConfig

    from ...trainer import DiffusionSDPOConfig


@dataclass(frozen=True)
class PlannedSettings:
    """Settings of a run to plan, some of which each plan may change."""

    training: DiffusionSDPOConfig
    model: ModelConfig
    engine: PlannedEngine
    device: str  # "cuda" or "cpu"

    def plan(self, **changes: Any) -> Plan:
        """Return the plan of the run with `changes` to the settings. Raise `ValueError` if they contradict each
        other."""
        training = copy.copy(self.training)
        model = copy.copy(self.model)
        if starting_point(str(model.model_name_or_path), training.adapter_name_or_path).adapter:
            model.use_peft = True  # the run trains an existing LoRA, the plan a new one
        for name, value in changes.items():
            setattr(model if name in vars(model) else training, name, value)
        return make_plan(prepare(training, model, self.engine), self.device)

    def plans(self) -> dict[str, Plan]:
        """Return the plan of these settings, and plans of LoRA, QLoRA and full tuning, each with and without activation
        checkpointing."""
        half = "bfloat16" if self.training.bf16 or self.training.fp16 else "float32"
        whole = {"load_in_4bit": False, "load_in_8bit": False}
        kinds: dict[str, dict[str, Any]] = {
            "LoRA": {**whole, "use_peft": True, "dtype": half},
            "QLoRA, 4 bits": {**whole, "use_peft": True, "dtype": half, "load_in_4bit": True},
            "full": {**whole, "use_peft": False, "dtype": "float32"},
        }
        plans = {"your settings": self.plan()}
        for name, changes in kinds.items():
            plans[name] = self.plan(**changes, **{CHECKPOINTING: False})
            plans[f"{name}, checkpointing"] = self.plan(**changes, **{CHECKPOINTING: True})
        return plans


def prepare(args: DiffusionSDPOConfig, model_args: ModelConfig, engine: PlannedEngine) -> PlannedRun:
    """Make the networks of a run and the settings for simulating one of its steps."""
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not model_args.use_peft:
        raise UserError(
            "A quantized base needs a LoRA, because quantized weights cannot be trained. Add `--use_peft`."
        )
    family = _family(model_args, args)
    loaded = LoadedModel(family, None)
    reads_sources = type(family).encode_edits is not Family.encode_edits  # text encoders read source images
    if reads_sources:
        refuse_sources(family, "A plan")
    spec = args.loss_spec
    other = None if args.ref_model_name_or_path is None else copy.deepcopy(loaded.denoiser)
    adapter, added = choose_trained_weights(loaded, lora_config(model_args), args)
    trains = Engine(_no_accelerator, lambda: loaded.denoiser)
    reference = make_reference(loaded, other, args, spec, trains, adapter=adapter, added=added)
    average = None if args.ema_decay is None else EMAWeights(loaded.denoiser, adapter, args.ema_decay, trains)
    noise = check_and_complete(args, loaded, spec, adapter=adapter)

    source = None
    if not reads_sources and (family.takes_source or (family.may_take_source and args.sample_sources)):
        height, width = largest_size(args)
        pixels = family.source_pixels(Image.new("RGB", (width, height)))
        source = (pixels.shape[-2], pixels.shape[-1])
    return PlannedRun(
        _working(family, args),
        reference,
        average,
        args,
        noise,
        engine,
        source=source,
        stored="4bit" if model_args.load_in_4bit else "8bit" if model_args.load_in_8bit else None,
    )


def _no_accelerator() -> Accelerator:
    raise AssertionError("A plan does not train, so it has no accelerator.")


def _family(model_args: ModelConfig, args: DiffusionSDPOConfig) -> Family:
    start = starting_point(str(model_args.model_name_or_path), args.adapter_name_or_path)
    init: Any = args.model_init_kwargs or {}
    options = start.with_recorded({"revision": model_args.model_revision, "dtype": model_args.dtype, **init})
    dtype = torch_dtype(options.pop("dtype"))
    access = {name: options[name] for name in ("revision", "token", "cache_dir") if name in options}
    return pipeline_of_folder(configuration_of(start.pipeline, options.get("config")), dtype, **access)


def _working(family: Any, args: DiffusionSDPOConfig) -> Family:
    """Return the family of a copy of the pipeline with VAE and text encoders in the dtypes of training."""
    half = autocast_dtype(args.mixed_precision)
    pipeline = working_pipeline(family, device=torch.device("meta"), half_dtype=half, vae_dtype=args.vae_dtype)
    working = type(family)(pipeline)
    working.guidance_scale = args.guidance_scale
    working.vae_encode_batch_size = args.vae_encode_batch_size
    working.settle_dtype()
    return working

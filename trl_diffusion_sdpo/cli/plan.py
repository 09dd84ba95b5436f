"""`trl-diffusion-sdpo plan`: what a run needs, before anything is loaded."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..utils.hints import did_you_mean
from . import EXIT_OK, launch
from .options import OneLineParser

if TYPE_CHECKING:
    from trl import ModelConfig

    from ..models.loading import LoadedModel
    from ..planning.layouts import Layout
    from ..planning.plan import Plan, Prepared
    from ..saving.starting_point import StartingPoint
    from ..trainer import DiffusionSDPOConfig


def make_parser(prog: str | None = None) -> OneLineParser:
    """The command's own options; all others are those of `train`."""
    parser = OneLineParser(
        prog=prog,
        usage="%(prog)s (--model_name_or_path ID | --like NAME) [--config FILE.yaml] [--OPTION VALUE ...]",
        description="Compute the memory, the disk and the FLOPs of a run without loading its weights: the options are "
        "those of `train`, and these. Nothing is measured, and no device is needed.",
    )
    parser.add_argument("--like", help="a published size: sd15, sdxl, sd35-medium, flux-dev and others")
    parser.add_argument("--plan_device", choices=["cuda", "cpu"], default="cuda", help="device to plan for")
    parser.add_argument(
        "--fit", type=float, default=24.0, help="GB of the card that the advice is to fit (default: 24)"
    )
    parser.add_argument("--no_advice", action="store_true", help="plan these settings only, no changes")
    parser.add_argument("--plan_pairs", type=int, default=100_000, help="pairs of which the hours are computed")
    parser.add_argument("--peak_tflops", type=float, default=312.0, help="of the device (default: 312, A100 in bf16)")
    parser.add_argument("--utilisation", type=float, default=0.35, help="share of it that training reaches")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--chart", type=Path, help="file for a bar chart, PNG")
    return parser


def run(arguments: list[str], prog: str) -> int:
    own, words = make_parser(prog).parse_known_args(arguments)
    if own.like is not None:
        words += ["--model_name_or_path", f"published/{own.like}"]
    _check_like(own.like)
    from ..planning.plan import Planner  # takes seconds

    with _without_warnings():  # what `train` says of its choices, once for every set-up that is planned
        settings = PlannedSettings(words, prog, own.plan_device, own.like)
        planner = Planner(own.plan_device)
        plan = settings.plan(planner, {})
        _show(plan, own, settings, planner)
    return EXIT_OK


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class PlannedSettings:
    """The settings of a run, from the words of `train`.

    Args:
        device (`str`): Device to plan for; it decides on bf16 where neither `bf16` nor `fp16` is given.
        like (`str`, *optional*): A published size in place of a model.
    """

    def __init__(self, words: list[str], prog: str, device: str, like: str | None):
        from ..engines.engine_settings import by_engine
        from ..saving.starting_point import starting_point
        from . import train
        from .planned_layout import layout_of

        file = launch.read_file(words)
        given = {launch.option_of(word) for word in words} | set(file)
        words = [*words, "--use_cpu", "true"]  # nothing is put onto a device
        if device != "cpu" and not given & {"bf16", "fp16", "no_bf16"}:
            words += ["--bf16", "true"]
        engine: dict[str, Any] = {}
        for name in (launch.OPTION, "deepspeed", "num_processes"):
            value, rest = launch.take_option(words, name)
            engine[name] = file.get(name) if value is None else value
            words = words if name == launch.OPTION else rest  # `train` would start the engine
        self._like, self._layout = like, layout_of(*engine.values())
        _, self._training, self._model = train.parse(words, prog)
        if engine["deepspeed"] is None and by_engine(self._training):
            raise ValueError(
                f"A plan takes FSDP from `--{launch.OPTION} fsdp2`, or from a file of accelerate with "
                "`distributed_type: FSDP`, got `--fsdp`. Pass one of the former instead, with `--num_processes`."
            )
        if not self._model.model_name_or_path:
            raise ValueError("`--model_name_or_path` must be the Hub id or folder of a diffusers pipeline, got none.")
        if starting_point(self._model.model_name_or_path, self._training.adapter_name_or_path).adapter:
            self._model.use_peft = True  # a LoRA that goes on

    @property
    def values(self) -> dict[str, Any]:
        """All settings by name."""
        engine = {"accelerate_config": self._layout.name, "num_processes": self.processes}
        return {**vars(self._model), **vars(self._training), **engine}

    def plan(self, planner: Any, changes: dict[str, Any]) -> Plan:
        """The plan with some settings changed; `ValueError` where they cannot act together."""
        return planner.plan(self.prepared(changes))

    def prepared(self, changes: dict[str, Any]) -> Prepared:
        """The set-up with some settings changed."""
        from .planned_layout import layout_of

        training, model = copy.copy(self._training), copy.copy(self._model)
        layout = self._layout
        if "num_processes" in changes:
            layout = layout_of(changes["accelerate_config"], None, changes["num_processes"])
        for name, value in changes.items():
            if name not in ("num_processes", "accelerate_config"):
                setattr(model if name in vars(model) else training, name, value)
        layout = dataclasses.replace(layout, half=bool(training.bf16 or training.fp16))
        return prepare(training, model, layout, self._like)

    @property
    def processes(self) -> int:
        """That share the model."""
        return self._layout.processes


def prepare(args: DiffusionSDPOConfig, model_args: ModelConfig, layout: Layout, like: str | None) -> Prepared:
    """A set-up on the meta device, made by the trainer's own functions."""
    from transformers.training_args import OptimizerNames
    from trl import get_peft_config

    from ..models.ema import EMAWeights
    from ..models.numerics import autocast_dtype
    from ..planning.fake_step import Networks
    from ..planning.plan import Prepared
    from ..trainer.preparing import check_and_complete, choose_trained_weights, make_reference

    quantized = _stored(model_args)
    loaded, spec = _loaded(model_args, args, like), args.loss_spec
    given = None if args.ref_model_name_or_path is None else copy.deepcopy(loaded.denoiser)
    lora = get_peft_config(model_args) if loaded.adapter_source is None else None
    adapter, added = choose_trained_weights(loaded, lora, args)
    half = autocast_dtype(args.mixed_precision)
    reference = make_reference(loaded, given, args, spec, adapter=adapter, added=added)
    _check_acting(args, layout)
    average = None if args.ema_decay is None else EMAWeights(loaded.denoiser, adapter, args.ema_decay)
    noise = check_and_complete(args, loaded, spec, adapter=adapter)
    networks = Networks(_working(loaded.family, args, half), reference, average)
    step = _step_settings(args, noise, half, layout)
    frozen = "while encoding" if args.offload_frozen_components else "on device"
    return Prepared(
        networks,
        step,
        OptimizerNames(args.optim).value,
        args.max_grad_norm,
        layout,
        frozen=cast(Any, "absent" if args.precompute_latents else frozen),
        stored=quantized,
        checkpoints=args.save_total_limit or 1,
        variants=args.latent_crops if args.random_crop else 1 + args.random_flip,
        draws=args.ref_noise_draws,
    )


def _check_acting(args: DiffusionSDPOConfig, layout: Layout) -> None:
    """Raise `ValueError` where the trainer would refuse settings under this engine."""
    if args.safeguard == "parameter" and layout.offloads_optimizer:
        raise ValueError(
            f"`safeguard='parameter'` cannot act where {layout.name} has gradients on the CPU, before the two branches "
            "can be told apart. Leave the offloading out, or use `safeguard='output'`."
        )


def _stored(model_args: ModelConfig) -> str | None:
    """How a quantized base is held; `ValueError` without a LoRA."""
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return None
    if not model_args.use_peft:
        raise ValueError("A quantized base needs a LoRA: quantized weights cannot be trained. Add `--use_peft`.")
    if model_args.load_in_8bit:
        return "8bit"
    return "4bit nested" if model_args.use_bnb_nested_quant else "4bit"


def _loaded(model_args: ModelConfig, args: DiffusionSDPOConfig, like: str | None) -> LoadedModel:
    """The model, with the LoRA that it goes on from unless all weights are planned to train."""
    from ..models.loading import LoadedModel
    from ..saving.starting_point import attach_adapter, starting_point

    start = starting_point(str(model_args.model_name_or_path), args.adapter_name_or_path)
    family = _family(model_args, args, like, start)
    if start.adapter is None or not model_args.use_peft:
        return LoadedModel(family, None)
    attach_adapter(family.pipeline, family.denoiser_name, start.adapter)
    return LoadedModel(family, None, adapter_source=start.adapter)


def _family(model_args: ModelConfig, args: DiffusionSDPOConfig, like: str | None, start: StartingPoint) -> Any:
    from ..families.single_file import configuration_of
    from ..models.numerics import torch_dtype
    from ..planning.skeleton import pipeline_of_folder, published_pipeline

    given = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    options = start.with_recorded({**given, **cast(Any, args.model_init_kwargs or {})})
    dtype = torch_dtype(options.pop("dtype"))
    if like is not None:
        return published_pipeline(like, dtype)
    access = {name: options[name] for name in ("revision", "token", "cache_dir") if name in options}
    return pipeline_of_folder(configuration_of(start.pipeline, options.get("config")), dtype, **access)


def _working(family: Any, args: DiffusionSDPOConfig, half: Any) -> Any:
    """The family with VAE and text encoders in the precision in which they run."""
    import torch

    from ..models.frozen_components import working_pipeline

    device = torch.device("meta")
    working = type(family)(working_pipeline(family, device=device, half_dtype=half, vae_dtype=args.vae_dtype))
    working.guidance_scale, working.vae_encode_batch_size = args.guidance_scale, args.vae_encode_batch_size
    working.settle_dtype()
    return working


def _step_settings(args: DiffusionSDPOConfig, noise: Any, half: Any, layout: Layout) -> Any:
    from ..planning.fake_step import StepSettings
    from ..trainer.preparing import image_sizes, loss_settings
    from ..utils._compat import activation_checkpointing

    checkpoints, arguments = activation_checkpointing(args)
    anchor = args.safeguard_anchor or args.loss_spec.anchor
    by_branch, accumulates = args.safeguard == "parameter", args.gradient_accumulation_steps > 1
    # FSDP2 leaves gradients whole until the last micro-batch, except those of branches.
    whole = not layout.shards_gradients or (layout.name == "fsdp2" and accumulates and not by_branch)
    return StepSettings(
        noise=noise,
        loss=loss_settings(args),
        resolution=max(image_sizes(args), key=lambda size: size[0] * size[1]),  # of buckets, the largest
        pairs=args.per_device_train_batch_size,
        autocast=half,
        checkpointing=arguments if checkpoints else None,
        anchor=anchor if by_branch else None,
        low_memory=args.safeguard_low_memory,
        accumulates=accumulates,
        rounds_weights=layout.rounds,
        shards=1 if whole else layout.processes,
        shard_dtype=layout.gradient_dtype(by_branch=by_branch),
        two_prompts=args.dataset_format == "branch_prompts" and args.losers == "data",
    )


def _check_like(name: str | None) -> None:
    from ..planning.published import PIPELINES

    if name is not None and name not in PIPELINES:
        near = did_you_mean(name, PIPELINES)
        raise ValueError(f"`--like` must be one of {', '.join(PIPELINES)}; got {name!r}.{near}")


def _show(plan: Plan, own: Any, settings: PlannedSettings, planner: Any) -> None:
    from ..planning import advice, report

    facts = {"peak_flops": own.peak_tflops * 1e12, "utilisation": own.utilisation, "pairs": own.plan_pairs}
    print(report.report(plan, **facts, processes=settings.processes))
    found: list[advice.Advice] = []
    fit = None
    if not own.no_advice:
        replan = functools.partial(settings.plan, planner)
        tunings = {name: replan(changes) for name, changes in _tunings(settings.values).items()}
        print(f"\n{report.side_by_side(tunings)}")
        found = advice.advise(plan, settings.values, replan)
        print(f"\n{report.advice_table(plan, found)}")
        if not plan.fits(own.fit):
            fit = advice.first_fit(found, own.fit, replan)
            print(f"\n{_fit_in_words(fit, own.fit, advice.most_processes(found))}")
    if own.json is not None:
        data = report.as_json(plan) | {"advice": [{"options": one.changes, "peak": one.plan.peak} for one in found]}
        data["first_fit"] = None if fit is None else {"options": fit.changes, "peak": fit.plan.peak}
        own.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if own.chart is not None:
        report.chart(plan, own.chart)


def _tunings(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """LoRA, QLoRA and full tuning, in the precisions that each is used with."""
    half = "bfloat16" if values["bf16"] or values["fp16"] else "float32"
    lora = {"use_peft": True, "dtype": half, "load_in_8bit": False}
    full = {"use_peft": False, "dtype": "float32", "load_in_4bit": False, "load_in_8bit": False}
    quantized = lora | {"load_in_4bit": True}
    return {"LoRA": lora | {"load_in_4bit": False}, "QLoRA, 4 bits": quantized, "full": full}


def _fit_in_words(fit: Any, gigabytes: float, processes: int | None) -> str:
    from ..planning.report import GIB, options

    if fit is None:
        return (
            f"No combination of these fits {gigabytes:g} GB{f', on {processes} devices neither' if processes else ''}."
        )
    return f"Fits {gigabytes:g} GB, at {fit.plan.peak / GIB:.2f} GiB, with:\n  {options(fit.changes)}"

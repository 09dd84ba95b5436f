"""The callbacks that a trainer brings along."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback

from ..data.pairs import PreferenceDataset
from ..engines import sharding
from ..evaluation.verdict import VerdictCallback
from ..models.ema import EMACallback
from ..step.parameter_safeguard import MeasureStepCallback
from ..step.winner_budget import WinnerBudgetCallback
from .callbacks import EpochCallback, NoiseBinPlotCallback, SampleImagesCallback, SyncReferenceCallback
from .data_preparation import PREPARED, DataReportCallback
from .run_control import SayNothingIsLeft

if TYPE_CHECKING:
    from .diffusion_sdpo_config import DiffusionSDPOConfig
    from .diffusion_sdpo_trainer import DiffusionSDPOTrainer


def default_callbacks(
    trainer: DiffusionSDPOTrainer, args: DiffusionSDPOConfig, train_dataset: Dataset | IterableDataset | None
) -> list[TrainerCallback]:
    """Those that the settings call for, in the order in which they act."""
    callbacks: list[TrainerCallback] = [SayNothingIsLeft()]
    if isinstance(train_dataset, PreferenceDataset):
        callbacks.append(EpochCallback(train_dataset))
    if isinstance(train_dataset, PREPARED):
        callbacks.append(DataReportCallback(train_dataset))
    if args.safeguard_diagnostics_steps is not None:
        callbacks.append(MeasureStepCallback(trainer))
    if trainer.average is not None:
        callbacks.append(EMACallback(trainer.average))
    if args.winner_budget is not None:
        callbacks.append(WinnerBudgetCallback(trainer))
    if args.sync_ref_model:
        callbacks.append(
            SyncReferenceCallback(trainer.reference, args.ref_model_mixup_alpha, args.ref_model_sync_steps)
        )
    if args.sample_prompts:
        callbacks.append(_sample_images(trainer, args))
    if args.eval_strategy != "no":
        callbacks.append(NoiseBinPlotCallback())
    return [*callbacks, VerdictCallback(trainer)]


def _sample_images(trainer: DiffusionSDPOTrainer, args: DiffusionSDPOConfig) -> SampleImagesCallback:
    return SampleImagesCallback(
        trainer.family.pipeline,
        args.sample_prompts,
        every_n_steps=args.sample_steps,
        num_inference_steps=args.sample_inference_steps,
        call_options=trainer.family.generation_kwargs(args.sample_guidance_scale),
        seed=args.seed,
        resolution=args.resolution,
        denoiser_name=trainer.family.denoiser_name,
        every_process=sharding.by_engine(args),
    )

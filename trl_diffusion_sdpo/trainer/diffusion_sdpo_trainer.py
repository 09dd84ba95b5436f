"""The trainer: one batch walks from images to a safeguarded loss; everything else is transformers' Trainer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from peft import PeftConfig
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalPrediction

from .._compat import compile_with_eager_rounding
from ..artifacts.weights import fingerprint, trained_weights
from ..data.collator import PreferenceCollator
from ..data.transforms import pixels_as_floats
from ..engines import sharding
from ..engines.batch_loaders import BatchLoaders, choose_workers
from ..losses import PreferenceLossOutput, diffusion_preference_loss, loss_spec
from ..models.adapters import active_adapter, add_lora, base_tensors, check_adapter_weight, train_only_adapter
from ..models.denoiser_wrapper import DenoiserWrapper
from ..models.ema import EMAWeights
from ..models.frozen_components import working_family
from ..models.loading import LoadedModel, load_model, load_reference
from ..models.reference import Reference, build_reference
from ..step.finite_check import FiniteCheck
from ..step.meters import MetricMeter, NoiseBinMeter
from ..step.noisy_batch import NoisyBatch
from ..step.parameter_safeguard import BranchTrainingMixin
from ..step.winner_budget import WinnerBudget, WinnerBudgetMixin
from .config_checks import check_activation_checkpointing, check_without_dropout
from .data_preparation import DataLoadingMixin, check_batches
from .default_callbacks import default_callbacks
from .diffusion_sdpo_config import DiffusionSDPOConfig
from .evaluating import EvaluationMixin
from .preparing import (
    autocast_dtype,
    check_guidance,
    check_noise_range,
    check_precision,
    check_resolution,
    checked_timesteps,
    complete_args,
    copy_and_check_args,
    disable_dropout,
)
from .publishing import PublishingMixin

logger = logging.getLogger(__name__)

VAE_SEED_MASK = 0x5DEECE66D  # sets the seed of a pair's encoding apart from that of its noise


class DiffusionSDPOTrainer(
    BranchTrainingMixin, WinnerBudgetMixin, EvaluationMixin, DataLoadingMixin, PublishingMixin, Trainer
):
    r"""
    Trainer for preference tuning of text-to-image diffusion models with Diffusion-SDPO and its relatives.

    Example:

    ```python
    from datasets import load_dataset
    from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer

    trainer = DiffusionSDPOTrainer(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        None,
        DiffusionSDPOConfig(output_dir="sd15-sdpo", max_steps=2000),
        load_dataset("my/preferences", split="train"),
    )
    trainer.train()
    trainer.push_to_hub()
    ```

    Args:
        model (`str`, `DiffusionPipeline` or `nn.Module`): A Hub id or folder of a diffusers pipeline, a pipeline, or a
            denoiser (UNet, transformer, or a [`~peft.PeftModel`] around one) with `processing_class`.
        ref_model (`str`, `DiffusionPipeline` or `nn.Module`, *optional*): The reference, of the same kinds. `None`
            takes the policy as it is before training: switched-off adapter, second adapter or frozen copy.
        args ([`DiffusionSDPOConfig`], *optional*): Settings; left as they are, a copy is completed.
        train_dataset (`datasets.Dataset`, `datasets.IterableDataset`, `torch.utils.data.Dataset` or `list`,
            *optional*): Preference pairs in a known format.
        eval_dataset (the same, or a `dict` of them, *optional*): Pairs for evaluation, at fixed noise and timesteps.
        processing_class (`DiffusionPipeline`, *optional*): The pipeline that owns a bare denoiser's VAE, text encoders
            and scheduler.
        data_collator (`Callable`, *optional*): [`~trl_diffusion_sdpo.data.collator.PreferenceCollator`] if unset.
        compute_metrics (`Callable`, *optional*): Receives an `EvalPrediction` with `predictions` of shape
            `(pairs, 2)`, the rewards of chosen and rejected, and `label_ids` of zeros; returns a dictionary of metrics.
        callbacks (`list[TrainerCallback]`, *optional*): Beside the trainer's own.
        optimizers (`tuple`, *optional*): Optimizer and scheduler, in place of those that `args` describe.
        peft_config ([`~peft.LoraConfig`], *optional*): Tunes a LoRA instead of all weights. Without `target_modules`,
            those of the family's own scripts.
        quantization_config (*optional*): How a frozen base's weights are held, such as
            `diffusers.BitsAndBytesConfig(load_in_4bit=True)`; with `peft_config` only.

    Raises:
        `ValueError`: On models, data and settings that cannot act together; each message says what can.
    """

    _tag_names = ["trl-diffusion-sdpo", "diffusion-sdpo"]
    _name = "Diffusion-SDPO"
    _paper = {
        "title": "Diffusion-SDPO: Safeguarded Direct Preference Optimization for Diffusion Models",
        "id": "2511.03317",
    }

    def __init__(
        self,
        model: str | Path | DiffusionPipeline | nn.Module,
        ref_model: str | Path | DiffusionPipeline | nn.Module | None = None,
        args: DiffusionSDPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        processing_class: DiffusionPipeline | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
    ):
        args = copy_and_check_args(model, ref_model, args)
        if quantization_config is not None and peft_config is None:
            raise ValueError(
                "`quantization_config` needs `peft_config`: quantized weights cannot be trained. Pass a `LoraConfig`, "
                "or leave the quantization out."
            )
        with sharding.loading_unsharded(args):
            loaded = load_model(
                model,
                processing_class=processing_class,
                model_init_kwargs=args.model_init_kwargs,
                quantization_config=quantization_config,
                device=args.device,
            )
        self._set_up(loaded, ref_model, args, peft_config)
        train_dataset = self._prepare(train_dataset, args, name="train", training=True)
        eval_dataset = self._prepare_eval(eval_dataset, args)
        check_batches(train_dataset, args)
        workers_are_open = args.dataloader_num_workers is None
        if reason := choose_workers(args, train_dataset, evaluates=eval_dataset is not None):
            logger.warning("Chosen: dataloader_num_workers=%d (%s).", args.dataloader_num_workers, reason)
        super().__init__(
            model=DenoiserWrapper(loaded.denoiser),
            args=args,
            data_collator=PreferenceCollator() if data_collator is None else data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.pipeline,
            compute_metrics=compute_metrics,
            callbacks=[*default_callbacks(self, args, train_dataset), *(callbacks or [])],
            optimizers=optimizers,
        )
        self.loss_is_scaled_for_ga = False  # a mean over pairs, to be divided by the accumulation steps
        self._loaders = BatchLoaders(self.args, self.accelerator, workers_are_chosen=workers_are_open)
        sharding.check_engine(self.accelerator)
        for kept in self._shadow_weights:
            kept.accelerator = self.accelerator

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or transformer that trains, adapters included."""
        return self.family.denoiser

    # ---- One batch, walking ---------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, PreferenceLossOutput]:
        """Loss of a batch of B pairs, a scalar; with `return_outputs` also what came with it."""
        batch, model_pred, ref_pred = self._predict_pairs(model, inputs)
        outputs = self._loss_of(model_pred, batch, ref_pred, inputs.get("scores"))
        if model.training:
            self._finite.watch(outputs.pair_losses, inputs["rows"], last=self.accelerator.sync_gradients)
            self._meter["train"].add(outputs.metrics, len(inputs["seeds"]))
            if self.is_deepspeed_enabled:  # whose backward pass ends with the optimizer's step
                self._finite.verify(self.state.global_step + 1)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _predict_pairs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[NoisyBatch, torch.Tensor, torch.Tensor | None]:
        """A batch at its noise, and what policy and reference predict of it."""
        batch = self._noisy_batch(inputs)
        # The reference goes first: its activations are gone before the policy's are kept.
        with torch.no_grad(), self.reference.active(model) as reference:
            ref_pred = self._predict(reference, batch)
        with self._acting(model) as policy:
            return batch, self._predict(policy, batch), ref_pred

    @torch.no_grad()
    def _noisy_batch(self, inputs: dict[str, Any]) -> NoisyBatch:
        """Images and prompts, encoded, at the timestep and with the noise of their pair."""
        latents, conditioning = self._encode(inputs)
        timesteps, noise, extra = self._draw(inputs["seeds"], latents)
        process = self.family.noise_process
        noisy = process.add_noise(latents, noise + extra, timesteps)
        levels = process.noise_level(timesteps, self.family.image_seq_len(latents))
        return NoisyBatch(noisy, process.target(latents, noise, timesteps), timesteps, conditioning, levels)

    def _loss_of(
        self,
        model_pred: torch.Tensor,
        batch: NoisyBatch,
        ref_pred: torch.Tensor | None,
        scores: torch.Tensor | None,
        safeguard: str | None = None,
    ) -> PreferenceLossOutput:
        """The loss of predictions `(2B, ...)`, with the safeguard in output space if that is the one."""
        if safeguard is None:
            safeguard = "none" if self.args.safeguard == "parameter" else self.args.safeguard
        return diffusion_preference_loss(
            model_pred,
            batch.target,
            ref_pred,
            loss_type=self.args.loss_type,
            beta=self.args.beta,
            safeguard=safeguard,
            safeguard_mu=self.args.safeguard_mu,
            safeguard_granularity=self.args.safeguard_granularity,
            safeguard_eps=self.args.safeguard_eps,
            timestep_weights=self._timestep_weights(batch),
            **self._loser_weights(batch.levels.chunk(2)[0]),
            scores=scores,
            **self.args.loss_kwargs,
        )

    def _encode(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Latents `(2B, ...)` and the conditioning of both halves, winners first."""
        pixels = pixels_as_floats(inputs["pixel_values"])
        generators = self._generators([seed ^ VAE_SEED_MASK for seed in inputs["seeds"]])
        # A VAE may answer channels last, a layout that convolutions keep without gradients and drop with them: policy
        # and reference would round differently.
        latents = self.family.encode_images(pixels, [*generators, *generators]).contiguous()
        conditioning = self.family.encode_prompts(inputs["prompts"])  # one for a pair's two images
        conditioning = {name: torch.cat([value, value]) for name, value in conditioning.items()}
        sizes = self.family.size_conditioning(
            inputs["original_sizes"], inputs["crop_top_lefts"], tuple(pixels.shape[-2:])
        )
        return latents, conditioning | sizes

    def _draw(
        self, seeds: list[int], latents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
        """One timestep, noise and perturbation a pair, from the pair's own seed, for both halves.

        Returns:
            Timesteps `(2B,)`, noise `(2B, ...)`, and what the model's input carries on top of it.
        """
        generators = self._generators(seeds)
        shape = (len(seeds), *latents.shape[1:])
        uniform = torch.cat([torch.rand(1, generator=stream, device=latents.device) for stream in generators])
        noise = randn_tensor(shape, generators, latents.device, latents.dtype)
        if self.args.noise_offset:
            constant = (*shape[:2], *[1] * (len(shape) - 2))  # one value a channel
            noise = noise + self.args.noise_offset * randn_tensor(constant, generators, latents.device, latents.dtype)
        extra: torch.Tensor | float = 0.0
        if self.args.input_perturbation:
            extra = self.args.input_perturbation * randn_tensor(shape, generators, latents.device, latents.dtype)
            extra = torch.cat([extra, extra])
        length = self.family.image_seq_len(latents)
        timesteps = self.family.noise_process.timesteps(uniform, image_seq_len=length, **self._timesteps)
        return torch.cat([timesteps, timesteps]), torch.cat([noise, noise]), extra

    def _predict(self, denoiser: nn.Module | None, batch: NoisyBatch) -> torch.Tensor | None:
        """A denoiser's prediction `(N, ...)` in float32, in the precision of training; `None` of no denoiser."""
        if denoiser is None:
            return None
        with self.accelerator.autocast():
            return self.family.predict(denoiser, batch.noisy, batch.timesteps, batch.conditioning).float()

    def _timestep_weights(self, batch: NoisyBatch) -> torch.Tensor | None:
        timesteps, length = batch.timesteps.chunk(2)[0], self.family.image_seq_len(batch.noisy)
        weighting = {"snr_gamma": self.args.snr_gamma, "weighting": self.args.timestep_weighting}
        return self.family.noise_process.weights(timesteps, image_seq_len=length, **weighting)

    def _generators(self, seeds: list[int]) -> list[torch.Generator]:
        """One random stream a pair: its draws depend on neither its place in the batch nor the batch's size."""
        return [torch.Generator(self.args.device).manual_seed(seed) for seed in seeds]

    # ---- Steps, logs ----------------------------------------------------------------------------------------------

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any) -> Any:
        """As the Trainer does it; then what must live as the engine has the policy live."""
        self._branches, self._probe = None, None  # of an attempt with larger batches
        self._finite = FiniteCheck(self.callback_handler.callbacks)
        sharding.set_precision(self.accelerator, exact_gradients=self.args.safeguard == "parameter")
        unrounded = sharding.unrounded(self.denoiser, self.accelerator)
        for kept in self._shadow_weights:
            kept.keep_exact()
        deepspeed_resumes = self.is_deepspeed_enabled and resume_from_checkpoint is not None
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, None if deepspeed_resumes else resume_from_checkpoint
        )
        sharding.restore_unrounded(unrounded)
        for kept in self._shadow_weights:
            kept.prepare(self.model_wrapped)
        self._engine_ready = True
        if deepspeed_resumes:
            self._load_engine_checkpoint(resume_from_checkpoint)
        if self.is_deepspeed_enabled:  # which has rounded the weights for good
            self.family.settle_dtype()
        self._set_up_branches(self.model_wrapped)
        return prepared

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._meter["train"].drain(self.accelerator)}
            self._warn_of_budget(logs.get("budget/unmet", 0.0))
        super().log(logs, start_time)

    # ---- Set-up ---------------------------------------------------------------------------------------------------

    def _set_up(
        self, loaded: LoadedModel, ref_model: Any, args: DiffusionSDPOConfig, peft_config: PeftConfig | None
    ) -> None:
        """Model, adapter, reference and settings, before transformers' Trainer begins."""
        self.pipeline, self.family = loaded.pipeline, loaded.family
        for name in (*self.family.frozen_components, self.family.denoiser_name):
            sharding.check_whole(getattr(self.pipeline, name), name)
        self.model_name_or_path = loaded.name_or_path
        self.fingerprint = fingerprint(base_tensors(loaded.denoiser))  # before training changes them
        self.loss_spec = loss_spec(args.loss_type)
        self.adapter, fresh = self._choose_weights(loaded, peft_config, args)
        self.reference = self._make_reference(loaded, ref_model, args, fresh)
        self.gave_reference = ref_model is not None
        self.average = None
        if args.ema_decay is not None:
            self.average = EMAWeights(loaded.denoiser, self.adapter, args.ema_decay)
        self._shadow_weights = [self.reference, *([] if self.average is None else [self.average.kept])]
        check_guidance(args, self.family)
        complete_args(args, self.family, self.loss_spec, full=self.adapter is None)
        check_resolution(args, self.family)
        self._timesteps = checked_timesteps(args, self.family)
        check_noise_range(args, self.family, self._timesteps)
        check_without_dropout(args, loaded.denoiser)
        check_activation_checkpointing(args, loaded.denoiser)
        self._shapes = {name: tuple(w.shape) for name, w in trained_weights(loaded.denoiser, self.adapter).items()}
        self._branches, self._probe, self._engine_ready = None, None, False
        self._finite = FiniteCheck()
        self._meter = {"train": MetricMeter(), "eval": MetricMeter()}
        self._noise_bin_meter = NoiseBinMeter(args.num_noise_bins)
        self._acting, self._budget = contextlib.nullcontext, None
        if args.winner_budget is not None:
            self._budget = WinnerBudget(args.winner_budget, args.num_noise_bins, args.device)
        self.family = working_family(self.family, args)
        if args.torch_compile:
            compile_with_eager_rounding()
        for kept in self._shadow_weights:
            kept.to(args.device)
            if args.torch_compile:
                kept.compile(args.torch_compile_backend, args.torch_compile_mode)

    def _choose_weights(
        self, loaded: LoadedModel, peft_config: PeftConfig | None, args: DiffusionSDPOConfig
    ) -> tuple[str | None, bool]:
        """Freeze and unfreeze; the trained adapter's name (`None` in full tuning) and whether it was added here."""
        denoiser = loaded.denoiser
        if args.disable_dropout:
            disable_dropout(denoiser)
        for name in loaded.family.frozen_components:
            getattr(loaded.pipeline, name).requires_grad_(False).eval()
        if peft_config is not None:
            adapter = add_lora(denoiser, peft_config, loaded.family.lora_target_modules, args.seed)
            if args.disable_dropout:
                disable_dropout(denoiser)
        else:
            adapter = active_adapter(denoiser)
            if adapter is not None:
                check_adapter_weight(denoiser, adapter)
        check_precision(denoiser, adapter, args)
        if args.save_full_pipeline and adapter is not None:
            raise ValueError(
                "`save_full_pipeline=True` would save the base without its LoRA. Leave it off and load the LoRA with "
                "`load_lora_weights`, or tune in full."
            )
        if adapter is None:
            denoiser.requires_grad_(True)
            for name in loaded.family.idle_modules:
                denoiser.get_submodule(name).requires_grad_(False)
        else:
            train_only_adapter(denoiser, adapter)
        return adapter, peft_config is not None

    def _make_reference(
        self, loaded: LoadedModel, ref_model: Any, args: DiffusionSDPOConfig, fresh_adapter: bool
    ) -> Reference:
        given = None
        if ref_model is not None:
            with sharding.loading_unsharded(args):
                given = load_reference(ref_model, loaded, args)
            if args.disable_dropout:
                disable_dropout(given)
            if not self.loss_spec.needs_reference:
                logger.warning(
                    "The loss %r reads no reference; `ref_model` serves the metrics `errors/*_change` only.",
                    args.loss_type,
                )
        return build_reference(
            loaded.denoiser,
            needed=self.loss_spec.needs_reference,
            given=given,
            may_modify_given=isinstance(ref_model, (str, Path)),
            changed_by_engine=sharding.by_engine(args),
            fresh_adapter=self.adapter if fresh_adapter else None,
            started_adapter=None if fresh_adapter else self.adapter,
            follows=args.sync_ref_model,
            half_dtype=autocast_dtype(args)
            if args.ref_model_half_precision and not sharding.by_engine(args)
            else None,
        )

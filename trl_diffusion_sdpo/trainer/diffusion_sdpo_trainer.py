"""The trainer: its collaborators, and the overrides of transformers' Trainer that concern a step and an evaluation. The
overrides for data are in `data_preparation`, those for files in `file_overrides`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, SaveStrategy

from ..cache.key import EncoderKey
from ..cache.reference_errors import ReferenceErrors
from ..data.pairs import PreferenceIterableDataset
from ..data.transforms import PreferenceCollator
from ..engines.batch_loaders import BatchLoaders
from ..engines.engine import Engine
from ..engines.engine_settings import by_engine, check_unsharded, shards_weights
from ..engines.processes import check_agreement, peers
from ..engines.sharding import full_tensor
from ..losses import BetaController, BudgetController, PreferenceLossOutput
from ..models.adapters import base_tensors
from ..models.denoiser_wrapper import DenoiserWrapper
from ..models.ema import EMA_FOLDER, EMAWeights
from ..models.loading import LoadedModel
from ..models.reference import PrecomputedReference, networks
from ..saving.interrupts import step_exchange
from ..saving.setup import fingerprint
from ..saving.starting_point import Origin, recorded_base
from ..step.branch_gradients import BranchGradients
from ..step.finite_check import FiniteCheck
from ..step.meters import AutoBeta, MetricMeter
from ..step.noisy_batch import seeds_of_draws
from ..step.pair_evaluation import PairEvaluation, draws_of_noise, real_pairs
from ..step.pair_forward import PairForward
from ..step.parameter_safeguard import ParameterSafeguard
from ..step.step_diagnostics import StepDiagnostics
from ..step.winner_budget import WinnerBudget
from .callbacks import default_callbacks
from .config.declaring import RESUME
from .config.model_checks import refuse_dropout
from .data_preparation import DataOverrides
from .diffusion_sdpo_config import DiffusionSDPOConfig, settings_with
from .file_overrides import FileOverrides
from .kernel_setup import choose_attention, compile_models
from .preparing import (
    check_and_complete,
    choose_trained_weights,
    copy_and_check_args,
    error_settings,
    load_policy,
    loss_settings,
    make_reference,
    pair_encoding,
    place_frozen_components,
    precompute_folder,
    reference_facts,
)

logger = logging.getLogger(__name__)

# Beside those that change the trajectory: when processes train, evaluate and save, which they do together.
SAME_IN_ALL_PROCESSES = (
    *("max_steps", "num_train_epochs", "learning_rate", "optim", "per_device_eval_batch_size"),
    *("eval_strategy", "eval_steps", "save_strategy", "save_steps", "logging_strategy", "logging_steps"),
    *("precompute_latents", "push_to_hub", "sample_prompts"),
)


class DiffusionSDPOTrainer(DataOverrides, FileOverrides):
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
        model (`str`, `DiffusionPipeline` or `nn.Module`): A Hub id, folder or file of a pipeline, a run's folder, a
            pipeline, or a denoiser (UNet, transformer, or a [`~peft.PeftModel`] around one) with `processing_class`.
        ref_model (`str`, `DiffusionPipeline` or `nn.Module`, *optional*): The reference, of the same kinds. `None`
            takes the policy as it is before training: switched-off adapter, second adapter or frozen copy.
        args ([`DiffusionSDPOConfig`], *optional*): Settings; left as they are, a copy is completed.
        train_dataset (`datasets.Dataset`, `datasets.IterableDataset`, a torch `Dataset` or `list`, *optional*):
            Preference pairs in a known format.
        eval_dataset (the same, or a `dict` of them, *optional*): Pairs for evaluation, at fixed noise and timesteps.
        processing_class (`DiffusionPipeline`, *optional*): The pipeline that owns a bare denoiser's VAE, text encoders
            and scheduler.
        data_collator (`Callable`, *optional*): [`~trl_diffusion_sdpo.data.transforms.PreferenceCollator`] if unset.
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

    parameter_safeguard: ParameterSafeguard | None
    _evaluated_weights: EMAWeights | None
    _tag_names = ["trl-diffusion-sdpo", "diffusion-sdpo"]
    _name = "Diffusion-SDPO"
    _paper = {
        "title": "Diffusion-SDPO: Safeguarded Direct Preference Optimization for Diffusion Models",
        "id": "2511.03317",
    }

    # For subclasses that change the forward passes of a pair, or the step under the parameter-space safeguard.
    pair_forward_class = PairForward
    parameter_safeguard_class = ParameterSafeguard

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
        check_agreement({name: getattr(args, name) for name in (*settings_with(RESUME), *SAME_IN_ALL_PROCESSES)})
        ref_model = args.ref_model_name_or_path if ref_model is None else ref_model
        loaded = load_policy(model, args, processing_class, peft_config, quantization_config)
        self._set_up_model(loaded, ref_model, args, peft_config)
        self._set_up_step(args)
        workers_are_chosen = args.dataloader_num_workers is None
        train_dataset, eval_dataset = self._prepare_data(train_dataset, eval_dataset, args)
        self._move_frozen(args)  # after encoding, which needs memory there
        self._own_callbacks = self._default_callbacks(args, train_dataset)
        super().__init__(
            model=DenoiserWrapper(loaded.denoiser),
            args=args,
            data_collator=PreferenceCollator() if data_collator is None else data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.pipeline,
            compute_metrics=compute_metrics,
            callbacks=[*self._own_callbacks, *(callbacks or [])],
            optimizers=optimizers,
        )
        self.loss_is_scaled_for_ga = False  # a mean over pairs, to be divided by the accumulation steps
        self._loaders = BatchLoaders(self.args, self.accelerator, workers_are_chosen=workers_are_chosen)
        self._set_up_engine()
        self._set_up_run(self._own_callbacks, self._weight_copies, self.average, self._controllers)

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or transformer that trains, adapters included."""
        return self.family.denoiser

    # ---- A step ---------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, PreferenceLossOutput]:
        """Loss of a batch of B pairs, a scalar; with `return_outputs` also its [`PreferenceLossOutput`].

        A subclass may change the loss under every safeguard. With `safeguard="parameter"` the graph ends at the
        predictions: what it adds must depend on the model through them.
        """
        by_branch = model.training and self.parameter_safeguard is not None
        predictions = (self.parameter_safeguard if by_branch else self.pair_forward).predict_pairs(model, inputs)
        outputs = self.pair_forward.loss(predictions)
        if model.training:
            rows = inputs["rows"].repeat(self.args.n_timesteps_per_pair)
            self._finite.watch(outputs.pair_losses, rows, last=self.accelerator.sync_gradients)
            self._meter.add(self.pair_forward.logged_metrics(outputs), len(inputs["seeds"]))
            if self.auto_beta is not None:
                self.auto_beta.add(outputs)
            if self.engine.steps_in_backward and not by_branch:
                self._finite.verify(self.state.global_step + 1)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if self.parameter_safeguard is not None:
            return self._training_step_by_branch(model, inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._finite.verify(self.state.global_step + 1)
        return loss

    def _training_step_by_branch(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """One micro-batch; after the last of an optimizer step, the branches are combined."""
        model.train()
        cast(Any, self.optimizer).train()
        inputs = self._prepare_inputs(inputs)
        step, share = self.state.global_step + 1, 1 / self.current_gradient_accumulation_steps
        with self.compute_loss_context_manager(), self.parameter_safeguard.accumulating():
            loss = cast(torch.Tensor, self.compute_loss(model, inputs))
            self.parameter_safeguard.backward_branches(loss, step=step, share=share)
        self._finite.verify(step)
        if self.accelerator.sync_gradients:
            self.parameter_safeguard.step()
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return loss.detach() / self.current_gradient_accumulation_steps

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        norm = full_tensor(super()._get_grad_norm(model, grad_norm))
        # With fp16 an overflow is usual, and the scaler skips that step by itself.
        if norm is not None and not self.args.fp16:
            self._finite.watch_gradient(torch.as_tensor(norm), self.state.global_step + 1)
        return norm

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any) -> Any:
        """As transformers does it; then the set-up that needs the model as the engine wrapped it."""
        self.parameter_safeguard = None  # of an earlier training
        self._finite = FiniteCheck(
            step_exchange(self.callback_handler.callbacks), lambda: networks(self.family, self.reference.module)
        )
        self.engine.complete_settings(exact_gradients=self.args.safeguard == "parameter")
        unrounded = self.engine.unrounded(self.denoiser)
        for weights in self._weight_copies:
            weights.keep_unrounded()
        self.engine.shard_before_preparing(self.denoiser, unrounded)
        # An engine that shards reads a checkpoint below, once second copies of the weights are sharded as well.
        read_later = self.engine.holds_shards and resume_from_checkpoint is not None
        checkpoint = None if read_later else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, checkpoint)
        if self.args.save_strategy != SaveStrategy.NO and not self.args.save_only_model:
            self.engine.check_resumable(self.optimizer)
        self.engine.restore_unrounded(unrounded)
        for weights in self._weight_copies:
            weights.prepare(self.model_wrapped)
        self._engine_ready = True
        if read_later:
            self._load_engine_checkpoint(resume_from_checkpoint)
        if self.engine.casts_weights:
            self.family.settle_dtype()
        for controller in self._controllers:
            controller.attach(self.model_wrapped, self.accelerator)
        self.set_up_safeguard()
        return prepared

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._meter.drain(self.accelerator)}
            if self.winner_budget is not None:
                self.winner_budget.warn_if_unmet(logs.get("budget/unmet", 0.0))
        super().log(logs, start_time)

    # ---- Evaluation -----------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            pairs = len(inputs["seeds"])
            seeds = seeds_of_draws(inputs["seeds"], self._evaluation.draws)
            draws = [
                self.pair_forward.predict_pairs(
                    model, {**inputs, "seeds": seeds[start : start + pairs]}, self._evaluated_weights
                )
                for start in range(0, len(seeds), pairs)
            ]
            real = inputs.get("counted", real_pairs(self.accelerator.gradient_state, pairs, self.args.process_index))
            outputs = self._evaluation.add(draws, real)
        loss = torch.stack([output.loss.detach() for output in outputs]).mean()
        self._counted = torch.arange(pairs, device=loss.device) < real
        if prediction_loss_only:
            return loss, None, None
        rewards = torch.stack([output.pair_rewards for output in outputs]).mean(0)
        return loss, rewards, torch.zeros(len(rewards), device=rewards.device)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        if self.engine.holds_shards and not self._engine_ready:
            raise ValueError(
                "Under DeepSpeed and FSDP, evaluation runs in the engine that training sets up. Set "
                "`eval_on_start=True`, call it after `train()`, or evaluate in a trainer without them."
            )
        settings = (description, prediction_loss_only, ignore_keys)
        output = self._measured_loop(dataloader, *settings, metric_key_prefix)
        if self.average is not None:
            self._evaluated_weights = self.average
            try:
                averaged = self._measured_loop(dataloader, *settings, f"{metric_key_prefix}_{EMA_FOLDER}")
            finally:
                self._evaluated_weights = None
            output.metrics.update(averaged.metrics)
        return output

    def _measured_loop(self, dataloader: DataLoader, *settings: Any) -> EvalLoopOutput:
        """One pass over the data, with the metrics of its pairs."""
        self._evaluation.drain(self.accelerator)
        draws = 1 if self.reference.is_precomputed else draws_of_noise(dataloader.dataset)
        self._evaluation.begin(
            dataloader.dataset, settings[-1], before_training=self.state.global_step == 0, draws=draws
        )
        if _tells_what_counts(dataloader.dataset):
            self.gather_function = self._gather_counted  # transformers resets it after the pass
        output = super().evaluation_loop(dataloader, *settings)
        measured = self._evaluation.drain(self.accelerator)
        output.metrics.update({f"{settings[-1]}_{name}": value for name, value in measured.items()})
        return output

    def _gather_counted(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the pairs of all processes' batches, without those that fill up the last batch of a size or of a
        stream, which accelerate takes for further pairs of the data."""
        gathered, counted = self.accelerator.gather(values), self.accelerator.gather(self._counted.float())
        return gathered[counted > 0] if len(gathered) == len(counted) else gathered

    # ---- Set-up ---------------------------------------------------------------------------------------------------

    def _set_up_model(
        self, loaded: LoadedModel, ref_model: Any, args: DiffusionSDPOConfig, peft_config: PeftConfig | None
    ) -> None:
        """Model, adapter, reference and settings, before transformers' Trainer begins."""
        self.pipeline, self.family = loaded.pipeline, loaded.family
        for name in (*self.family.frozen_components, self.family.denoiser_name):
            check_unsharded(getattr(self.pipeline, name), name)
        weights_before = fingerprint(base_tensors(loaded.denoiser))  # before an adapter or training changes them
        self.loss_spec = args.loss_spec
        self.adapter, added = choose_trained_weights(loaded, peft_config, args)
        self.reference = make_reference(loaded, ref_model, args, self.loss_spec, adapter=self.adapter, added=added)
        self.origin = Origin(
            loaded.name_or_path,
            loaded.folder(),
            recorded_base(loaded.name_or_path, loaded.options, loaded.denoiser_folder),
            fingerprint=weights_before,
            reference=self.reference.kind,
            gave_reference=ref_model is not None,
        )
        self.average = None
        if args.ema_decay is not None:
            self.average = EMAWeights(loaded.denoiser, self.adapter, args.ema_decay, shared=shards_weights(args))
        self._weight_copies = [self.reference, *([] if self.average is None else [self.average])]
        self._noise_settings = check_and_complete(args, loaded, self.loss_spec, adapter=self.adapter)
        self._set_up_files(args, loaded, self.adapter, self.loss_spec)
        self.frozen_components = place_frozen_components(loaded, args)
        self.family = self.frozen_components.family
        self._encoder_key = EncoderKey(self.frozen_components, loaded, precompute_folder(args), peers(args))
        self.encoding = None
        if args.precompute_latents:
            self.encoding = pair_encoding(self.frozen_components, self._encoder_key, args)
        choose_attention(loaded.denoiser, self.reference, args)
        compile_models(loaded.denoiser, self._weight_copies, self.frozen_components, args)

    def _move_frozen(self, args: DiffusionSDPOConfig) -> None:
        """Move what is frozen to where the policy will be. Engines move second copies of its weights themselves, once
        they have sharded or rounded them."""
        for weights in [] if by_engine(args) else self._weight_copies:
            weights.to(args.device)

    def _set_up_step(self, args: DiffusionSDPOConfig) -> None:
        """The collaborators of a step."""
        self._meter, self._finite = MetricMeter(), FiniteCheck()
        self._own_pairs, self._own_copies = WeakSet(), WeakKeyDictionary()
        self.parameter_safeguard = None  # made in `set_up_safeguard`
        self._engine_ready = False
        self._evaluated_weights = None  # in place of the policy's
        controller = None
        if args.winner_budget is not None:
            controller = BudgetController(args.winner_budget, args.num_noise_bins, args.device)
        betas = BetaController(args.beta, args.device) if args.auto_beta else None
        self.pair_forward = self.pair_forward_class(
            self.frozen_components,
            self.reference,
            noise=self._noise_settings,
            loss=loss_settings(args),
            autocast=lambda: self.accelerator.autocast(),  # made later, by transformers' constructor
            budget=controller,
            auto_beta=betas,
        )
        self._evaluation = PairEvaluation(self.pair_forward, args.num_noise_bins)
        self.winner_budget = None
        if controller is not None:
            scored = self.loss_spec.needs_scores
            self.winner_budget = WinnerBudget(
                controller, self.pair_forward, self._meter, sorts_by_scores=scored, average=self.average
            )
        self.auto_beta = None if betas is None else AutoBeta(betas, self._meter)
        self._controllers = [each for each in (self.winner_budget, self.auto_beta) if each is not None]
        self._diagnostics = None
        if args.safeguard_diagnostics_steps is not None:
            self._diagnostics = StepDiagnostics(self.pair_forward, self._meter, args.safeguard_diagnostics_steps)

    def _set_up_engine(self) -> None:
        """After transformers' constructor, which makes the accelerator."""
        self.engine = Engine(self.accelerator)
        self.engine.check()
        for weights in self._weight_copies:
            weights.attach(self.engine)
            if shards_weights(self.args) and not self.engine.shards_weights:  # FSDP was ignored, with one process
                weights.stop_sharing()
        self._reference_errors = None
        if isinstance(self.reference, PrecomputedReference):
            self._reference_errors = self._make_reference_errors(self.reference)

    def _make_reference_errors(self, reference: PrecomputedReference) -> ReferenceErrors:
        settings = error_settings(
            self.args,
            reference_facts(reference, self.family, self.engine, self.args, self._encoder_key),
            to_inputs=lambda items: self._prepare_inputs(cast(Any, self.data_collator)(items)),
            load=self._loaders.in_batches,
        )
        return ReferenceErrors(self.pair_forward, reference, self.denoiser, self.engine, settings)

    def _default_callbacks(self, args: DiffusionSDPOConfig, train_dataset: Any) -> list[TrainerCallback]:
        return default_callbacks(
            args,
            train_dataset,
            frozen=self.frozen_components,
            reference=self.reference,
            average=self.average,
            budget=self.winner_budget,
            auto_beta=self.auto_beta,
            load_probe=self._load_probe,
            diagnostics=self._diagnostics,
            run_facts=self.run_facts,
            evaluate=lambda: self.evaluate(),
            callbacks_of_run=lambda: self.callback_handler.callbacks,
            images=self.tracked_images,
            end=self._end_report,
        )

    def set_up_safeguard(self) -> None:
        """Make what `args.safeguard` needs, once the engine has wrapped policy and optimizer."""
        args, self.parameter_safeguard = self.args, None
        if args.safeguard != "parameter":
            return
        backend = self.engine.gradient_backend(self.model_wrapped)
        anchor = args.safeguard_anchor or self.loss_spec.anchor
        if anchor == "error" and not backend.retains_graph:
            refuse_dropout(self.denoiser, "The anchor 'error' under ZeRO-3")
        if self._diagnostics is not None:
            self._diagnostics.attach(self.model_wrapped, backend)
        self.parameter_safeguard = self.parameter_safeguard_class(
            self.pair_forward,
            BranchGradients(backend, mu=args.safeguard_mu, anchor=anchor),
            self._meter,
            sorts_by_scores=self.loss_spec.needs_scores,
            low_memory=args.safeguard_low_memory,
            diagnostics=self._diagnostics,
        )


def _tells_what_counts(dataset: Any) -> bool:
    """Whether batches tell which of their pairs fill them up, so that accelerate cannot know it."""
    return isinstance(dataset, PreferenceIterableDataset) or getattr(dataset, "sizes", None) is not None

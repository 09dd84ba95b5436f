"""`DiffusionSDPOTrainer`, a subclass of transformers' Trainer, with methods in the order of a run."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, EvalPrediction, SaveStrategy

from ..cache.encoding import check_prompt_padding
from ..cache.key import EncoderKey
from ..data.batch_loaders import BatchLoaders, choose_workers
from ..data.dataset import PreferenceCollator
from ..data.pairs import Pairs
from ..data.stream_position import READ, StreamPosition, load_position, save_position
from ..data.streaming import PreferenceIterableDataset
from ..engines.engine import Engine
from ..engines.engine_settings import asked_engine, by_engine, check_unsharded, loading_unsharded, shards_weights
from ..engines.gradient_backends import unwrapped
from ..engines.processes import check_agreement, failing_together, peers
from ..engines.sharding import full_tensor
from ..losses import NOISE_BINS, BudgetController, PreferenceLossOutput
from ..models.adapters import base_tensors
from ..models.denoiser_wrapper import DenoiserWrapper
from ..models.ema import EMA_FOLDER, EMAWeights
from ..models.loading import LoadedModel
from ..models.weight_copies import WeightCopy
from ..reporting.console import say
from ..reporting.history import is_evaluation
from ..reporting.interrupts import CheckpointOnInterrupt, is_due, stopping_on_interrupt
from ..reporting.plots import CURVES_FILE
from ..reporting.run_callbacks import plots_of, run_lines
from ..reporting.sample_images import SAMPLES_FOLDER, final_step
from ..reporting.tracked_images import TrackedImages
from ..reporting.verdict import RunFacts, Verdict, verdict_of
from ..saving.model_card import RunCard, changed_settings
from ..saving.publishing import Publisher, PublishingError
from ..saving.run_files import RunFiles
from ..saving.run_folder import RunFolder
from ..saving.setup import fingerprint
from ..saving.starting_point import BASE, Origin, public_base, recorded_base
from ..saving.weights import WeightFiles
from ..step.batches import LazyBatches, on_device
from ..step.branch_gradients import BranchGradients
from ..step.finite_check import FiniteCheck
from ..step.meters import MetricMeter
from ..step.pair_evaluation import PairEvaluation, draws_of_noise, real_pairs, seeds_of_draws
from ..step.pair_forward import PairForward
from ..step.parameter_safeguard import ParameterSafeguard
from ..step.stochastic_rounding import WeightByWeight, may_step_in_backward, rounds_at_random, weight_by_weight
from ..step.winner_budget import ProbeInputs, ProbeSettings, WinnerBudget, probe_inputs
from ..utils._compat import check_trainer
from ..utils.disk import naming_the_disk
from ..utils.errors import UserError
from ..utils.files import VERDICT_FILE
from ..utils.identity import describe_pipeline, public_config
from .callbacks import add_callbacks, load_sample_scores, make_sample_images
from .components import (
    choose_kernels,
    choose_trained_weights,
    load_policy,
    make_reference,
    make_reference_errors,
    pair_encoding,
    place_frozen_components,
)
from .config.all_arguments import temporarily
from .config.checks import without_turn
from .config.complete import (
    check_and_complete,
    copy_and_check_args,
    image_size,
    largest_batch,
    loss_settings,
    pairs_of_a_step,
    predicts_halves,
    refuse_dropout,
    stored_crops,
)
from .config.diffusion_sdpo_config import DiffusionSDPOConfig, resume_settings
from .run_data import PairPreparation, outline

logger = logging.getLogger(__name__)

FIRST_ZERO = "first_gradient_is_zero"  # travels with the metrics to the next log, but is not logged

# Settings that must be equal in all processes, in addition to `resume_settings()`. If one differed, a process would
# evaluate or save alone and wait forever for the others.
SAME_IN_ALL_PROCESSES = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "optim",
    "optim_args",
    "per_device_eval_batch_size",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "logging_strategy",
    "logging_steps",
    "precompute_latents",
    "push_to_hub",
    "sample_prompts",
    "sample_sources",
    "sample_steps",
    "sample_scorers",
)
REPORTS = (SAMPLES_FOLDER, "noise_bins*.png", CURVES_FILE, VERDICT_FILE, TRAINER_STATE_NAME)
# Files that are not uploaded. The Trainer's state has local paths in it.
NOT_PUBLISHED = (f"{PREFIX_CHECKPOINT_DIR}-*", TRAINER_STATE_NAME)

check_trainer(Trainer)


class DiffusionSDPOTrainer(Trainer):
    r"""
    Trainer for text-to-image diffusion models and preference pairs, by Diffusion-SDPO or a related method.

    Example:

    ```python
    from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer
    from trl_diffusion_sdpo.tools.demo.pairs import off_policy_pairs
    from trl_diffusion_sdpo.tools.demo.pipeline import base_pipeline_folder

    trainer = DiffusionSDPOTrainer(
        str(base_pipeline_folder()),  # a tiny model; or a Hub id such as "stable-diffusion-v1-5/stable-diffusion-v1-5"
        args=DiffusionSDPOConfig(output_dir="shapes", max_steps=10),
        train_dataset=off_policy_pairs(),  # a `datasets.Dataset` with the columns `prompt`, `chosen` and `rejected`
    )
    trainer.train()
    trainer.save_model()
    ```

    Args:
        model (`str`, `DiffusionPipeline` or `nn.Module`): Model to train (the policy): the Hub id, folder or file of a
            pipeline, the output folder of a run, a pipeline object, or a bare denoiser (a UNet, a transformer or a
            [`~peft.PeftModel`] around one), which needs `processing_class`.
        ref_model (`str`, `DiffusionPipeline` or `nn.Module`, *optional*): Reference model, of any type that `model` may
            have. Leave it out for the policy as it was before training, which the trainer gets by switching the LoRA
            off, or from a frozen copy of the LoRA or of the denoiser.
        args ([`DiffusionSDPOConfig`], *optional*): Your settings. The trainer keeps its own copy in `trainer.args` and
            fills in whatever you left out.
        train_dataset (`datasets.Dataset`, `datasets.IterableDataset`, a torch `Dataset` or `list`, *optional*):
            Preference pairs in a supported format.
        eval_dataset (a type of `train_dataset`, or a `dict` of data sets, *optional*): Pairs for evaluation, with the
            same noise and timesteps every time.
        processing_class (`DiffusionPipeline`, *optional*): Pipeline with the VAE, text encoders and scheduler of a
            `model` that is a bare denoiser.
        data_collator (`Callable`, *optional*): Makes a batch from a list of items. If unset,
            [`~trl_diffusion_sdpo.data.dataset.PreferenceCollator`].
        compute_metrics (`Callable`, *optional*): Takes an `EvalPrediction` and returns a dictionary of metrics.
            `predictions`, of shape `(pairs, 2)`, are the implicit rewards of chosen and rejected images; `label_ids`
            are zeros.
        callbacks (`list[TrainerCallback]`, *optional*): Callbacks in addition to the trainer's own.
        optimizers (`tuple`, *optional*): Optimizer and learning-rate scheduler, instead of those in `args`.
        peft_config ([`~peft.LoraConfig`], *optional*): Configuration of a LoRA to train instead of all weights. Leave
            its `target_modules` out for those of diffusers' training script for this model family.
        quantization_config (*optional*): Quantization of the frozen base model, such as
            `diffusers.BitsAndBytesConfig(load_in_4bit=True)`. Needs `peft_config`.

    Raises:
        `ValueError`: If models, data and settings do not go together. The message says what to change.
    """

    args: DiffusionSDPOConfig
    train_dataset: Pairs | None
    eval_dataset: Pairs | dict[str, Pairs] | None
    optimizer: Any  # wrapped by accelerate or DeepSpeed
    hub_model_id: Any
    gather_function: Any
    dataset_name: str | None = None  # Hub id of the training data, for the model card
    _tag_names = ["trl-diffusion-sdpo", "diffusion-sdpo"]
    _name = "Diffusion-SDPO"
    _paper = {
        "title": "Diffusion-SDPO: Safeguarded Direct Preference Optimization for Diffusion Models",
        "id": "2511.03317",
    }

    # A subclass may set its own: `pair_forward_class` for the forward passes, `parameter_safeguard_class` for
    # `safeguard="parameter"`.
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
        # Objects are complete when they are made, so the order is fixed:
        #
        # 1. settings and scorers
        # 2. model, reference, averaged weights, and what computes a step: `_build_components`
        # 3. data, which may need models to encode images
        # 4. transformers' Trainer, which makes the accelerator and the list of callbacks
        # 5. what needs the accelerator: loaders, files, callbacks
        # 6. `train`: engine, optimizer and sharded copies of weights; then the safeguard: `_prepare_for_training`
        #
        # `engine` is made in step 2 but asks for objects of steps 4 and 6, so it gets functions that return them.
        # `evaluate` and `log` are lambdas too: a user may replace these methods later.

        # Copy the user's settings, and check that all processes have the same.
        args = copy_and_check_args(model, ref_model, args)
        settings_of_user = changed_settings(args, resume_settings())
        check_agreement({name: getattr(args, name) for name in (*resume_settings(), *SAME_IN_ALL_PROCESSES)})
        # Scorers first: a failed download must not come after hours of encoding.
        self.sample_scores = load_sample_scores(args)
        ref_model = args.ref_model_name_or_path if ref_model is None else ref_model

        # The model, and all components that need no accelerator.
        loaded = load_policy(model, args, processing_class, peft_config, quantization_config)
        self.engine = Engine(lambda: self.accelerator, lambda: self.model_wrapped)
        self._build_components(loaded, ref_model, args, peft_config, own_optimizer=optimizers[0] is not None)

        # State that training and evaluation change.
        self._engine_ready = False
        self._gradient_hooks: list[RemovableHandle] = []  # while the optimizer steps within backward passes
        self._parameter_safeguard: ParameterSafeguard | None = None
        self._first_step = 0  # step at which `train` began or resumed
        self._saved_step = -1  # step of the last checkpoint of this training
        self._counted = torch.zeros(0)  # for each pair of the last evaluation batch: 0 if repeated, else 1

        # Rows become pairs, encoded with `precompute_latents`. The reference and the averaged weights move to the
        # device after that, because encoding needs its memory. (DeepSpeed and FSDP move them later.)
        self._preparation = PairPreparation(args, self.loss_spec, self.family, self.encoding)
        train_dataset, eval_dataset = self._prepare_data(train_dataset, eval_dataset, args)
        if not by_engine(args):
            for weights in self._weight_copies:
                weights.to(args.device)
        self._position: StreamPosition | None = None  # position in a stream, while an epoch of it trains

        # transformers' Trainer sets up accelerator, device, callbacks and repository.
        self.publisher = Publisher(args, NOT_PUBLISHED)
        super().__init__(
            model=DenoiserWrapper(loaded.denoiser),
            args=args,
            data_collator=PreferenceCollator() if data_collator is None else data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.pipeline,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.loss_is_scaled_for_ga = False  # transformers divides the loss (a mean) by the accumulation steps

        # Components that need the accelerator.
        self.engine.check(asked_engine(args))
        # A user may pass a callback that handles signals. The last one replaces the others' handlers.
        passed = [each for each in self.callback_handler.callbacks if isinstance(each, CheckpointOnInterrupt)]
        self.interrupt = passed[-1] if passed else CheckpointOnInterrupt()
        alone = self.engine.name == "plain" and self.accelerator.num_processes == 1
        self._steps_in_backward = alone and optimizers[0] is None and may_step_in_backward(args)
        self._finite = FiniteCheck(
            self.interrupt.exchange,
            before_backward=self._steps_in_backward
            or (self.engine.steps_in_backward and args.safeguard != "parameter"),
        )
        for weights in self._weight_copies:
            if shards_weights(args) and not self.engine.shards_weights:  # accelerate ignores FSDP with one process
                weights.stop_sharing()
        self._loaders = BatchLoaders(args, self.accelerator)
        self._reference_errors = make_reference_errors(
            self.pair_forward,
            self.frozen_components,
            self._encoder_key,
            self.engine,
            args,
            self._loaders,
            to_inputs=self._inputs_of,
        )

        # What writes the files of the run, and the callbacks.
        self.run_folder = RunFolder(args, list(self.family.pipeline.components), REPORTS)
        self.run_files = RunFiles(
            args,
            self.engine,
            self.weight_files,
            weight_copies=self._weight_copies,
            average=self.average,
            winner_budget=self.winner_budget,
            full_pipeline=args.save_full_pipeline,
            unpublished={BASE: self.origin.base},
        )
        self.model_card = RunCard(
            args,
            self.family,
            lora=self.weight_files.describe()["lora"],
            full_pipeline=args.save_full_pipeline,
            base_model=self.origin.name_or_path,
            base_options=loaded.options,
            trainer_name=self._name,
            settings=settings_of_user,
            safeguard=str(args.safeguard) if self.loss_spec.uses_loser else "none",
            edits=train_dataset is not None and train_dataset.has_sources,
        )
        self.run_facts = RunFacts(
            reference_moves=args.sync_ref_model,
            reference_was_given=self.origin.gave_reference,
            uses_loser=self.loss_spec.uses_loser,
            average_suffix=f"_{EMA_FOLDER}",
        )
        trackers = TrackedImages(self.callback_handler.callbacks)
        self.sample_images = make_sample_images(
            args, self.frozen_components, trackers, self.sample_scores, log=lambda metrics: self.log(metrics)
        )
        add_callbacks(
            self.callback_handler,
            args,
            train_dataset,
            run_facts=self.run_facts,
            interrupt=self.interrupt,
            images=trackers,
            samples=self.sample_images,
            begin=self._begin_steps,
            after_step=self._after_step,
            evaluate=lambda: self.evaluate(),
            end=self._end_report,
        )

    def _build_components(
        self,
        loaded: LoadedModel,
        ref_model: Any,
        args: DiffusionSDPOConfig,
        peft_config: PeftConfig | None,
        *,
        own_optimizer: bool,
    ) -> None:
        """Build all components that need no `Accelerator`, and fill in unset settings of `args`. `own_optimizer` says
        whether the user passes an optimizer.

        Raises:
            `ValueError`: If model, reference and settings do not go together.
        """
        self.pipeline = loaded.pipeline
        self.loss_spec = args.loss_spec
        denoiser = loaded.denoiser

        # Choose the weights that train. The fingerprint comes first, while they are unchanged.
        for name in (*loaded.family.frozen_components, loaded.family.denoiser_name):
            check_unsharded(getattr(loaded.pipeline, name), name)
        weights_before = fingerprint(base_tensors(denoiser))
        described = describe_pipeline(self.pipeline, [loaded.family.denoiser_name], weights=fingerprint)
        self._pipeline_facts = {**described, "denoiser": public_config(denoiser.config)}
        self.adapter, added = choose_trained_weights(loaded, peft_config, args, own_optimizer=own_optimizer)

        # Copy the weights that train, for the reference and for the averaged weights (`ema_decay`).
        self.reference = make_reference(
            loaded, ref_model, args, self.loss_spec, self.engine, adapter=self.adapter, added=added
        )
        if ref_model is not None and self.reference.module is not None:
            self._pipeline_facts["reference"] = fingerprint(self.reference.module.state_dict())
        self._weight_copies: list[WeightCopy] = [self.reference]
        self.average = None
        if args.ema_decay is not None:
            shared = shards_weights(args)
            self.average = EMAWeights(denoiser, self.adapter, args.ema_decay, self.engine, shared=shared)
            self._weight_copies.append(self.average)

        # Record the base model and the reference, and choose the formats in which the run saves weights.
        self.origin = Origin(
            loaded.name_or_path,
            recorded_base(loaded.name_or_path, loaded.options, loaded.denoiser_folder),
            fingerprint=weights_before,
            reference=self.reference.kind,
            gave_reference=ref_model is not None,
        )

        def whole_pipeline() -> DiffusionPipeline:
            with loading_unsharded(args):  # only the first process calls this function
                return loaded.whole_pipeline()

        self.weight_files = WeightFiles(loaded.pipeline, loaded.family.denoiser_name, self.adapter, whole_pipeline)

        # Fill in unset settings.
        noise = check_and_complete(args, loaded, self.loss_spec, adapter=self.adapter)

        # Move VAE and text encoders to their device. With `precompute_latents`, they encode all pairs before training.
        self.frozen_components = place_frozen_components(loaded, args)
        self.family = self.frozen_components.family
        self._encoder_key = EncoderKey(self.frozen_components, loaded, peers(args))
        self.encoding = None
        if args.precompute_latents:
            self.encoding = pair_encoding(self.frozen_components, self._encoder_key, args)

        # Compile models and choose the attention back end.
        choose_kernels(denoiser, self._weight_copies, self.frozen_components, args)

        # What computes, adjusts and measures a step.
        self._meter = MetricMeter()
        budget = None
        if args.winner_budget is not None:
            budget = BudgetController(args.winner_budget, NOISE_BINS, args.device)
        self.pair_forward = self.pair_forward_class(
            self.frozen_components,
            self.reference,
            noise=noise,
            loss=loss_settings(args),
            autocast=self.engine.autocast,
            budget=budget,
            by_halves=predicts_halves(args, denoiser, self.loss_spec),
            average=self.engine.average,
        )
        self.winner_budget = None
        if budget is not None:
            self.winner_budget = WinnerBudget(
                budget,
                self.pair_forward,
                self._meter,
                sorts_by_scores=self.loss_spec.needs_scores,
                average=self.average,
            )
        self._evaluation = PairEvaluation(self.pair_forward)

    @property
    def denoiser(self) -> nn.Module:
        """UNet or transformer that trains, including its LoRA."""
        return self.family.denoiser

    # ---- Data -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise UserError("Training needs a `train_dataset`, got None. Pass preference pairs to the trainer.")
        sampler = self.train_dataset.sampler(
            pairs_of_a_step(self.args, self._train_batch_size),
            shuffled=self.args.train_sampling_strategy == "random",
            drop_last=self.args.dataloader_drop_last,
        )
        return self._loaders.training(self.train_dataset, self._train_batch_size, sampler, self.data_collator)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[Any, None]:
        """Return the micro-batches of an optimizer step, and `None` for the number of items: losses are means over
        pairs.

        Map-style data are loaded one micro-batch at a time, so loading overlaps with training. A stream may end within
        the step, so all its micro-batches are loaded first.
        """
        assert self.train_dataset is not None
        if not self.train_dataset.is_stream:
            return LazyBatches(epoch_iterator, num_batches), None
        batches = list(islice(epoch_iterator, num_batches))
        if self._position is not None:
            for batch in batches:
                self._position.add(batch.pop(READ))
        return batches, None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the data loader for an evaluation: for the trainer's own `eval_dataset`, or a data set in that `dict`,
        always the same one."""
        own_sets = self._eval_sets()
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if eval_dataset is None:
            raise UserError(
                "Evaluation needs an `eval_dataset`, got None. Pass evaluation data to the trainer or to `evaluate`."
            )
        if isinstance(eval_dataset, str):
            eval_dataset = own_sets[eval_dataset]
        prepared = self._preparation.prepare(eval_dataset, name="eval", training=False)
        prepared = self._with_reference_errors(prepared)
        keep = any(prepared is pairs for pairs in own_sets.values())
        return self._eval_loader(prepared, keep=keep)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        prepared = self._preparation.prepare(test_dataset, name="test", training=False)
        return self._eval_loader(self._with_reference_errors(prepared), keep=False)

    def _eval_loader(self, pairs: Pairs, *, keep: bool) -> DataLoader:
        sampler = pairs.sampler(pairs_of_a_step(self.args, self.args.eval_batch_size))
        return self._loaders.evaluation(pairs, sampler, self.data_collator, keep=keep)

    def _prepare_data(
        self, train_dataset: Any, eval_dataset: Any, args: DiffusionSDPOConfig
    ) -> tuple[Pairs | None, Pairs | dict[str, Pairs] | None]:
        """Return the training and evaluation data as pairs, and choose `args.dataloader_num_workers` if it is
        `None`."""
        check_agreement({"train_dataset": outline(train_dataset), "eval_dataset": outline(eval_dataset)})
        prepare = self._preparation.prepare
        if train_dataset is not None:
            train_dataset = prepare(train_dataset, name="train", training=True)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepare(data, name=name, training=False) for name, data in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare(eval_dataset, name="eval", training=False)
        if args.dataloader_num_workers is None:
            evaluates = eval_dataset is not None
            choose_workers(args, train_dataset, resolution=image_size(args), evaluates=evaluates)
        return train_dataset, eval_dataset

    def _eval_sets(self) -> dict[str, Pairs]:
        """Return the evaluation data by name."""
        if self.eval_dataset is None:
            return {}
        return self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}

    def precompute_reference_errors(self) -> None:
        """Compute the reference's errors on the training and evaluation data, or read them from the cache, and free its
        memory.

        Does nothing without `precompute_ref_errors=True`. `train` calls it; if you do, call it in all processes.
        """
        if self._reference_errors is None:
            return
        for pairs in (self.train_dataset, *self._eval_sets().values()):
            if pairs is not None:
                self._with_reference_errors(pairs)
        self._reference_errors.release()

    def _with_reference_errors(self, dataset: Any) -> Any:
        """Return a data set, with `precompute_ref_errors` after adding the reference's errors to its items."""
        if self._reference_errors is not None and not dataset.has_reference_errors:
            check_prompt_padding("precompute_ref_errors", self.family, largest_batch(self.args))
            self._reference_errors.add_to(dataset)
        return dataset

    def _load_probe(self) -> list[ProbeInputs]:
        """Return this process's share of `winner_budget`'s probe, in batches."""
        assert self.train_dataset is not None
        pairs = next(iter(self._eval_sets().values()), self.train_dataset)
        batch_size = 2 * (self._train_batch_size or self.args.per_device_train_batch_size)
        if self.encoding is not None and self.family.prompt_padding == "start":
            batch_size = 1  # prompts were encoded one at a time; padding would change their embeddings
        if self.train_dataset.has_sources:
            batch_size = 1  # the sources of two pairs may have different sizes
        return probe_inputs(
            pairs.for_evaluation().sample(ProbeSettings(**self.args.winner_budget_kwargs).pairs),
            batch_size,
            self._inputs_of,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )

    # ---- Training ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """Train the model. See [`~transformers.Trainer.train`] for other arguments and the result.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): Path of a `checkpoint-*` folder, or `True` for the
                newest in `output_dir`. `"latest"` is that too, but starts from step 0 if there is none.

        Raises:
            `ValueError`: If there are no training data, or the checkpoint is damaged, has other settings, or contains
                files that could run code.
            `FloatingPointError`: If a loss or a gradient is not finite, or a weight is not when weights are saved or
                training ends.
            `KeyboardInterrupt`: After Ctrl-C or SIGTERM, once the checkpoint is written.
            `DiskFullError`: If the disk has too little space for a checkpoint or an image.
        """
        if self.train_dataset is None:
            raise UserError("Training needs a `train_dataset`, got None. Pass preference pairs to the trainer.")
        if self._engine_ready and self.engine.holds_shards:
            raise UserError(
                "Under DeepSpeed and FSDP, a trainer can `train` only once, because the engine has converted the "
                "weights. To continue, make a new trainer and pass `resume_from_checkpoint`."
            )
        facts: dict[str, Any] = {"model": self.origin.fingerprint, "eval_dataset": self._eval_fingerprint}
        if not self.train_dataset.is_stream:  # processes read different parts of streams
            facts["train_dataset"] = self._data_fingerprint
        check_agreement(facts)
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint  # transformers ignores this setting
        disk = naming_the_disk(self.args.output_dir, self.weight_files.bytes_needed)
        with disk, self.run_folder.locked(all_processes=True):
            point = self.run_files.resume_point(resume_from_checkpoint, self._setup)
            self.run_folder.begin(point, overwrite=self.args.overwrite_output_dir)
            with stopping_on_interrupt(self.interrupt, self.callback_handler, self.args):
                self.precompute_reference_errors()
                try:
                    return super().train(point, *args, **kwargs)
                finally:
                    self._leave_backward()

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any) -> Any:
        """Prepare the model as transformers does, then set up what needs it in the engine's wrapper."""
        # An earlier call of `train` may have stopped within an optimizer step.
        self.interrupt.reset()
        self._finite.reset()
        self.engine.complete_settings(exact_gradients=self.args.safeguard == "parameter")
        unrounded = self.engine.unrounded(self.denoiser)
        for weights in self._weight_copies:
            weights.keep_unrounded()
        self.engine.shard_before_preparing(self.denoiser, unrounded)
        # The checkpoint is read below, when reference and averaged weights are sharded too.
        with self.engine.preparing(cast(nn.Module, self.model)):
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.args.save_strategy != SaveStrategy.NO and not self.args.save_only_model:
            self.engine.check_resumable(self.optimizer)
        self.engine.restore_unrounded(unrounded)
        for weights in self._weight_copies:
            weights.prepare()
        self._engine_ready = True
        if resume_from_checkpoint is not None:
            self._load_optimizer_state(resume_from_checkpoint)
        self._leave_backward()
        if self._steps_in_backward:
            plain = unwrapped(self.optimizer)
            assert isinstance(plain, WeightByWeight)
            self._gradient_hooks = plain.step_in_backward()
            logger.info(
                "The optimizer steps within the backward pass, so gradients take no memory: nothing accumulates, clips "
                "or combines them."
            )
        if self.engine.casts_weights:
            self.family.settle_dtype()
        # The one of an earlier `train` has another wrapper of the model. Made here, it refuses an engine early.
        self._parameter_safeguard = self._make_parameter_safeguard()
        return prepared

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """Return transformers' choice of optimizer and its settings. One that rounds at random steps weight by
        weight."""
        optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if rounds_at_random(args):
            return weight_by_weight(optimizer), {**settings, "seed": args.seed}
        return optimizer, settings

    def _leave_backward(self) -> None:
        """Stop stepping the optimizer within backward passes."""
        for hook in self._gradient_hooks:
            hook.remove()
        self._gradient_hooks = []

    @property
    def parameter_safeguard(self) -> ParameterSafeguard | None:
        """Computes training steps with `safeguard="parameter"`; `None` with another safeguard. Each `train` makes a new
        one, and so does a first step outside of it."""
        if self._parameter_safeguard is None:
            self._parameter_safeguard = self._make_parameter_safeguard()
        return self._parameter_safeguard

    def _make_parameter_safeguard(self) -> ParameterSafeguard | None:
        """Make what [`parameter_safeguard`] returns."""
        args = self.args
        if args.safeguard != "parameter":
            return None
        assert args.safeguard_mu is not None, "The constructor sets `safeguard_mu`."
        backend = self.engine.gradient_backend()
        anchor = args.safeguard_settings.anchor or self.loss_spec.anchor
        if (anchor == "error" or args.mask_anchor) and not backend.retains_graph:
            refuse_dropout(self.denoiser, "`anchor: error` of `safeguard_kwargs`, or `mask_anchor`, under ZeRO-3")
        return self.parameter_safeguard_class(
            self.pair_forward,
            BranchGradients(backend, mu=args.safeguard_mu, anchor=anchor),
            self._meter,
            sorts_by_scores=self.loss_spec.needs_scores,
            low_memory=args.safeguard_settings.low_memory,
        )

    def _begin_steps(self) -> None:
        """Warn of settings that never have their turn, and measure the winners' errors for `winner_budget`, before the
        first step of a new or resumed run."""
        state = self.state
        state.compute_steps(self.args, state.max_steps)  # a checkpoint's state has the intervals of its own run
        self._first_step = state.global_step
        self._saved_step = -1
        if self.is_world_process_zero():
            for message in without_turn(self.args, state.max_steps):
                logger.warning(message)
            if state.global_step >= state.max_steps:
                logger.warning(
                    "Training is complete: the checkpoint is of step %d, and the run ends at step %d. Raise "
                    "`max_steps` or `num_train_epochs` to continue.",
                    state.global_step,
                    state.max_steps,
                )
        if self.winner_budget is not None:
            self.winner_budget.begin(self.model_wrapped, self._load_probe())

    def _after_step(self, step: int) -> None:
        """Update the averaged weights, the winner budget and the synchronized reference where they are due after
        optimizer step number `step` (the first is 1)."""
        self.optimizer.eval()  # a schedule-free optimizer has other weights within a step
        if self.average is not None:
            self.average.after_step(step)
        if self.winner_budget is not None and step % ProbeSettings(**self.args.winner_budget_kwargs).steps == 0:
            self.winner_budget.update(self.model_wrapped)
        if self.args.sync_ref_model and step % self.args.ref_model_sync_steps == 0:
            self.reference.update(self.args.ref_model_mixup_alpha)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train for one epoch, unless the run has reached `max_steps`, which transformers checks only after a step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        assert self.train_dataset is not None
        self.train_dataset.set_epoch(kwargs["epoch"])
        if isinstance(self.train_dataset, PreferenceIterableDataset):
            batches = kwargs["steps_trained_in_current_epoch"]
            checkpoint = kwargs["resume_from_checkpoint"]
            self._position = load_position(self.args, batches, checkpoint)
            kwargs["train_dataloader"].dataset.start_at(self._position)
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        self._make_up_evaluation()  # a resumed run that was complete has taken no step
        if self.state.global_step not in (self._first_step, self._saved_step):
            self.run_files.verify_weights()
        loads_best = self.args.load_best_model_at_end and not self.interrupt.stops
        if self.winner_budget is not None:
            self.winner_budget.probe = []  # frees the device memory of the probe
        # With `save_total_limit=1`, transformers would delete other checkpoints here.
        with temporarily(self.args, save_total_limit=None, load_best_model_at_end=loads_best):
            output = super()._finalize_training(trial, num_train_samples, start_time)
        self.publisher.wait()
        return output if self.state.global_step > self._first_step else output._replace(training_loss=math.nan)

    # ---- A step -----------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device. Data loaders leave batches on the CPU, so only the current micro-batch takes
        memory there. Under DeepSpeed, transformers' method would round scores, errors and encoded images to the dtype
        of the weights."""
        return on_device(inputs, self.args.device)

    def _inputs_of(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of items, on the device."""
        return self._prepare_inputs(self.data_collator(items))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, PreferenceLossOutput]:
        """Return the scalar loss of a batch of B pairs, and with `return_outputs` its [`PreferenceLossOutput`] too.

        Override it to change the loss; that works with every safeguard. With `safeguard="parameter"`, the autograd
        graph ends at the predictions, so terms that you add may depend on the model only through them.
        """
        safeguard = self.parameter_safeguard if model.training else None
        predictions = (self.pair_forward if safeguard is None else safeguard).predict_pairs(model, inputs)
        outputs = self.pair_forward.loss(predictions)
        if model.training:
            self._finite.watch(outputs.pair_losses, inputs["rows"], last=self.accelerator.sync_gradients)
            self._meter.add(self.pair_forward.logged_metrics(outputs), len(inputs["seeds"]))
            if self._finite.before_backward:
                self._finite.verify(self.state.global_step + 1)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if self.parameter_safeguard is not None:
            return self._training_step_by_branch(self.parameter_safeguard, model, inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._finite.verify(self.state.global_step + 1)
        return loss

    def _training_step_by_branch(
        self, safeguard: ParameterSafeguard, model: nn.Module, inputs: dict[str, Any]
    ) -> torch.Tensor:
        """Train on one micro-batch, with one backward pass for winners and one for losers. The safeguard combines the
        two gradients after the last micro-batch of an optimizer step."""
        model.train()
        self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        step = self.state.global_step + 1
        share = 1 / self.current_gradient_accumulation_steps
        with self.compute_loss_context_manager(), safeguard.accumulating():
            loss = cast(torch.Tensor, self.compute_loss(model, inputs))
            safeguard.backward_branches(loss, share=share)
        self._finite.verify(step)
        if self.accelerator.sync_gradients:
            safeguard.step()
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return loss.detach() / self.current_gradient_accumulation_steps

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        if self._gradient_hooks:
            grad_norm = cast(WeightByWeight, unwrapped(self.optimizer)).gradient_norm()
        norm = full_tensor(super()._get_grad_norm(model, grad_norm))  # under FSDP2, the norm is a DTensor
        if self.state.global_step == self._first_step and norm is not None:
            is_zero = torch.zeros((), device=self.args.device) + norm == 0
            self._meter.add({FIRST_ZERO: is_zero}, 1)  # read with the metrics, at the next log
        return norm

    # ---- Evaluation -------------------------------------------------------------------------------------------------

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
            encoded = {**inputs, "encoded": self.pair_forward.encode(inputs)}  # once for all draws
            draws = [
                self.pair_forward.predict_pairs(
                    model, {**encoded, "seeds": seeds[start : start + pairs]}, self._evaluation.weights
                )
                for start in range(0, len(seeds), pairs)
            ]
            real = inputs.get("counted", real_pairs(self.accelerator.gradient_state, pairs, self.args.process_index))
            outputs = self._evaluation.add(draws, real)
        loss = torch.stack([output.loss.detach() for output in outputs]).mean()
        self._counted = (torch.arange(pairs, device=loss.device) < real).float()
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
            raise UserError(
                "Under DeepSpeed and FSDP, a model can be evaluated only after `train` has set up the engine. Set "
                "`eval_on_start=True`, call `evaluate` after `train`, or evaluate without DeepSpeed and FSDP."
            )
        settings = (description, prediction_loss_only, ignore_keys)
        output = self._measured_loop(dataloader, *settings, metric_key_prefix)
        if self.average is not None:
            prefix = f"{metric_key_prefix}_{EMA_FOLDER}"
            averaged = self._measured_loop(dataloader, *settings, prefix, weights=self.average)
            assert output.metrics is not None and averaged.metrics is not None
            output.metrics.update(averaged.metrics)
        scores = self.sample_scores
        if scores is not None and scores.step == self.state.global_step and metric_key_prefix.startswith("eval"):
            assert output.metrics is not None
            output.metrics.update({f"eval_{name}": value for name, value in scores.metrics.items()})
        return output

    def _measured_loop(
        self, dataloader: DataLoader, *settings: Any, weights: EMAWeights | None = None
    ) -> EvalLoopOutput:
        """Evaluate once on all data, with the averaged weights or (`weights` is `None`) the policy's. Return the output
        with the metrics of the pairs."""
        self._evaluation.drain(self.accelerator)
        draws = 1 if self.reference.is_precomputed else draws_of_noise(dataloader.dataset)
        self._evaluation.begin(
            dataloader.dataset,
            settings[-1],
            before_training=self.state.global_step == 0,
            draws=draws,
            weights=weights,
        )
        pairs = dataloader.dataset
        if isinstance(pairs, Pairs) and pairs.marks_repeated:
            self.gather_function = self._gather_counted  # transformers resets this attribute after the evaluation
        output = super().evaluation_loop(dataloader, *settings)
        measured = self._evaluation.drain(self.accelerator)
        assert output.metrics is not None
        output.metrics.update({f"{settings[-1]}_{name}": value for name, value in measured.items()})
        return output

    def _gather_counted(self, values: torch.Tensor) -> torch.Tensor:
        """Gather the values of the pairs from all processes, without repeated pairs that only fill up a batch.
        accelerate cannot find these in the last batch of a stream or of an image size."""
        gathered = self.accelerator.gather(values)
        counted = self.accelerator.gather(self._counted)
        return gathered[counted > 0] if len(gathered) == len(counted) else gathered

    def verdict(self) -> Verdict:
        """Judge by the last evaluation whether training has raised the error on preferred images and taught the
        preference. Without held-out pairs, the verdict is "unknown"."""
        step = final_step(self.args, self.state)
        images = "" if self.sample_scores is None else self.sample_scores.sentence(step or self.state.global_step)
        return verdict_of(self.state.log_history, self.run_facts, step, images)

    # ---- Logging ----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.state.global_step == self._first_step:
            logs = {name: value for name, value in logs.items() if name != "train_loss"}  # 0 in a run without steps
        if "loss" in logs:
            metrics = self._meter.drain(self.accelerator)
            if metrics.pop(FIRST_ZERO, 0.0) == 1 and self.is_world_process_zero():
                self._warn_of_zero_gradient()
            logs = {**logs, **metrics}
        super().log(logs, start_time)

    def _warn_of_zero_gradient(self) -> None:
        """Warn that the first step has trained nothing."""
        logger.warning(
            "The gradient of the first step (step %d) is exactly 0: it has trained nothing, and if `grad_norm` stays "
            "0, nothing will. Check the loss and the safeguard (`loss_type=%r`, `safeguard=%r`), and the scores, "
            "weights and masks of the pairs.",
            self._first_step + 1,
            self.args.loss_type,
            self.args.safeguard,
        )

    # ---- Resuming ---------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self.run_files.load(Path(resume_from_checkpoint), self.model_wrapped)

    def _load_optimizer_state(self, checkpoint: str) -> None:
        """Load the states of optimizer, schedule and loss scaler, and under an engine that shards weights (DeepSpeed,
        FSDP) the weights too, which are sharded by now."""
        self.engine.check_resumable(self.optimizer)
        with self.run_files.loading_optimizer(self.optimizer, self.lr_scheduler):
            if self.engine.holds_shards:
                self.run_files.load(Path(checkpoint), self.model_wrapped)
            self._load_optimizer_and_scheduler(checkpoint)
            self._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random state, the last thing before the first step of a resumed run. Then make up for an
        evaluation, which uses random numbers too."""
        with self.run_files.reading():
            super()._load_rng_state(checkpoint)
        self._make_up_evaluation()

    def _make_up_evaluation(self) -> None:
        """Evaluate (and save) before the first step of a resumed run if an interrupt cancelled the evaluation due after
        the checkpoint's step. Without it, another checkpoint might become the best one."""
        state = self.state
        is_done = any(is_evaluation(entry) and entry["step"] == state.global_step for entry in state.log_history)
        if is_done or state.global_step in (0, self._saved_step) or state.global_step != self._first_step:
            return
        due = is_due(self.args, state)
        if due.should_evaluate:
            self.control.should_evaluate = True
            self.control.should_save = due.should_save
            no_loss = torch.zeros(())  # not logged, as no step was taken since the last log
            self._maybe_log_save_evaluate(no_loss, None, self.model_wrapped, None, state.epoch or 0, None, 0.0)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self.run_files.load_best(Path(self.state.best_model_checkpoint), self.model_wrapped)

    # ---- Saving -----------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the tuned weights in the formats of diffusers and PEFT. Call it in all processes.

        Args:
            output_dir (`str`, *optional*): Folder for the files. If unset, `args.output_dir`.
        """
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        is_output_dir = folder.resolve() == self.run_folder.path.resolve()
        pushes = self.args.push_to_hub and not _internal_call
        if not (is_output_dir and pushes):  # else `push_to_hub` saves the files when earlier uploads are done
            lock: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if is_output_dir:
                lock = self.run_folder.locked(all_processes=self.engine.holds_shards)
            with naming_the_disk(folder, self.weight_files.bytes_needed), lock:
                self.run_files.save(folder, self._setup())
        if pushes:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run_dir = Path(self.args.output_dir)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self.run_files.writing_checkpoint(run_dir / name) as partial:
            with temporarily(self.args, output_dir=str(partial.parent), push_to_hub=False):
                super()._save_checkpoint(model, trial)
            if self._position is not None and not self.args.save_only_model:
                save_position(self._position, self.args, partial)
            if self.state.best_model_checkpoint == str(partial):  # transformers has stored the temporary path
                self.state.best_model_checkpoint = str(run_dir / name)
                if self.args.should_save:
                    self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_progress(run_dir / name)
        self.run_files.checkpoints.rotate(run_dir, self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.engine.holds_shards:
            self.run_files.save_sharded_optimizer(output_dir, self.model_wrapped, self.optimizer, self.lr_scheduler)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _setup(self) -> dict[str, Any]:
        """Return what describes the run: model, data, engine and settings. It is written to a file, which a resumed run
        must match."""
        return {
            **self.weight_files.describe(),
            "reference": self.origin.reference,
            "given_reference": self.origin.gave_reference,
            "engine": self.engine.name,
            "processes": self.accelerator.num_processes,
            "weights_before_training": self.origin.fingerprint,
            "pipeline": self._pipeline_facts,
            BASE: public_base(self.origin.base),
            "train_data": self._data_fingerprint,
            "eval_data": self._eval_fingerprint,
            **{name: getattr(self.args, name) for name in resume_settings()},
            "stored_crops": stored_crops(self.args),
        }

    @functools.cached_property
    def _data_fingerprint(self) -> dict[str, Any] | None:
        return None if self.train_dataset is None else self.train_dataset.fingerprint()

    @functools.cached_property
    def _eval_fingerprint(self) -> dict[str, Any] | None:
        prepared = self._preparation.has_prepared  # a user may set other data after the trainer was made
        return {name: data.fingerprint() for name, data in self._eval_sets().items() if prepared(data)} or None

    # ---- Publishing -------------------------------------------------------------------------------------------------

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        """Write the model card, `README.md` in the output folder.

        Args:
            model_name (`str`, *optional*): Name of the model. If unset, the name of the output folder.
            dataset_name (`str`, *optional*): Hub id of the training data. If unset, the trainer's attribute
                `dataset_name`.
            tags (`str` or `list[str]`, *optional*): Tags in addition to the trainer's own.
            license (`str`, *optional*): Identifier of the licence. If unset, the base model's.
        """
        if self.is_world_process_zero():
            with naming_the_disk(self.args.output_dir):
                self._write_card(model_name=model_name, dataset_name=dataset_name, tags=tags, license=license)

    def _end_report(self) -> None:
        """Write the model card, and print which files the run has written and how to load the weights. For the first
        process only."""
        self._write_card(keep_edited=True)
        loading_code = None if self.interrupt.stops else self.model_card.loading_code()
        report = logger.info if self.args.disable_tqdm else say
        for line in run_lines(Path(self.args.output_dir), self.state, loading_code):
            report(line)

    def _write_card(self, *, keep_edited: bool = False, tags: Any = None, **facts: Any) -> bool:
        samples = self.sample_images
        gallery = [] if samples is None else samples.newest_gallery()
        comparison = [] if samples is None else samples.comparison(self.run_folder.path)
        facts["model_name"] = facts.get("model_name") or Path(self.args.output_dir).absolute().name
        facts["dataset_name"] = facts.get("dataset_name") or self.dataset_name
        return self.model_card.write(
            self.state,
            data=None if self.train_dataset is None else self.train_dataset.report,
            is_stream=self.train_dataset is not None and self.train_dataset.is_stream,
            plots=plots_of(self.state),
            keep_edited=keep_edited,
            hub_model_id=self.hub_model_id,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            verdict=str(self.verdict()),
            gallery=gallery,
            comparison=[(pair.prompt, pair.before, pair.after) for pair in comparison],
            **facts,
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the Hub repository `args.hub_model_id` if it does not exist. Call it in all processes.

        Args:
            token (`str`, *optional*): Token for the Hub. If unset, `args.hub_token`.
            private (`bool`, *optional*): Whether a new repository is private. If unset, `args.hub_private_repo`.

        Raises:
            `PublishingError`: In all processes, if the Hub refuses or does not answer.
        """
        try:
            self.hub_model_id = self.publisher.create_repository(token, private)
        except PublishingError as error:
            raise PublishingError(
                f"{error} Nothing was trained. To train without the Hub, leave out `push_to_hub=True` and call "
                "`push_to_hub()` afterwards."
            ) from error

    def push_to_hub(  # type: ignore[override]
        self, commit_message: str | None = "End of training", blocking: bool = True, **kwargs: Any
    ) -> Any:
        """Upload the tuned weights and the model card to the Hub repository `args.hub_model_id`, without checkpoints,
        pickle files and logs.

        It saves the files in `args.output_dir` first, and they stay there if the upload fails. Call it again to
        continue: large files that have arrived are not sent again.

        Args:
            commit_message (`str`, *optional*): Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Whether to wait for the upload. If `False`, a failure is
                only logged.
            kwargs: `token`, `revision` and `private` of the repository, and arguments of
                [`~DiffusionSDPOTrainer.create_model_card`].

        Returns:
            In the first process, the result of [`~huggingface_hub.HfApi.upload_folder`], or a `Future` of it if
            `blocking` is `False`. In all others, `None`.

        Raises:
            `PublishingError`: In all processes, if the Hub refuses or does not answer.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token, revision, private = (kwargs.pop(name, None) for name in ("token", "revision", "private"))
        model_name = kwargs.pop("model_name", None)
        self.publisher.wait()  # an upload in progress still reads the files that saving overwrites
        uploaded = None
        with self.run_folder.locked(all_processes=True):
            with failing_together(PublishingError, during_upload=True):
                self.save_model(_internal_call=True)
            with self.publisher.failing_after_save():
                if self.hub_model_id is None:
                    self.hub_model_id = self.publisher.create_repository(token, private)
                if self.is_world_process_zero():
                    model_name = model_name or self.hub_model_id.split("/")[-1]
                    self._write_card(model_name=model_name, keep_edited=True, **kwargs)
                    options = {"token": token, "revision": revision, "blocking": blocking}
                    uploaded = self.publisher.upload(commit_message, **options)
        return uploaded

    def _push_progress(self, checkpoint: Path) -> None:
        """Upload the current weights during training, and the new checkpoint if `hub_strategy` asks for it."""
        if not self.publisher.is_ready_for_progress():
            return
        with failing_together(PublishingError, during_upload=True):
            self.run_files.save(self.run_folder.path, self._setup())
            if self.is_world_process_zero():
                self._write_card(model_name=self.hub_model_id.split("/")[-1], keep_edited=True)
                self.publisher.upload_progress(checkpoint, self.state)

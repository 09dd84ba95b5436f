"""The overrides of transformers' Trainer that write, read and publish files."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.pairs import PreferenceIterableDataset
from ..engines.engine import Engine
from ..engines.engine_settings import loading_unsharded
from ..engines.processes import check_agreement, failing_together
from ..losses import LossSpec
from ..models.ema import EMA_FOLDER, EMAWeights
from ..models.frozen_components import FrozenComponents
from ..models.loading import LoadedModel
from ..models.weight_copies import WeightCopy
from ..reporting.console import say
from ..reporting.run_callbacks import plots_of, run_lines
from ..reporting.sample_images import SAMPLES_FOLDER, final_step, newest_gallery
from ..reporting.tracked_images import TrackedImages
from ..reporting.training_curves import CURVES_FILE
from ..reporting.verdict import RunFacts, Verdict, verdict_of
from ..saving.interrupts import stopping_on_interrupt, was_interrupted
from ..saving.model_card import RunCard, mean_loss
from ..saving.publishing import Publisher, PublishingError
from ..saving.run_files import RunFiles
from ..saving.run_folder import PREVIOUS_RUN, RunFolder
from ..saving.starting_point import BASE, Origin, public_base
from ..saving.weights import WeightFiles
from ..step.finite_check import FiniteCheck
from ..utils.disk import naming_the_disk
from ..utils.files import VERDICT_FILE, VERDICT_PLOT
from .callbacks import arrange
from .config.all_arguments import temporarily
from .config.declaring import RESUME
from .data_preparation import PREPARED
from .diffusion_sdpo_config import DiffusionSDPOConfig, settings_with
from .preparing import stored_crops

logger = logging.getLogger(__name__)

REPORTS = (SAMPLES_FOLDER, "noise_bins*.png", CURVES_FILE, VERDICT_FILE, VERDICT_PLOT, TRAINER_STATE_NAME)
# The state names local folders.
NOT_PUBLISHED = (f"{PREFIX_CHECKPOINT_DIR}-*", f"{PREVIOUS_RUN}-*", TRAINER_STATE_NAME)


class FileOverrides(Trainer):
    """Overrides of [`~transformers.Trainer`] that concern files: a run's folder, checkpoints, resuming, the model card
    and the Hub. The last group of attributes is the step's and the evaluation's."""

    weight_files: WeightFiles  # formats of the tuned weights
    run_folder: RunFolder
    run_files: RunFiles  # results and checkpoints in it
    publisher: Publisher
    run_facts: RunFacts  # for the verdict
    tracked_images: TrackedImages
    model_card: RunCard
    dataset_name: str | None = None  # of the training data on the Hub, for the model card
    _first_step: int = 0  # that `train` began or resumed at
    _saved_step: int = -1  # of the last checkpoint of this training
    _began: float = 0.0  # when training began, on a clock that is never set
    _partial_dir: str | None = None  # where a checkpoint is being written

    args: DiffusionSDPOConfig
    engine: Engine
    origin: Origin
    frozen_components: FrozenComponents
    hub_model_id: Any
    _engine_ready: bool
    _finite: FiniteCheck
    precompute_reference_errors: Callable[[], None]
    _tag_names: list[str]
    _name: str

    def _set_up_files(
        self, args: DiffusionSDPOConfig, loaded: LoadedModel, adapter: str | None, loss_spec: LossSpec
    ) -> None:
        """Make what must be there before transformers' constructor, which may create the repository, and before weights
        are sharded."""

        def whole_pipeline() -> DiffusionPipeline:
            with loading_unsharded(args):  # the first process alone calls it
                return loaded.whole_pipeline()

        linked = self.origin.folder if args.link_full_pipeline else None
        self.weight_files = WeightFiles(loaded.pipeline, loaded.family.denoiser_name, adapter, whole_pipeline, linked)
        self.publisher = Publisher(args, NOT_PUBLISHED)
        self.tracked_images = TrackedImages()
        self.run_facts = RunFacts(
            has_reference=loss_spec.needs_reference,
            reference_moves=args.sync_ref_model,
            reference_was_given=self.origin.gave_reference,
            uses_loser=loss_spec.uses_loser,
            safeguard=args.safeguard,
            decays=not str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)).startswith("constant"),
            num_noise_bins=args.num_noise_bins,
            average_suffix=f"_{EMA_FOLDER}",
            swapped_labels=args.swap_labels,
            safeguard_mu=args.safeguard_mu,
        )

    def _set_up_run(
        self,
        own_callbacks: Sequence[TrainerCallback],
        weight_copies: Sequence[WeightCopy],
        average: EMAWeights | None,
        controllers: Sequence[Any],
    ) -> None:
        """Make what needs transformers' constructor to have run."""
        arrange(self.callback_handler, own_callbacks)
        self.tracked_images.attach(self.callback_handler.callbacks)
        family = self.frozen_components.family
        self.model_card = RunCard(
            self.args,
            family,
            lora=self.weight_files.describe()["lora"],
            full_pipeline=self.args.save_full_pipeline,
            base_model=self.origin.name_or_path,
            base_folder=self.origin.folder,
            trainer_name=self._name,
            settings=settings_with(RESUME),
        )
        self.run_folder = RunFolder(self.args, list(family.pipeline.components), REPORTS)
        self.run_files = RunFiles(
            self.args,
            self.engine,
            self.weight_files,
            weight_copies=weight_copies,
            average=average,
            controllers=controllers,
            full_pipeline=self.args.save_full_pipeline,
            trust_pickles=self.args.trust_checkpoint,
            unpublished={BASE: self.origin.base},
        )

    # ---- Training, resuming ---------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """Train; see [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A `checkpoint-*` folder, `True` for the newest one in
                `output_dir`, or `"latest"` for the same, and a new start if there is none.

        Raises:
            `ValueError`: If there is nothing to train on, or the checkpoint is damaged, of another set-up or could run
                code.
            `FloatingPointError`: If a loss or, at a save or the end, a weight is not finite.
            `KeyboardInterrupt`: After Ctrl-C or SIGTERM, once the checkpoint is written (`checkpoint_on_interrupt`).
            `DiskFullError`: If a checkpoint or an image does not fit on the disk.
        """
        if self.train_dataset is None:
            raise ValueError("Training needs a `train_dataset`, got None. Pass preference pairs to the trainer.")
        if self._engine_ready and self.engine.holds_shards:
            raise ValueError(
                "Under DeepSpeed and FSDP a trainer trains once: the engine keeps the weights in its own form. Make a "
                "new trainer and pass `resume_from_checkpoint` to go on."
            )
        check_agreement(self._facts_of_all_processes())
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint  # transformers leaves it to scripts
        disk = naming_the_disk(self.args.output_dir, self.weight_files.bytes_needed)
        with disk, self.run_folder.locked(all_processes=True):
            point = self.run_files.resume_point(resume_from_checkpoint, self._setup)
            self.run_folder.begin(point, overwrite=self.args.overwrite_output_dir)
            interruptible: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if self.args.checkpoint_on_interrupt:
                interruptible = stopping_on_interrupt(self.args, self.callback_handler, lambda: self.state.global_step)
            with interruptible:
                self.precompute_reference_errors()
                return super().train(point, *args, **kwargs)

    def _facts_of_all_processes(self) -> dict[str, Any]:
        """What must be the same in all processes, besides settings. A stream may be another part in each of them."""
        facts: dict[str, Any] = {"model": self.origin.fingerprint, "eval_dataset": self._eval_fingerprint}
        if not isinstance(self.train_dataset, PreferenceIterableDataset):
            facts["train_dataset"] = self._data_fingerprint
        return facts

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """Logging, saving and evaluation steps are this run's, not the checkpoint's."""
        progress = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        self._first_step = self.state.global_step
        self._saved_step = -1
        self._began = time.monotonic()
        return progress

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """transformers checks for the end of the run only after a step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        self._finite.verify_gradient()
        if self.state.global_step not in (self._first_step, self._saved_step):
            self.run_files.verify_weights(self.model_wrapped)
        began = time.time() - (time.monotonic() - self._began)  # the clock may have been set since
        settings: dict[str, Any] = {"save_total_limit": None}  # with 1, transformers would delete all but the best
        if was_interrupted(self.callback_handler.callbacks):
            settings["load_best_model_at_end"] = False
        with temporarily(self.args, **settings):
            output = super()._finalize_training(trial, num_train_samples, began)
        if self.state.global_step == self._first_step:
            return output._replace(training_loss=mean_loss(self.state.log_history) or math.nan)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs and self.state.global_step == self._first_step:
            del logs["train_loss"]  # transformers' mean over no steps, 0
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self.run_files.load(Path(resume_from_checkpoint), self.model_wrapped)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.engine.check_resumable(self.optimizer)
        with self.run_files.loading_optimizer(self.optimizer, self.lr_scheduler):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_engine_checkpoint(self, checkpoint: str) -> None:
        """Load a checkpoint into weights and optimizer that an engine has sharded."""
        self.engine.check_resumable(self.optimizer)
        with self.run_files.loading_optimizer(self.optimizer, self.lr_scheduler):
            self.run_files.load(Path(checkpoint), self.model_wrapped)
            super()._load_optimizer_and_scheduler(checkpoint)
        self._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with self.run_files.reading():
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with self.run_files.reading():
            super()._load_scaler(checkpoint)

    def _load_best_model(self) -> None:
        self.run_files.load_best(Path(self.state.best_model_checkpoint), self.model_wrapped)

    # ---- Saving ---------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the tuned weights in the formats of diffusers and PEFT; under every engine, all processes must call it.

        Args:
            output_dir (`str`, *optional*): `args.output_dir` if unset.
        """
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        is_output_dir = folder.resolve() == self.run_folder.path.resolve()
        pushes = self.args.push_to_hub and not _internal_call
        if not (is_output_dir and pushes):  # `push_to_hub` saves there itself, after uploads in progress
            lock: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if is_output_dir:
                lock = self.run_folder.locked(all_processes=self.engine.holds_shards)
            with naming_the_disk(folder, self.weight_files.bytes_needed), lock:
                self._save(output_dir)
        if pushes:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        self.run_files.save(folder, self.model_wrapped, self._setup())

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._finite.verify_gradient()
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self.run_files.writing_checkpoint(run_dir / name) as partial:
            self._partial_dir = str(partial.parent)
            try:
                with temporarily(self.args, push_to_hub=False):
                    super()._save_checkpoint(model, trial)
            finally:
                self._partial_dir = None
            if self.state.best_model_checkpoint == str(partial):  # transformers takes the folder that it has written
                self.state.best_model_checkpoint = str(run_dir / name)
                if self.args.should_save:
                    self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))
        self.run_files.checkpoints.rotate(run_dir, self.state.best_model_checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        """The folder of checkpoints: while one is being written, a temporary one on the same disk."""
        return self._partial_dir or super()._get_output_dir(trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.engine.holds_shards:
            self.run_files.save_sharded_optimizer(output_dir, self.model_wrapped, self.optimizer, self.lr_scheduler)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _setup(self) -> dict[str, Any]:
        """Return the content of the set-up file."""
        return {
            **self.weight_files.describe(),
            "reference": self.origin.reference,
            "given_reference": self.origin.gave_reference,
            "engine": self.engine.name,
            "processes": self.accelerator.num_processes,
            "weights_before_training": self.origin.fingerprint,
            BASE: public_base(self.origin.base),
            "train_data": self._data_fingerprint,
            "eval_data": self._eval_fingerprint,
            "run_id": self.run_folder.run_id,
            **{name: getattr(self.args, name) for name in settings_with(RESUME)},
            "latent_crops": stored_crops(self.args),
        }

    @functools.cached_property
    def _data_fingerprint(self) -> dict[str, Any] | None:
        return self.train_dataset.fingerprint() if isinstance(self.train_dataset, PREPARED) else None

    @functools.cached_property
    def _eval_fingerprint(self) -> dict[str, Any] | None:
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        return {name: data.fingerprint() for name, data in sets.items() if isinstance(data, PREPARED)} or None

    # ---- Publishing -----------------------------------------------------------------------------------------------

    def verdict(self) -> Verdict | None:
        """How the error on preferred images has changed, by the last evaluation, or the last logs of training without
        one; `None` if nothing was measured."""
        return verdict_of(self.state.log_history, self.run_facts, final_step(self.args, self.state))

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        """Write a model card, `README.md` in the output folder.

        Args:
            model_name (`str`, *optional*): Name of the model; the output folder's if unset.
            dataset_name (`str`, *optional*): Hub id of the training data; the attribute `dataset_name` if unset.
            tags (`str` or `list[str]`, *optional*): Beside the trainer's own.
            license (`str`, *optional*): Identifier of the licence; that of the base model applies if unset.
        """
        if self.is_world_process_zero():
            with naming_the_disk(self.args.output_dir):
                self._write_card(model_name=model_name, dataset_name=dataset_name, tags=tags, license=license)

    def _end_report(self) -> None:
        """Write the card, and tell what the run has left and how to load it; the first process only."""
        written = self._write_card(keep_edited=True)
        tell, folder = logger.info if self.args.disable_tqdm else say, Path(self.args.output_dir)
        found = {"samples": bool(newest_gallery(self.callback_handler.callbacks)), "card": written}
        interrupted = was_interrupted(self.callback_handler.callbacks)
        loading_code = None if interrupted else self.model_card.loading_code()
        for line in run_lines(folder, self.state, loading_code, **found):
            tell(line)

    def _write_card(self, *, ended: bool = True, keep_edited: bool = False, tags: Any = None, **facts: Any) -> bool:
        verdict = self.verdict()
        facts["model_name"] = facts.get("model_name") or Path(self.args.output_dir).absolute().name
        facts["dataset_name"] = facts.get("dataset_name") or self.dataset_name
        return self.model_card.write(
            self.state,
            first_step=self._first_step,
            data=self.train_dataset.report if isinstance(self.train_dataset, PREPARED) else None,
            is_stream=isinstance(self.train_dataset, PreferenceIterableDataset),
            plots=plots_of(self.state),
            keep_edited=keep_edited,
            ended=ended,
            hub_model_id=self.hub_model_id,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            verdict=None if verdict is None else verdict.finding,
            gallery=newest_gallery(self.callback_handler.callbacks),
            **facts,
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository `args.hub_model_id` unless it exists; all processes must call it. `token` and `private`
        are `args.hub_token` and `args.hub_private_repo` if unset. `PublishingError` in all processes, if the Hub
        refuses, or does not answer."""
        try:
            self.hub_model_id = self.publisher.create_repository(token, private)
        except PublishingError as error:
            raise PublishingError(
                f"{error} Nothing was trained. Without `push_to_hub=True` a run needs no Hub, and can be published "
                "afterwards by `push_to_hub()`."
            ) from error

    def push_to_hub(  # type: ignore[override]
        self, commit_message: str | None = "End of training", blocking: bool = True, **kwargs: Any
    ) -> Any:
        """Upload the tuned weights and the model card to `args.hub_model_id`, without checkpoints, pickles and logs.

        They are saved in `args.output_dir` first. If the upload fails, the files stay, and a second call continues:
        large files that arrived are not sent again.

        Args:
            commit_message (`str`, *optional*): Of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Whether to wait for the upload. A failure is logged
                otherwise.
            kwargs: `token`, `revision`, `private`, and arguments of [`~DiffusionSDPOTrainer.create_model_card`].

        Returns:
            What [`~huggingface_hub.HfApi.upload_folder`] returns, or its `Future`; `None` in all processes but the
            first.

        Raises:
            `PublishingError`: In all processes, if the Hub refuses, or answers no attempt.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token, revision, private = (kwargs.pop(name, None) for name in ("token", "revision", "private"))
        model_name = kwargs.pop("model_name", None)
        self._finish_current_push()  # it reads the files that are written next
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
                    options = {"blocking": blocking, "training": self.is_in_train}
                    uploaded = self.publisher.upload(commit_message, token=token, revision=revision, **options)
        return uploaded

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish during training. transformers would look for its own files, and upload pickles."""
        if not self.publisher.is_ready_for_progress():
            return
        with failing_together(PublishingError, during_upload=True):
            self._save(self.args.output_dir)
            if self.is_world_process_zero():
                self._write_card(model_name=self.hub_model_id.split("/")[-1], ended=False, keep_edited=True)
                self.publisher.upload_progress(Path(checkpoint_folder), self.state)

    def _finish_current_push(self) -> None:
        self.publisher.wait()

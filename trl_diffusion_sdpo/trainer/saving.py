"""How a [`DiffusionSDPOTrainer`] writes and reads what it trains."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..artifacts.disk import naming_the_disk
from ..artifacts.weights import read_weights, remove_local_paths, save_weights, trained_weights, write_setup
from ..losses.preference import LOSS_KWARG_RANGES
from ..models.ema import EMA_FOLDER
from ..runs.checkpoint_folders import CheckpointFolders, holds_optimizer
from ..runs.manifest import ARGS_FILE
from ..runs.resuming import check_resumable, data_fingerprint, keep_optimizer_settings, stored_settings
from ..runs.run_folder import RunFolder
from ..runs.unpickling import tensors_only
from .run_control import borrowed, stopping_on_interrupt

COMPONENT_CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
# What decides where training goes; a run that resumes with other values is told so.
SETTINGS_OF_THE_PATH = (
    "loss_type",
    "beta",
    "safeguard",
    "safeguard_mu",
    "safeguard_granularity",
    "safeguard_eps",
    "safeguard_anchor",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "mixed_precision",
    "vae_dtype",
    "resolution",
    "random_crop",
    "random_flip",
    "image_interpolation",
    "proportion_empty_prompts",
    "timestep_range",
    "timesteps",
    "weighting_scheme",
    "logit_mean",
    "logit_std",
    "mode_scale",
    "timestep_weighting",
    "guidance_scale",
    "snr_gamma",
    "noise_offset",
    "input_perturbation",
    "num_noise_bins",
    "loser_noise_range",
    "winner_budget",
    "winner_budget_pairs",
    "winner_budget_steps",
    "ema_decay",
    "safeguard_preconditioner",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "seed",
    "data_seed",
)


class SavingMixin:
    """Overrides of [`~transformers.Trainer`] that concern files."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """Train; see [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A `checkpoint-*` folder, `True` for the newest in
                `output_dir` that is whole, or `"latest"` for the same, and a new start where there is none.

        Raises:
            `ValueError`: If there is nothing to train on, or the checkpoint is damaged, of another set-up or could run
                code.
            `FloatingPointError`: If a loss is not finite; the weights are as they were before that step.
            `KeyboardInterrupt`: After Ctrl-C or SIGTERM, once the checkpoint is written (`checkpoint_on_interrupt`).
            `DiskFullError`: If a checkpoint or an image finds no room; the message names the disk.
        """
        if self.train_dataset is None:
            raise ValueError("Training needs a `train_dataset`, got None. Pass preference pairs to the trainer.")
        if self._engine_ready and self._holds_parts():
            raise ValueError(
                "Under DeepSpeed and FSDP a trainer trains once: the engine keeps the weights in its own form. Make a "
                "new trainer and pass `resume_from_checkpoint` to go on."
            )
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint  # which the Trainer leaves to scripts
        disk = naming_the_disk(self.args.output_dir, self._bytes_to_save)
        with disk, self.run_folder.held(together=True):
            point = self._checkpoints.resume_point(resume_from_checkpoint, self.args.output_dir)
            self._settings_before = {} if point is None else stored_settings(Path(point), ARGS_FILE)
            if point is not None:
                self._check_resumable(Path(point))
            self.run_folder.begin(point, overwrite=self.args.overwrite_output_dir)
            with stopping_on_interrupt(self):
                return super().train(point, *args, **kwargs)

    def _check_resumable(self, folder: Path) -> None:
        check_resumable(folder, self._setup(), self.args, self._settings_before)
        if not holds_optimizer(folder):
            raise ValueError(
                f"A checkpoint to resume from must hold the optimizer's state; {folder} does not, as "
                "`save_only_model=True` leaves it. Pass its weights as `model` to start anew from them."
            )
        self._checkpoints.refuse_code(folder, self.engine.pickled_types)

    @functools.cached_property
    def _checkpoints(self) -> CheckpointFolders:
        return CheckpointFolders(self.args)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer does it, which looks whether the run is over after a step only."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    @functools.cached_property
    def run_folder(self) -> RunFolder:
        """The output folder, which one run at a time has."""
        return RunFolder(self.args, self.accelerator, list(self.pipeline.components))

    @functools.cached_property
    def _train_data(self) -> dict[str, Any] | None:
        return data_fingerprint(self.train_dataset)

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """As the Trainer does it; but how often to log, save and evaluate is this run's, not the checkpoint's."""
        begun = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        return begun

    def _setup(self) -> dict[str, Any]:
        """What a run must share with the one that wrote a checkpoint, and what it should."""
        lora = None
        if self.adapter is not None:
            config = self.denoiser.peft_config[self.adapter]
            lora = {
                "r": config.r,
                "lora_alpha": config.lora_alpha,
                "target_modules": sorted(config.target_modules)
                if not isinstance(config.target_modules, str)
                else config.target_modules,
                "use_dora": config.use_dora,
                "use_rslora": config.use_rslora,
            }
        return {
            "pipeline_class": type(self.pipeline).__name__,
            "denoiser_class": type(self.denoiser).__name__,
            "tuning": "full" if self.adapter is None else "lora",
            "lora": lora,
            "reference": self.reference.kind,
            "given_reference": self.gave_reference,
            "engine": self.engine.name,
            "processes": self.accelerator.num_processes,
            "weights_before_training": self.fingerprint,
            "train_data": self._train_data,
            "run_id": self.run_folder.run_id,
            **{name: getattr(self.args, name) for name in (*SETTINGS_OF_THE_PATH, *LOSS_KWARG_RANGES)},
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what was tuned, as plain diffusers and PEFT read it; under every engine, all processes must call it.

        Args:
            output_dir (`str`, *optional*): `args.output_dir` if unset.
        """
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        own = folder.resolve() == self.run_folder.folder.resolve()
        pushes = self.args.push_to_hub and not _internal_call
        if not (own and pushes):  # `push_to_hub` saves there itself, once no upload reads the files any more
            held = self.run_folder.held(together=self._holds_parts()) if own else contextlib.nullcontext()
            with naming_the_disk(folder, self._bytes_to_save), held:
                self._save(output_dir)
        if pushes:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _bytes_to_save(self) -> int:
        """Of the weights alone; a LoRA is written twice."""
        weights = trained_weights(self.denoiser, self.adapter).values()
        return sum(weight.numel() * weight.element_size() for weight in weights) * (1 if self.adapter is None else 2)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        writes, checkpoint = self.args.should_save, self._checkpoints.is_begun(folder)
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
        whole = None
        if self._holds_parts():
            self.engine.reshard(self.model_wrapped)
            whole = self.engine.gather(trained_weights(self.denoiser, self.adapter), keep=writes)
        if checkpoint:
            for shadow in self._shadow_weights:
                shadow.save(folder, write=writes)
        average = None if self.average is None or checkpoint else self.average.gather(keep=writes)
        if not writes:
            return
        if checkpoint and self.winner_budget is not None:
            self.winner_budget.save(folder)
        save_weights(
            folder,
            pipeline=self.pipeline,
            denoiser=self.denoiser,
            denoiser_name=self.family.denoiser_name,
            adapter=self.adapter,
            whole=whole,
            full_pipeline=self.args.save_full_pipeline and not checkpoint,
        )
        if average is not None:
            self._save_average(folder / EMA_FOLDER, average)
        write_setup(folder, self._setup())
        if not checkpoint:
            self._write_args(folder)
        remove_local_paths([folder / "model_index.json"])
        remove_local_paths(folder / name / file for name in self.pipeline.components for file in COMPONENT_CONFIGS)

    def _write_args(self, folder: Path) -> None:
        """Readable, without tokens, and no pickle: the Trainer's own training_args.bin is all three the other way."""
        (folder / ARGS_FILE).write_text(self.args.to_json_string() + "\n", encoding="utf-8")

    def _save_average(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        folder.mkdir(exist_ok=True)
        save_weights(
            folder,
            pipeline=self.pipeline,
            denoiser=self.denoiser,
            denoiser_name=self.family.denoiser_name,
            adapter=self.adapter,
            whole=weights,
        )
        remove_local_paths([folder / self.family.denoiser_name / "config.json"])

    def _load_kept(self, folder: Path) -> None:
        """What moves beside the policy."""
        for shadow in self._shadow_weights:
            shadow.load(folder)
        if self.winner_budget is not None:
            self.winner_budget.load(folder)

    def _holds_parts(self) -> bool:
        """Whether the engine keeps the weights, or their float32 form, in shards."""
        return self.engine.holds_shards

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._finite.verify_gradient()
        run_dir = Path(self._get_output_dir(trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._checkpoints.begin(folder)
        # What comes after the files waits for the manifest, and the Trainer goes by the files' times in rotating.
        with borrowed(self.args, push_to_hub=False, save_total_limit=None):
            super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self._write_args(folder)
        self._checkpoints.seal(folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        self._checkpoints.rotate(run_dir, self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Beside the tuned weights, which are there already: an engine's own form of them, without what is frozen."""
        if not self._holds_parts():
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.engine.save_state(self.model_wrapped, self.optimizer, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _finalize_training(self, *args: Any) -> Any:
        self._finite.verify_gradient()
        with borrowed(self.args, save_total_limit=None):  # with 1, the Trainer would delete the newest beside the best
            return super()._finalize_training(*args)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._read_weights(folder)
        self._load_kept(folder)

    def _load_engine_checkpoint(self, resume_from_checkpoint: str) -> None:
        """Under DeepSpeed, which reads weights and optimizer at once."""
        with self._keep_optimizer_settings():
            self._read_deepspeed_state(resume_from_checkpoint)
            self._load_kept(Path(resume_from_checkpoint))
            self._read_optimizer_and_scheduler(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None or (self.args.save_strategy != SaveStrategy.NO and not self.args.save_only_model):
            self.engine.check_resumable(self.optimizer)
        with self._keep_optimizer_settings():
            self._read_optimizer_and_scheduler(checkpoint)

    def _read_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Within one block of this run's own settings: two would scale a schedule's last rate twice."""
        with self._tensors_only():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _keep_optimizer_settings(self) -> contextlib.AbstractContextManager:
        """What the arguments say of optimizer and schedule, kept over the loading of a checkpoint."""
        before = self._settings_before.get("learning_rate")
        return keep_optimizer_settings(self.optimizer, self.lr_scheduler, self.args.learning_rate, before)

    def _read_deepspeed_state(self, folder: str) -> None:
        with self._tensors_only():
            self.engine.load_state(self.model_wrapped, folder)

    def _tensors_only(self) -> contextlib.AbstractContextManager:
        return tensors_only(self.engine.pickled_types, trust=self.args.trust_checkpoint)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        self._checkpoints.check_best(best)
        if self.engine.loads_weights_with_optimizer:
            self._read_deepspeed_state(str(best))
        else:
            self._read_weights(best)
        if self.average is not None:  # the metric may have chosen it, and the two belong together
            self.average.load(best)

    def _read_weights(self, folder: Path) -> None:
        weights = read_weights(
            folder,
            denoiser=self.denoiser,
            denoiser_name=self.family.denoiser_name,
            adapter=self.adapter,
            shapes=self._shapes,
        )
        self.engine.reshard(self.model_wrapped)
        self.engine.scatter(weights, trained_weights(self.denoiser, self.adapter))

"""How a [`DiffusionSDPOTrainer`] publishes what it trains: the model card, and uploads to the Hub."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy

from .._compat import PushInProgress, loads_lora
from ..losses.preference import KNOB_RANGES
from .callbacks import SampleImagesCallback
from .model_card import ModelCardFacts, build_model_card
from .processes import in_any_process
from .saving import ARGS_FILE, SETTINGS_OF_THE_PATH, SavingMixin

# Checkpoints, pickles, logs, plots, and the arguments, which name folders of the machine; the card has the settings.
NOT_UPLOADED = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*", "*.pt", "*.pth", "*.bin", "runs/*", "noise_levels*.png", ARGS_FILE]
SETTINGS_IN_CARD = (
    *SETTINGS_OF_THE_PATH,
    *KNOB_RANGES,
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
)


class PublishingMixin(SavingMixin):
    """Overrides of [`~transformers.Trainer`] that concern the Hub; what is published is saved first."""

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        """Write `README.md` into the output folder, as diffusers' model cards are.

        Args:
            model_name (`str`, *optional*): Name of the model; the output folder's if unset.
            dataset_name (`str`, *optional*): Hub id of the training data.
            tags (`str` or `list[str]`, *optional*): Beside the trainer's own.
            license (`str`, *optional*): Identifier of the licence; that of the base model applies if unset.
        """
        if not self.is_world_process_zero():
            return
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        output_dir = Path(self.args.output_dir)
        facts = ModelCardFacts(
            model_name=model_name or output_dir.absolute().name,
            hub_model_id=self.hub_model_id,
            base_model=self.model_name_or_path,
            pipeline_class=type(self.pipeline).__name__,
            denoiser_name=self.family.denoiser_name,
            tuning="full" if self.adapter is None else "lora",
            loads_lora=loads_lora(type(self.pipeline)),
            drawing_options=self.family.drawing_options(None),
            drawn_image=self.family.drawn_image,
            dataset_name=dataset_name,
            tags=[*self._tag_names, *tags],
            settings={name: getattr(self.args, name) for name in SETTINGS_IN_CARD},
            metrics=self._final_metrics(),
            gallery=self._gallery(),
            trainer_name=self._name,
            versions={name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "trl")}
            | {"python": platform.python_version()},
            license=license,
        )
        output_dir.mkdir(parents=True, exist_ok=True)
        build_model_card(facts).save(output_dir / "README.md")

    def _final_metrics(self) -> dict[str, float]:
        """The last logged value of every metric of the loss, the errors and the safeguard."""
        metrics: dict[str, float] = {}
        for entry in self.state.log_history:
            metrics |= {name: value for name, value in entry.items() if "/" in name or name.endswith("loss")}
        return metrics

    def _gallery(self) -> list[tuple[str, str]]:
        """The sample images that were drawn last, each with its prompt."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SampleImagesCallback) and callback.last_step is not None:
                return callback.gallery(callback.last_step)
        return []

    def push_to_hub(self, commit_message: str | None = "End of training", blocking: bool = True, **kwargs: Any):
        """Upload the tuned weights and the model card to `args.hub_model_id`; no checkpoint, pickle or log goes along.

        Args:
            commit_message (`str`, *optional*): Of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Whether to wait for the upload.
            kwargs: `token`, `revision`, `private`, and what [`~DiffusionSDPOTrainer.create_model_card`] takes.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = kwargs.pop("token", None) or self.args.hub_token
        revision, private = kwargs.pop("revision", None), kwargs.pop("private", None)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        model_name = kwargs.pop("model_name", None) or self.hub_model_id.split("/")[-1]
        self.create_model_card(model_name=model_name, **kwargs)
        self._finish_current_push()
        return self._upload(self.args.output_dir, commit_message, token=token, revision=revision, later=not blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish while training goes on; the Trainer's own looks for transformers' files and uploads pickles."""
        if self.args.hub_strategy == HubStrategy.END:
            return
        uploading = self.push_in_progress is not None and not self.push_in_progress.is_done()
        busy = in_any_process(uploading, self.args.device)  # the first process knows, and all write together
        if busy and not self.args.hub_always_push:
            return
        self._finish_current_push()  # it reads the files that are now written anew
        self._save(self.args.output_dir)
        if not self.is_world_process_zero():
            return
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        moment = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch)}"
        self.create_model_card(model_name=self.hub_model_id.split("/")[-1])
        jobs = [self._upload(self.args.output_dir, f"Training in progress, {moment}", later=True)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            jobs.append(
                self._upload(
                    checkpoint_folder,
                    f"Training in progress, {moment}, checkpoint",
                    path_in_repo="last-checkpoint" if last else os.path.basename(checkpoint_folder),
                    later=True,
                    ignore=[ARGS_FILE],
                )
            )
        self.push_in_progress = PushInProgress(jobs)

    def _upload(
        self,
        folder: str,
        message: str | None,
        *,
        token: str | None = None,
        revision: str | None = None,
        path_in_repo: str | None = None,
        later: bool = False,
        ignore: list[str] = NOT_UPLOADED,
    ) -> Any:
        return HfApi().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            run_as_future=later,
            ignore_patterns=ignore,
        )

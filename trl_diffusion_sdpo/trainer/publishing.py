"""How a [`DiffusionSDPOTrainer`] publishes what it trains: the model card, and uploads to the Hub."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy

from .._compat import loads_lora
from ..artifacts.disk import naming_the_disk
from ..artifacts.hub import PublishingError, Uploads
from ..artifacts.model_card import ModelCardFacts, build_model_card
from ..engines.processes import failing_together, gather_objects, in_any_process
from ..evaluation.verdict import verdict_of
from ..losses.preference import LOSS_KWARG_RANGES
from ..runs.manifest import ARGS_FILE
from ..runs.run_folder import PREVIOUS_RUN
from .sample_images import SampleImagesCallback
from .saving import SETTINGS_OF_THE_PATH, SavingMixin

logger = logging.getLogger(__name__)

CHECKPOINT_STRATEGIES = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
# Checkpoints, pickles, logs, plots, and the arguments, which name folders of the machine; the card has the settings.
NOT_UPLOADED = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*", "*.pt", "*.pth", "*.bin", "runs/*", "noise_bins*.png", ARGS_FILE]
NOT_UPLOADED += [f"{PREVIOUS_RUN}-*"]
SETTINGS_IN_CARD = (
    *SETTINGS_OF_THE_PATH,
    *LOSS_KWARG_RANGES,
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

    hub_model_id: str | None = None
    _uploads: Uploads | None = None  # once there is a repository to upload to

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
        output_dir, verdict = Path(self.args.output_dir), verdict_of(self)
        facts = ModelCardFacts(
            model_name=model_name or output_dir.absolute().name,
            hub_model_id=self.hub_model_id,
            base_model=self.model_name_or_path,
            pipeline_class=type(self.pipeline).__name__,
            denoiser_name=self.family.denoiser_name,
            tuning="full" if self.adapter is None else "lora",
            loads_lora=loads_lora(type(self.pipeline)),
            generation_kwargs=self.family.generation_kwargs(None),
            generated_image=self.family.generated_image,
            dataset_name=dataset_name,
            tags=[*self._tag_names, *tags],
            settings={name: getattr(self.args, name) for name in SETTINGS_IN_CARD},
            metrics=self._final_metrics(),
            verdict=None if verdict is None else verdict.finding,
            gallery=self._gallery(),
            trainer_name=self._name,
            versions={name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "trl")}
            | {"python": platform.python_version()},
            license=license,
        )
        with naming_the_disk(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
            build_model_card(facts).save(output_dir / "README.md")

    def _final_metrics(self) -> dict[str, float]:
        """The last logged value of every metric of the loss, the errors and the safeguard; of the training loss, the
        mean over the whole run, where transformers' is of what followed the checkpoint that it was resumed from."""
        metrics: dict[str, float] = {}
        for entry in self.state.log_history:
            metrics |= {name: value for name, value in entry.items() if "/" in name or name.endswith("loss")}
        mean = mean_loss(self.state.log_history)
        return metrics if mean is None else {**metrics, "train_loss": mean}

    def _gallery(self) -> list[tuple[str, str]]:
        """The sample images that were drawn last, each with its prompt."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SampleImagesCallback) and callback.last_step is not None:
                return callback.gallery(callback.last_step)
        return []

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository `args.hub_model_id`, unless there is one; all processes must call it, and know it then.

        Args:
            token (`str`, *optional*): `args.hub_token` if unset.
            private (`bool`, *optional*): `args.hub_private_repo` if unset.

        Raises:
            `PublishingError`: In all processes, if the Hub refuses, or answers no attempt.
        """
        try:
            self._make_repository(token, private)
        except PublishingError as error:
            raise PublishingError(
                f"{error} Nothing was trained. Without `push_to_hub=True` a run needs no Hub, and can be published "
                "afterwards by `push_to_hub()`."
            ) from error

    def _make_repository(self, token: str | None, private: bool | None) -> None:
        self._uploads = self._uploads or Uploads()
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        with failing_together(PublishingError):
            if self.is_world_process_zero():
                self.hub_model_id = self._uploads.create_repository(
                    name,
                    token=token or self.args.hub_token,
                    private=self.args.hub_private_repo if private is None else private,
                )
        self.hub_model_id = gather_objects(self.hub_model_id)[0]

    def push_to_hub(self, commit_message: str | None = "End of training", blocking: bool = True, **kwargs: Any):
        """Upload the tuned weights and the model card to `args.hub_model_id`; no checkpoint, pickle or log goes along.

        They are saved in `args.output_dir` first. What the Hub does not answer in time is asked again, for about a
        minute; where that does not help, the files stay, and a second call goes on: large files that arrived are not
        sent again.

        Args:
            commit_message (`str`, *optional*): Of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Whether to wait for the upload. A failure is logged
                otherwise.
            kwargs: `token`, `revision`, `private`, and what [`~DiffusionSDPOTrainer.create_model_card`] takes.

        Returns:
            What [`~huggingface_hub.HfApi.upload_folder`] returns, or its `Future`; `None` in all processes but the
            first.

        Raises:
            `PublishingError`: In all processes, if the Hub refuses, or answers no attempt.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = kwargs.pop("token", None)
        revision, private = kwargs.pop("revision", None), kwargs.pop("private", None)
        model_name = kwargs.pop("model_name", None)
        self._finish_current_push()  # it reads the files that are written anew
        done = None
        with self.run_folder.held(together=True):  # first of all: what follows has collectives
            with failing_together(PublishingError):
                self.save_model(_internal_call=True)
            with failing_together(PublishingError), self._saying_what_is_safe():
                if self.hub_model_id is None:
                    self._make_repository(token, private)
                if self.is_world_process_zero():
                    self.create_model_card(model_name=model_name or self.hub_model_id.split("/")[-1], **kwargs)
                    done = self._upload(
                        self.args.output_dir, commit_message, token=token, revision=revision, later=not blocking
                    )
        return done

    @contextlib.contextmanager
    def _saying_what_is_safe(self) -> Iterator[None]:
        try:
            yield
        except PublishingError as error:
            raise PublishingError(f"{error} {self._what_is_safe()}") from error

    def _what_is_safe(self) -> str:
        return f"The weights are safe in {self.args.output_dir}; another call of `push_to_hub()` goes on from there."

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish while training goes on; the Trainer's own looks for transformers' files and uploads pickles."""
        if self.args.hub_strategy == HubStrategy.END:
            return
        uploads_checkpoints = self.args.hub_strategy in CHECKPOINT_STRATEGIES
        busy = in_any_process(not self._uploads.is_done(), self.args.device)  # the first uploads, all write together
        if busy and not self.args.hub_always_push:
            if uploads_checkpoints and self.args.save_total_limit is not None:
                self._finish_current_push()  # the Trainer is about to delete old checkpoints, and this may be one
            return
        self._finish_current_push()  # it reads the files that are now written anew
        with failing_together(PublishingError):
            self._save(self.args.output_dir)
            if self.is_world_process_zero():
                self._publish_progress(checkpoint_folder)

    def _publish_progress(self, checkpoint_folder: str) -> None:
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        moment = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch)}"
        self.create_model_card(model_name=self.hub_model_id.split("/")[-1])
        self._upload(self.args.output_dir, f"Training in progress, {moment}", later=True)
        if self.args.hub_strategy in CHECKPOINT_STRATEGIES:
            last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            self._upload(
                checkpoint_folder,
                f"Training in progress, {moment}, checkpoint",
                path_in_repo="last-checkpoint" if last else os.path.basename(checkpoint_folder),
                later=True,
                ignore=[ARGS_FILE],
            )

    def _finish_current_push(self) -> None:
        if self._uploads is None:
            return
        if not self._uploads.is_done():
            logger.info("Waiting for the upload in progress.")
        self._uploads.wait_until_done()
        gather_objects(
            None
        )  # which waits for the first process for longer than the next collective on the device would

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
        arguments = {
            "path_in_repo": path_in_repo,
            "commit_message": message,
            "token": token or self.args.hub_token,
            "revision": revision or self.args.hub_revision,
            "ignore_patterns": ignore,
        }
        if not later:
            return self._uploads.upload(self.hub_model_id, folder, **arguments)
        advice = "Training goes on. " if self.is_in_train else ""
        return self._uploads.upload_later(self.hub_model_id, folder, advice=advice + self._what_is_safe(), **arguments)


def mean_loss(history: list[dict[str, float]]) -> float | None:
    """Mean of the training loss over all steps that were logged, before and after a checkpoint; `None` if none was.

    Args:
        history (`list[dict[str, float]]`): The log. An entry with `loss` is of the steps since the one before it.
    """
    total, last = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / last if last else None

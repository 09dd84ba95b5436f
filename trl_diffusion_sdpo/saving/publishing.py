"""Publishing a run on the Hub: its repository, uploads during and after training, and files that stay local."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy

from ..engines.processes import failing_together, gather_objects, in_any_process
from ..utils.files import SWEEP_FOLDER
from .hub import PublishingError, Uploads
from .setup import ARGS_FILE

logger = logging.getLogger(__name__)

SWEPT = ("*.json", "images/*")  # in the folders of sweeps; below, what a sweep writes into any other
SWEPT_ELSEWHERE = ("sweep.json", "images.json", "images/weights-*.png", "images/prediction-*.png")
CHECKPOINT_STRATEGIES = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
# Pickles, logs, and the arguments and numbers of sweeps, which name local folders; the model card has the settings. Of
# a sweep's images, the grids are enough.
NOT_UPLOADED = (
    *("_*", "*.pt", "*.pth", "*.bin", "runs/*", ARGS_FILE),
    *(f"{SWEEP_FOLDER}*/{name}" for name in SWEPT),
    *(f"{folder}{name}" for name in SWEPT_ELSEWHERE for folder in ("", "*/")),
)


class Publisher:
    """Uploads a run's output folder to its repository on the Hub.

    Args:
        args (`TrainingArguments`): With the names of the folder and the repository.
        ignore (`Sequence[str]`): Patterns of files that are not uploaded, besides [`NOT_UPLOADED`].
    """

    def __init__(self, args: TrainingArguments, ignore: Sequence[str] = ()):
        self._args, self._ignore = args, [*NOT_UPLOADED, *ignore]
        self.uploads: Uploads | None = None
        self.repository: str | None = None  # its id, once it is known to exist

    def create_repository(self, token: str | None = None, private: bool | None = None) -> str:
        """As [`Uploads.create_repository`], by the arguments; all processes must call it, and raise together."""
        self.uploads = self.uploads or Uploads()
        with failing_together(PublishingError, during_upload=True):
            if self._args.process_index == 0:
                self.repository = self.uploads.create_repository(
                    self._args.hub_model_id or Path(self._args.output_dir).absolute().name,
                    token=token or self._args.hub_token,
                    private=self._args.hub_private_repo if private is None else private,
                )
        self.repository = gather_objects(self.repository)[0]
        return self.repository

    @contextlib.contextmanager
    def failing_after_save(self) -> Iterator[None]:
        """Raise errors within in all processes; one of the Hub says where the saved weights are."""
        with failing_together(PublishingError, during_upload=True):
            try:
                yield
            except PublishingError as error:
                raise PublishingError(f"{error} {self._advice()}") from error

    def upload(
        self,
        message: str | None,
        *,
        token: str | None = None,
        revision: str | None = None,
        blocking: bool = True,
        training: bool = False,
    ) -> Any:
        """Upload the output folder; the first process only.

        Args:
            message (`str`, *optional*): Of the commit.
            token, revision (`str`, *optional*): The arguments' if unset.
            blocking (`bool`): Whether to wait, for what [`~huggingface_hub.HfApi.upload_folder`] returns; otherwise its
                `Future` is returned, and a failure is logged.
            training (`bool`): Whether training continues meanwhile.
        """
        arguments = {
            "commit_message": message,
            "token": token or self._args.hub_token,
            "revision": revision or self._args.hub_revision,
            "ignore_patterns": self._ignore,
        }
        if blocking:
            return self.uploads.upload(self.repository, self._args.output_dir, **arguments)
        return self._upload_later(self._args.output_dir, training=training, **arguments)

    def is_ready_for_progress(self) -> bool:
        """Whether to upload now, during training; all processes must call it. Waits for uploads in progress, whose
        files are about to change, unless uploads may be skipped."""
        if self._args.hub_strategy == HubStrategy.END:
            return False
        skips = not self._args.hub_always_push and in_any_process(not self.uploads.is_done(), self._args.device)
        uploads_checkpoints = self._args.hub_strategy in CHECKPOINT_STRATEGIES
        if not skips or (uploads_checkpoints and self._args.save_total_limit is not None):  # old ones will be deleted
            self.wait()
        return not skips

    def upload_progress(self, checkpoint: Path, state: TrainerState) -> None:
        """Upload the output folder, and the checkpoint if `hub_strategy` says so, while training continues; the first
        process only."""
        by_step = self._args.save_strategy == SaveStrategy.STEPS
        message = f"Training in progress, {f'step {state.global_step}' if by_step else f'epoch {int(state.epoch)}'}"
        self.upload(message, blocking=False, training=True)
        if self._args.hub_strategy in CHECKPOINT_STRATEGIES:
            last = self._args.hub_strategy == HubStrategy.CHECKPOINT
            self._upload_later(
                str(checkpoint),
                training=True,
                path_in_repo="last-checkpoint" if last else checkpoint.name,
                commit_message=f"{message}, checkpoint",
                token=self._args.hub_token,
                revision=self._args.hub_revision,
                ignore_patterns=[ARGS_FILE],
            )

    def wait(self) -> None:
        """Wait for uploads in progress; all processes must call it."""
        if self.uploads is None:
            return
        if not self.uploads.is_done():
            logger.info("Waiting for the upload in progress.")
        self.uploads.wait_until_done()
        gather_objects(None, during_upload=True)  # a barrier

    def _upload_later(self, folder: str, *, training: bool, **arguments: Any) -> Any:
        advice = f"{'Training goes on. ' if training else ''}{self._advice()}"
        return self.uploads.upload_later(self.repository, folder, advice=advice, **arguments)

    def _advice(self) -> str:
        return f"The weights are safe in {self._args.output_dir}; another call of `push_to_hub()` goes on from there."

"""Uploads a run's output folder to the Hub, during and after training."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..engines.processes import failing_together, gather_objects, in_any_process
from ..utils._compat import HubConnectionError
from ..utils.errors import UserError
from ..utils.secrets import without_secrets
from .setup import ARGS_FILE, output_folder

logger = logging.getLogger(__name__)

CHECKPOINT_STRATEGIES = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
# Not uploaded: pickles, logs, and all arguments of the run, which name local folders.
NOT_UPLOADED = ("_*", "*.pt", "*.pth", "*.bin", "runs/*", ARGS_FILE)


class PublishingError(OSError, UserError):
    """A repository cannot be created or a folder cannot be uploaded. The message says why."""


class Publisher:
    """Uploads a run's output folder to its repository on the Hub. `huggingface_hub` retries requests that fail.

    Args:
        args (`TrainingArguments`): Settings that name the output folder and the repository.
        ignore (`Sequence[str]`): Patterns of files not to upload, besides [`NOT_UPLOADED`].
    """

    def __init__(self, args: TrainingArguments, ignore: Sequence[str] = ()):
        self._args = args
        self._ignore = [*NOT_UPLOADED, *ignore]
        self._api = HfApi()
        self._jobs: list[Future] = []  # uploads in progress
        self.repository: str | None = None  # its id after `create_repository`

    def create_repository(self, token: str | None = None, private: bool | None = None) -> str:
        """Create the repository for the run unless it exists, and return its id, `owner/name`. Call it in all
        processes, which all raise `PublishingError` if it fails."""
        name = self._args.hub_model_id or output_folder(self._args).absolute().name
        with failing_together(PublishingError, during_upload=True):
            if self._args.process_index == 0:
                with explained_hub_errors(f"Creating the repository {name}"):
                    created = self._api.create_repo(
                        name,
                        token=token or self._args.hub_token,
                        private=self._args.hub_private_repo if private is None else private,
                        exist_ok=True,
                    )
                    self.repository = created.repo_id
        self.repository = gather_objects(self.repository)[0]
        return self.repository

    @contextlib.contextmanager
    def failing_after_save(self) -> Iterator[None]:
        """Raise in all processes if one raises within the context. If the Hub caused it, the message also says where
        the weights are saved."""
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
    ) -> Any:
        """Upload the output folder. Call it in the first process only.

        Args:
            message (`str`, *optional*): Message of the commit.
            token, revision (`str`, *optional*): Token and revision for the Hub. Defaults: `hub_token`, `hub_revision`.
            blocking (`bool`): Whether to wait and return the result of [`~huggingface_hub.HfApi.upload_folder`].
                Otherwise, return its `Future` at once, and log an error if the upload fails.
        """
        arguments = {
            "folder_path": self._args.output_dir,
            "commit_message": message,
            "token": token or self._args.hub_token,
            "revision": revision or self._args.hub_revision,
            "ignore_patterns": self._ignore,
        }
        return self._upload(**arguments) if blocking else self._upload_later(**arguments)

    def is_ready_for_progress(self) -> bool:
        """Return whether to start an upload now, during training. Call it in all processes.

        Before a new upload, and before old checkpoints are deleted, it waits for the previous one, whose files will
        change.
        """
        if self._args.hub_strategy == HubStrategy.END:
            return False
        skips = not self._args.hub_always_push and in_any_process(not self.is_done(), self._args.device)
        uploads_checkpoints = self._args.hub_strategy in CHECKPOINT_STRATEGIES
        if not skips or (uploads_checkpoints and self._args.save_total_limit is not None):
            self.wait()
        return not skips

    def upload_progress(self, checkpoint: Path, state: TrainerState) -> None:
        """Upload the output folder while training continues, and the new checkpoint if `hub_strategy` asks for it. Call
        it in the first process only."""
        message = f"Training in progress, step {state.global_step}"
        self.upload(message, blocking=False)
        if self._args.hub_strategy in CHECKPOINT_STRATEGIES:
            last = self._args.hub_strategy == HubStrategy.CHECKPOINT
            self._upload_later(
                folder_path=str(checkpoint),
                path_in_repo="last-checkpoint" if last else checkpoint.name,
                commit_message=f"{message}, checkpoint",
                token=self._args.hub_token,
                revision=self._args.hub_revision,
                ignore_patterns=[ARGS_FILE],
            )

    def is_done(self) -> bool:
        """Return whether no upload is in progress."""
        return all(job.done() for job in self._jobs)

    def wait(self) -> None:
        """Wait until no upload is in progress, in all processes. Errors of uploads are not raised: the upload's thread
        has logged them."""
        if self.repository is None:
            return
        if not self.is_done():
            logger.info("Waiting for the upload in progress.")
        for job in self._jobs:
            job.exception()
        self._jobs = []
        gather_objects(None, during_upload=True)  # a barrier

    def _upload(self, **arguments: Any) -> Any:
        assert self.repository is not None
        with explained_hub_errors(f"Uploading to {self.repository}"):
            return self._api.upload_folder(repo_id=self.repository, **arguments)

    def _upload_later(self, **arguments: Any) -> Future:
        """Upload in a thread. An error is logged by the thread, and raised by the `Future`."""
        advice = self._advice()  # now, because `output_dir` is another folder while a checkpoint is being written

        def upload() -> Any:
            try:
                return self._upload(**arguments)
            except PublishingError as error:
                logger.warning("%s %s", error, advice)
                raise

        job = self._api.run_as_future(upload)
        self._jobs = [other for other in self._jobs if not other.done()] + [job]
        return job

    def _advice(self) -> str:
        return (
            f"The weights are saved in {self._args.output_dir}. Call `trainer.push_to_hub()` to continue the upload."
        )


@contextlib.contextmanager
def explained_hub_errors(what: str) -> Iterator[None]:
    """Turn an error of the Hub or its client into a `PublishingError` with one line without secrets.

    Args:
        what (`str`): The action, for the message, such as "Uploading to owner/name".
    """
    try:
        yield
    except (HubConnectionError, OSError, ValueError, RuntimeError) as error:
        reasons = [error, error.__cause__] if isinstance(error, RuntimeError) and error.__cause__ else [error]
        text = ": ".join(" ".join(str(reason).split()) or type(reason).__name__ for reason in reasons)
        raise PublishingError(f"{what} failed: {without_secrets(text).rstrip('.')}.") from error

"""Requests to the Hub with retries: creating a repository, uploading a folder."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..utils._compat import HubConnectionError
from ..utils.secrets import without_secrets

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

ATTEMPTS = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds
TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)


class PublishingError(OSError):
    """A repository could not be created, or a folder not uploaded; the message says why."""


class Uploads:
    """Uploads to one repository, one after the other, also in a thread during training."""

    def __init__(self):
        self._api = HfApi()
        self._jobs: list[Future] = []

    def is_done(self) -> bool:
        """Whether no upload is in progress."""
        return all(job.done() for job in self._jobs)

    def wait_until_done(self) -> None:
        """Wait for the uploads in progress. Failures were logged already, and are not raised."""
        for job in self._jobs:
            job.exception()
        self._jobs = []

    def create_repository(self, name: str, *, token: str | None, private: bool | None) -> str:
        """Create the repository, by its name with or without its owner, unless it exists, and return its id,
        `owner/name`; with the machine's token if unset. `PublishingError` where the Hub refuses, or does not answer."""
        arguments: dict[str, Any] = {"token": token, "private": private, "exist_ok": True}
        return _with_retries(f"Making the repository {name}", lambda: self._api.create_repo(name, **arguments).repo_id)

    def upload(self, repository: str, folder: str, **arguments: Any) -> Any:
        """Upload a folder; see [`~huggingface_hub.HfApi.upload_folder`] for the arguments and the result.
        `PublishingError` where the Hub refuses, or does not answer."""
        arguments |= {"repo_id": repository, "folder_path": folder}
        return _with_retries(f"Uploading to {repository}", lambda: self._api.upload_folder(**arguments))

    def upload_later(self, repository: str, folder: str, *, advice: str, **arguments: Any) -> Future:
        """As [`Uploads.upload`], in a thread. A failure is logged when it happens, with the advice."""

        def upload() -> Any:
            try:
                return self.upload(repository, folder, **arguments)
            except Exception as error:  # of any kind: nobody may ask for the future's exception
                known = isinstance(error, PublishingError)
                message = str(error) if known else f"Uploading to {repository} failed: {_reason(error)}."
                logger.warning("%s %s", message, advice)
                raise

        job = self._api.run_as_future(upload)
        self._jobs = [other for other in self._jobs if not other.done()] + [job]
        return job


def _with_retries(what: str, request: Callable[[], Result]) -> Result:
    """The request's result, after at most `ATTEMPTS`, with exponential backoff and jitter."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request()
        except (HubConnectionError, OSError, ValueError, RuntimeError) as error:
            if attempt == ATTEMPTS or not _is_transient(_cause(error)):
                raise PublishingError(f"{what} failed: {_reason(error)}.") from error
            wait = _wait(attempt, _cause(error))
            logger.info("%s failed (%s). Another attempt follows in %.1f s.", what, _reason(error), wait)
            time.sleep(wait)
    raise AssertionError("The last attempt returns or raises.")


def _cause(error: Exception) -> Exception:
    """The error itself: the client wraps errors of large files into a `RuntimeError` with the file's name."""
    cause = error.__cause__
    return cause if isinstance(error, RuntimeError) and isinstance(cause, Exception) else error


def _is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later: the Hub is busy, or the connection was lost. Its gateway then answers
    with HTML where the client expects JSON."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT_STATUSES
    return isinstance(error, (HubConnectionError, json.JSONDecodeError))


def _wait(attempt: int, error: Exception) -> float:
    """Seconds until the next attempt; at least those of the `Retry-After` header."""
    wait = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return min(LONGEST_WAIT, max(wait, float(asked) if asked.isdigit() else 0.0))


def _reason(error: Exception) -> str:
    """The error in one line, without secrets, which signed URLs contain."""
    if _cause(error) is not error:
        return f"{without_secrets(str(error)).rstrip('.')}: {_reason(_cause(error))}"
    if isinstance(error, HfHubHTTPError):
        answer = f"the Hub answered {error.response.status_code} {error.response.reason_phrase}"
        text = f"{answer}: {error.server_message}" if error.server_message else answer
    else:
        text = str(error) or type(error).__name__
    return without_secrets(" ".join(text.split())).rstrip(".")

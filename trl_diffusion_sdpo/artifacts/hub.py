"""Requests to the Hub that bear its short troubles: a repository made, a folder uploaded, again after a pause where an
answer says that a later attempt may succeed."""

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

from .._compat import HubConnectionError
from ..masking import without_secrets

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

ATTEMPTS = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds
TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)


class PublishingError(OSError):
    """Something could not be brought to the Hub; the message says what, why, and what is safe."""


class Uploads:
    """Uploads of one trainer to one repository, which may go on beside the training, one after the other."""

    def __init__(self):
        self._api = HfApi()
        self._jobs: list[Future] = []

    def is_done(self) -> bool:
        """Whether nothing is being uploaded."""
        return all(job.done() for job in self._jobs)

    def wait_until_done(self) -> None:
        """Wait for the uploads in progress; one that failed has been reported, and raises nothing here."""
        for job in self._jobs:
            job.exception()
        self._jobs = []

    def create_repository(self, name: str, *, token: str | None, private: bool | None) -> str:
        """Make the repository, unless there is one.

        Args:
            name (`str`): With or without its owner.
            token (`str`, *optional*): That of the machine if unset.
            private (`bool`, *optional*): Whether others may not see it; no matter to one that there is.

        Returns:
            `str`: Its id, `owner/name`.

        Raises:
            `PublishingError`: If the Hub refuses, or answers no attempt.
        """
        arguments = {"token": token, "private": private, "exist_ok": True}
        return _persistently(f"Making the repository {name}", lambda: self._api.create_repo(name, **arguments).repo_id)

    def upload(self, repository: str, folder: str, **arguments: Any) -> Any:
        """Upload a folder; see [`~huggingface_hub.HfApi.upload_folder`] for the arguments and the result.

        Raises:
            `PublishingError`: If the Hub refuses, or answers no attempt.
        """
        return _persistently(
            f"Uploading to {repository}",
            lambda: self._api.upload_folder(repo_id=repository, folder_path=folder, **arguments),
        )

    def upload_later(self, repository: str, folder: str, *, advice: str, **arguments: Any) -> Future:
        """As `upload`, in a thread. A failure is logged when it happens, with the advice, and ends nothing."""

        def upload() -> Any:
            try:
                return self.upload(repository, folder, **arguments)
            except Exception as error:  # of any kind: nobody else may look at the job's
                known = isinstance(error, PublishingError)
                told = str(error) if known else f"Uploading to {repository} failed: {_reason(error)}."
                logger.warning("%s %s", told, advice)
                raise

        job = self._api.run_as_future(upload)
        self._jobs = [other for other in self._jobs if not other.done()] + [job]
        return job


def _persistently(what: str, request: Callable[[], Result]) -> Result:
    """The request's result, after at most `ATTEMPTS`; between two of them pauses that double, and vary, so that many
    processes do not ask again at the same moment."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request()
        except (HubConnectionError, OSError, ValueError, RuntimeError) as error:
            if attempt == ATTEMPTS or not _is_transient(_origin(error)):
                raise PublishingError(f"{what} failed: {_reason(error)}.") from error
            wait = _wait(attempt, _origin(error))
            logger.info("%s failed (%s). Another attempt follows in %.1f s.", what, _reason(error), wait)
            time.sleep(wait)
    raise AssertionError("The last attempt returns or raises.")


def _origin(error: Exception) -> Exception:
    """What went wrong itself: the client wraps every error of a large file into a `RuntimeError` with its name."""
    wraps = isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception)
    return error.__cause__ if wraps else error


def _is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later: the Hub is busy or restarts, or the connection is lost. A gateway
    in front of it answers with a page where the client expects JSON."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT_STATUSES
    return isinstance(error, (HubConnectionError, json.JSONDecodeError))


def _wait(attempt: int, error: Exception) -> float:
    """Seconds until the next attempt, at least as many as the Hub asked for in `Retry-After`."""
    wait = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return min(LONGEST_WAIT, max(wait, float(asked) if asked.isdigit() else 0.0))


def _reason(error: Exception) -> str:
    """One line, without secrets, as signed addresses have them."""
    if _origin(error) is not error:
        return f"{without_secrets(str(error)).rstrip('.')}: {_reason(_origin(error))}"
    if isinstance(error, HfHubHTTPError):
        answer = f"the Hub answered {error.response.status_code} {error.response.reason_phrase}"
        text = f"{answer}: {error.server_message}" if error.server_message else answer
    else:
        text = str(error) or type(error).__name__
    return without_secrets(" ".join(text.split())).rstrip(".")

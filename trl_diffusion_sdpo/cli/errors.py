"""Short messages for users instead of tracebacks, for errors of libraries that parse arguments or read data too."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from ..utils.errors import UserError
from ..utils.secrets import without_secrets

_IN_WORKER = re.compile(r"Caught \w+ in DataLoader worker process ")


def sentence(error: Exception) -> str:
    """Return the message of an error that this package raised, without secrets, and without the traceback that torch
    prepends to errors of DataLoader workers."""
    text = without_secrets(str(error))
    if _IN_WORKER.match(text) is None:
        return text
    kind = type(error)
    _, separator, message = text.rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")
    return message.rstrip("\n") if separator else text


@contextlib.contextmanager
def reading_arguments() -> Iterator[None]:
    """Turn a library's `ValueError` into an error of this package, of which users see only the message."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error


@contextlib.contextmanager
def reading_data(name: str | None) -> Iterator[None]:
    """Turn errors of libraries into a `ValueError` that names the data set.

    Args:
        name (`str`, *optional*): Folder, file or Hub id of the data.
    """
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, StopIteration, ArrowException, DatasetsError) as error:
        data = "The data" if name is None else f"The data set {name}"
        cause = error if error.__cause__ is None else error.__cause__
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise UserError(f"{data} could not be read: {reason}") from error

"""Which errors are shown as one sentence: those that this package raised, and those of libraries that read what a user
named, turned into sentences where it is read."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from ..utils.own_errors import is_own

_IN_WORKER = re.compile(r"Caught \w+ in DataLoader worker process ")
_NO_ROWS = "corresponds to no data"  # what datasets says of files without rows


def sentence(error: Exception) -> str:
    """What is shown of an own error; of one that torch raised again for a DataLoader worker, without the worker's
    traceback, which torch puts before it."""
    text, kind = str(error), type(error)
    if _IN_WORKER.match(text) is None:
        return text
    _, found, message = text.rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")
    return message.rstrip("\n") if found else text


@contextlib.contextmanager
def reading_arguments() -> Iterator[None]:
    """Within, a `ValueError` of a library that checks its arguments is a user's."""
    try:
        yield
    except ValueError as error:
        if is_own(error):
            raise
        raise ValueError(" ".join(str(error).split())) from error


@contextlib.contextmanager
def reading_data(name: str | None) -> Iterator[None]:
    """Within, errors of libraries that read a user's data name the data.

    Args:
        name (`str`, *optional*): Folder, file or Hub id of the data.

    Raises:
        ValueError: If a library could not read them.
    """
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    try:
        yield
    except (ValueError, OSError, StopIteration, ArrowException, DatasetsError) as error:
        if is_own(error):
            raise
        raise ValueError(_about_data(name, error)) from error


def _about_data(name: str | None, error: Exception) -> str:
    data = "The data" if name is None else f"The data set {name}"
    cause = error if error.__cause__ is None else error.__cause__
    said = " ".join(str(cause).split()) or type(cause).__name__
    path = Path(name or "").expanduser()
    if path.is_file() and path.stat().st_size == 0:
        return f"A data set has at least one pair, and {name} has 0 bytes. Write it again."
    if _NO_ROWS in str(error):
        return f"A data set has at least one pair, and {name} has no rows. Was only its header written?"
    return f"{data} could not be read: {said}"

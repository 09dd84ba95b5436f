"""Several processes that end alike: where one of them fails, all do, and none waits for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..artifacts.hub import PublishingError
from ..masking import without_secrets
from .processes import several_processes

PATIENCE = timedelta(days=1)  # one process may upload for hours while the others wait


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Have all processes end with an error where one of them fails within; all must enter.

    Raises:
        The process's own error, and `PublishingError` with the message of another's where it had none.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    messages = everyones(None if own is None else without_secrets(f"{type(own).__name__}: {own}"))
    if own is not None:
        raise own
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    if failed:
        raise PublishingError(f"Process {failed[0]} has failed, and all end with it: {messages[failed[0]]}")


def everyones(value: Any) -> list[Any]:
    """A small object of every process, by rank. Processes wait for one another on the CPU, and longer than the time
    limit of collectives on the device allows."""
    if not several_processes():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        dist.all_gather_object(values, value, group=group)
    finally:
        dist.destroy_process_group(group)
    return values

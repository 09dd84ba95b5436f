"""Communication between processes outside of the engines' own collectives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from ..data.checking import ALONE, Peers
from ..utils.secrets import without_secrets

TIMEOUT = timedelta(days=1)  # one process may upload for hours while the others wait


def several_processes() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def in_any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process. All must call it; blocks the host, so not for every step."""
    if not several_processes():
        return flag
    votes = torch.tensor(int(flag), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes)


def gather_objects(value: Any) -> list[Any]:
    """A small picklable object of every process, by rank; all must call it. Runs on the CPU, with a timeout longer than
    that of collectives on the device."""
    if not several_processes():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    try:
        dist.all_gather_object(values, value, group=group)
    finally:
        dist.destroy_process_group(group)
    return values


def peers(args: TrainingArguments) -> Peers:
    """The processes of this training."""
    return ALONE if args.world_size == 1 else Peers(args.process_index, args.world_size, gather_objects)


@contextlib.contextmanager
def failing_together(error_type: type[Exception]) -> Iterator[None]:
    """Raise in all processes where one of them raises within; all must enter. A process without an error of its own
    raises `error_type` with the message of the other's."""
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    messages = gather_objects(None if own is None else without_secrets(f"{type(own).__name__}: {own}"))
    if own is not None:
        raise own
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    if failed:
        raise error_type(f"Process {failed[0]} has failed, and all end with it: {messages[failed[0]]}")

"""Communication between processes outside of the engines' own collectives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from ..utils.processes import ALONE, Peers
from ..utils.secrets import without_secrets

UPLOAD_TIMEOUT = timedelta(days=1)  # one process may upload for hours while the others wait


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


def gather_objects(value: Any, *, during_upload: bool = False) -> list[Any]:
    """Gather a small picklable object of every process, by rank; all must call it.

    Processes wait for each other as long as in any collective: `ddp_timeout`, half an hour by default.

    Args:
        during_upload (`bool`): Whether a process may be uploading meanwhile. The others then wait for up to a day.

    Raises:
        `RuntimeError`: If another process has ended, or does not answer in time.
    """
    if not several_processes():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(values, value, group=_upload_group(dist.group.WORLD) if during_upload else None)
    except RuntimeError as error:
        raise RuntimeError(
            f"Process {dist.get_rank()} has lost another process, which has ended or does not answer: the first error "
            f"in the output of all processes is the cause. ({error})"
        ) from error
    return values


@lru_cache(maxsize=1)
def _upload_group(world: Any) -> Any:
    """A group of all processes of `world` that waits for uploads; made once. Collectives on a device could not wait so
    long."""
    return dist.new_group(backend="gloo", timeout=UPLOAD_TIMEOUT)


def peers(args: TrainingArguments) -> Peers:
    """The processes of this training."""
    return ALONE if args.world_size == 1 else Peers(args.process_index, args.world_size, gather_objects)


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raise `ValueError` in all processes if a fact, such as a setting, is not the same in all of them. All must call
    it. Processes that disagree would wait for each other, or average gradients of different runs."""
    everyone = gather_objects({name: repr(value) for name, value in facts.items()})
    for name, ours in everyone[0].items():
        for rank, theirs in enumerate(everyone):
            if theirs.get(name) != ours:
                raise ValueError(
                    f"All processes must train on the same data with the same settings, and `{name}` is "
                    f"{without_secrets(_short(ours))} in process 0 and {without_secrets(_short(theirs.get(name)))} in "
                    f"process {rank}. Start them by one command, from the same files."
                )


def _short(text: str | None) -> str:
    text = str(text)
    return text if len(text) <= 100 else f"{text[:100]}..."


@contextlib.contextmanager
def failing_together(error_type: type[Exception], *, during_upload: bool = False) -> Iterator[None]:
    """Raise in all processes where one of them raises within; all must enter. A process without an error of its own
    raises `error_type` with the message of the other's. `during_upload` is that of [`gather_objects`]."""
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    message = None if own is None else without_secrets(f"{type(own).__name__}: {own}")
    messages = gather_objects(message, during_upload=during_upload)
    if own is not None:
        raise own
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    if failed:
        raise error_type(f"Process {failed[0]} has failed, and all end with it: {messages[failed[0]]}")

"""Communication between training processes beyond that of the engines (DDP, FSDP2, DeepSpeed) themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from ..utils.errors import UserError
from ..utils.processes import ALONE, Peers
from ..utils.secrets import without_secrets

UPLOAD_TIMEOUT = timedelta(days=1)  # one process may upload for hours while the others wait


def several_processes() -> bool:
    """Return whether more than one process trains."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def max_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Replace each value by its maximum over all processes, in place, and return the tensor. Call it in all
    processes."""
    if several_processes():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def in_any_process(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is true in any process. Call it in all processes.

    It waits for the device, so do not call it in every step.
    """
    return bool(max_over_processes(torch.tensor(int(flag), device=device))) if several_processes() else flag


def gather_objects(value: Any, *, during_upload: bool = False) -> list[Any]:
    """Return the `value` of every process, in order of rank. Values must be small and picklable. Call it in all
    processes.

    A process waits for the others up to `ddp_timeout`, half an hour by default.

    Args:
        during_upload (`bool`): Whether one process may be uploading to the Hub meanwhile. The others then wait up to a
            day.

    Raises:
        `RuntimeError`: If another process has ended or does not respond in time.
    """
    if not several_processes():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(values, value, group=_upload_group(dist.group.WORLD) if during_upload else None)
    except RuntimeError as error:
        raise RuntimeError(
            f"Process {dist.get_rank()} has lost another process, which has ended or does not respond. To find the "
            f"cause, look for the first error in the output of all processes. ({error})"
        ) from error
    return values


@lru_cache(maxsize=1)
def _upload_group(world: Any) -> Any:
    """Return a process group of all processes in `world` that waits up to a day, created at the first call.

    It uses gloo, because collectives on an accelerator cannot wait so long.
    """
    return dist.new_group(backend="gloo", timeout=UPLOAD_TIMEOUT)


def peers(args: TrainingArguments) -> Peers:
    """Return the training processes as a group that exchanges Python objects."""
    return ALONE if args.world_size == 1 else Peers(args.process_index, args.world_size, gather_objects)


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raise `ValueError` in all processes if a value in `facts`, such as a setting, differs between processes.

    Call it in all processes. With different settings, they would wait for each other forever, or average the gradients
    of different runs.
    """
    everyone = gather_objects({name: repr(value) for name, value in facts.items()})
    for name, ours in everyone[0].items():
        for rank, theirs in enumerate(everyone):
            if theirs.get(name) != ours:
                raise UserError(
                    f"All processes must train on the same data with the same settings. `{name}` is "
                    f"{without_secrets(_short(ours))} in process 0 and {without_secrets(_short(theirs.get(name)))} in "
                    f"process {rank}. Start all processes with one command, from the same files."
                )


def _short(text: str | None) -> str:
    text = str(text)
    return text if len(text) <= 100 else f"{text[:100]}..."


@contextlib.contextmanager
def failing_together(error_type: type[Exception], *, during_upload: bool = False) -> Iterator[None]:
    """Make all processes raise if any raises within the context, which all must enter.

    The failed process raises its own error. The others raise `error_type` with its message. For `during_upload` see
    [`gather_objects`].
    """
    local_error: Exception | None = None
    try:
        yield
    except Exception as error:
        local_error = error
    message = None if local_error is None else without_secrets(f"{type(local_error).__name__}: {local_error}")
    messages = gather_objects(message, during_upload=during_upload)
    if local_error is not None:
        raise local_error
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    if failed:
        raise error_type(f"Process {failed[0]} failed, so all processes stop. Its error was: {messages[failed[0]]}")

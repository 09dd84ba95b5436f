"""What every process must know alike, outside of engines."""

from __future__ import annotations

import torch
import torch.distributed as dist


def several_processes() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def in_any_process(flag: bool, device: torch.device) -> bool:
    """True in all processes if it is in one. All wait for one another and for the device: not for every step."""
    if not several_processes():
        return flag
    votes = torch.tensor(int(flag), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes)

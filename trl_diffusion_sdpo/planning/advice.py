"""Which settings to change first: each candidate is planned, and the best are combined until the set-up fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..utils._compat import CHECKPOINTING
from .plan import Plan

Changes = dict[str, Any]
Replan = Callable[[Changes], Plan]  # `ValueError` where the changes cannot act
MOST_PROCESSES = 8  # of one machine
_LAST = ("num_processes", "use_peft")  # what needs other hardware, and what trains other weights


@dataclass(frozen=True)
class Advice:
    """A change of settings, and the plan with it."""

    words: str
    changes: Changes
    plan: Plan


def candidates(settings: Mapping[str, Any]) -> dict[str, Changes]:
    """Changes by their description, of those that differ from the settings that are known and set."""
    batch, accumulation = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
    all_changes: dict[str, Changes] = {
        "recompute activations in the backward pass": {CHECKPOINTING: True},
        "smaller micro-batches, more accumulation": {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": batch * accumulation,
        },
        "latents and prompts from a cache": {"precompute_latents": True},
        "the reference's errors from a cache": {"precompute_ref_errors": True},
        "VAE and text encoders on the CPU when idle": {"offload_frozen_components": True},
        "encode one image at a time": {"vae_encode_batch_size": 1},
        "one branch's activations at a time": {"safeguard_low_memory": True},
        "an optimizer with 8-bit states": {"optim": "adamw_bnb_8bit"},
        "a LoRA on a base in half precision": {"use_peft": True, "dtype": "bfloat16"},
        "a LoRA on a base in 4 bits": {"use_peft": True, "dtype": "bfloat16", "load_in_4bit": True},
        "weights, gradients and optimizer divided over more devices": {
            "accelerate_config": "zero3" if str(settings.get("accelerate_config")).startswith("zero") else "fsdp2",
            "num_processes": 2 * settings.get("num_processes", 1),
        },
    }
    if 2 * settings.get("num_processes", 1) > MOST_PROCESSES:
        del all_changes["weights, gradients and optimizer divided over more devices"]
    if settings.get("safeguard") != "parameter":
        del all_changes["one branch's activations at a time"]
    return {
        words: changes
        for words, changes in all_changes.items()
        if all(name in settings for name in changes)
        and any(settings[name] != value for name, value in changes.items())
    }


def advise(plan: Plan, settings: Mapping[str, Any], replan: Replan) -> list[Advice]:
    """Every candidate alone, those that save most first; what saves nothing, or cannot act, is left out."""
    found = []
    for words, changes in candidates(settings).items():
        try:
            found.append(Advice(words, changes, replan(changes)))
        except ValueError:
            continue
    return sorted((one for one in found if one.plan.peak < plan.peak), key=lambda one: one.plan.peak)


def first_fit(advice: list[Advice], gigabytes: float, replan: Replan) -> Advice | None:
    """The candidates applied one after another, cheap ones first, until the set-up fits; `None` where it does
    not on [`most_processes`] devices."""
    changes: Changes = {}
    words: list[str] = []
    for one in sorted(advice, key=lambda one: (*(name in one.changes for name in _LAST), one.plan.peak)):
        for step in _with_more_processes(one.changes):
            combined = changes | step
            try:
                plan = replan(combined)
            except ValueError:
                break
            changes, words = combined, [*words, *([] if one.words in words else [one.words])]
            if plan.fits(gigabytes):
                return Advice("; ".join(words), changes, plan)
    return None


def most_processes(advice: list[Advice]) -> int | None:
    """The processes that [`first_fit`] tries at most; `None` if it leaves them as they are."""
    tried = [step.get("num_processes", 0) for one in advice for step in _with_more_processes(one.changes)]
    return max(tried, default=0) or None


def _with_more_processes(changes: Changes) -> list[Changes]:
    """The changes, and the same with twice as many processes, again and again."""
    found = [changes]
    while 2 * found[-1].get("num_processes", MOST_PROCESSES) <= MOST_PROCESSES:
        found.append({**changes, "num_processes": 2 * found[-1]["num_processes"]})
    return found

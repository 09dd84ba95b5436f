"""What a resumed run takes from its checkpoint and what from its own arguments: where to resume, which settings and
data differ, and the optimizer's settings, which apply as they are given now."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..artifacts.weights import check_setup
from ..trainer.data_preparation import PREPARED
from ..trainer.diffusion_sdpo_config import DiffusionSDPOConfig

logger = logging.getLogger(__name__)

# Where things lie, what is told where, and which process this is: nothing of what is trained.
NOT_COMPARED = (
    *("output_dir", "logging_dir", "run_name", "project", "report_to", "disable_tqdm", "_n_gpu", "local_rank"),
    *("log_level", "log_level_replica", "log_on_each_node", "trackio_space_id", "trackio_bucket_id"),
    *("trackio_static_space_id", "push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"),
    *("hub_always_push", "hub_revision", "resume_from_checkpoint", "overwrite_output_dir", "trust_checkpoint"),
    *("checkpoint_on_interrupt", "ddp_timeout", "dataset_num_proc", "dataloader_pin_memory"),
    *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_num_workers"),
    "dataloader_multiprocessing_context",
)
# Optimizers that read one another's state; all others are of their own kind.
LIKE_ADAMW = ("adamw_torch", "adamw_torch_fused")
# Schedules that are no function of the step alone.
SCHEDULES_WITH_STATE = ("reduce_lr_on_plateau", "greedy")
# What arguments set in an optimizer's groups, where some optimizers keep state as well.
GROUP_SETTINGS = ("weight_decay", "betas", "eps", "momentum", "dampening", "nesterov", "alpha")


def check_resumable(
    checkpoint: Path, setup: dict[str, Any], args: DiffusionSDPOConfig, settings_before: dict[str, Any]
) -> None:
    """Compare a checkpoint with the run that is to go on from it, before anything is loaded.

    Args:
        checkpoint (`Path`): Its folder.
        setup (`dict[str, Any]`): This run's, see [`~checkpoint.write_setup`].
        args ([`DiffusionSDPOConfig`]): This run's.
        settings_before (`dict[str, Any]`): As of [`stored_settings`].

    Raises:
        `ValueError`: If the two cannot be one run: another model, optimizer or data.
    """
    before = check_setup(checkpoint, setup)
    check_settings(settings_before, args, compared_already=set(before))
    check_data(before.get("train_data"), setup["train_data"], starts_anew=args.ignore_data_skip)


def stored_settings(checkpoint: Path, file: str) -> dict[str, Any]:
    """All arguments of the run that wrote a checkpoint; none of one from before they were stored."""
    path = checkpoint / file
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def data_fingerprint(dataset: Any) -> dict[str, Any] | None:
    """What tells the training data from others; `None` of data that this package has not prepared."""
    return dataset.fingerprint() if isinstance(dataset, PREPARED) else None


def check_settings(stored: dict[str, Any], args: DiffusionSDPOConfig, compared_already: set[str]) -> None:
    """Name every setting that is another than the checkpoint's.

    Args:
        stored (`dict[str, Any]`): As of [`stored_settings`].
        args ([`DiffusionSDPOConfig`]): This run's.
        compared_already (`set[str]`): Names of which others tell.

    Raises:
        `ValueError`: Where what the checkpoint holds cannot serve under a setting.
    """
    ours = json.loads(args.to_json_string())
    skipped = {*NOT_COMPARED, *compared_already}
    differing = [name for name in ours if name in stored and name not in skipped and stored[name] != ours[name]]
    for name in differing:
        reason = _why_not(name, stored[name], ours[name])
        if reason:
            raise ValueError(
                f"A run cannot resume with another `{name}`, as {reason}: it was {stored[name]!r}, is {ours[name]!r}. "
                "Restore it, or pass the checkpoint's weights as `model` to start anew from them."
            )
    for name in differing:
        logger.warning("Resuming with another `%s`: it was %r, is %r.", name, stored[name], ours[name])


def _why_not(name: str, before: Any, now: Any) -> str:
    if name == "optim" and not {before, now} <= set(LIKE_ADAMW):
        return "one optimizer cannot read another's state"
    if name == "lr_scheduler_type" and {before, now} & set(SCHEDULES_WITH_STATE):
        return "such a schedule cannot read another's state"
    return ""


def check_data(before: dict[str, Any] | None, now: dict[str, Any] | None, *, starts_anew: bool) -> None:
    """Compare the training data's fingerprint with the checkpoint's.

    Args:
        before, now (`dict[str, Any]`, *optional*): As of `fingerprint` of the prepared data; `None` where unknown.
        starts_anew (`bool`): Whether the run begins its data from their start, `ignore_data_skip`.

    Raises:
        `ValueError`: If they are other data, in which the run cannot find its place.
    """
    if before is None or now is None:
        return
    both = [name for name in now if before.get(name) is not None and now[name] is not None]
    differing = [name for name in both if before[name] != now[name]]
    if not differing:
        return
    listed = "; ".join(f"{name} was {before[name]!r}, is {now[name]!r}" for name in differing)
    if differing == ["images"]:
        logger.warning("Resuming with other bytes in the images of the training data: %s.", listed)
    elif starts_anew:
        logger.warning("Resuming with other training data, from their start: %s.", listed)
    else:
        raise ValueError(
            f"A run goes on at its place in the training data, and these are others than the checkpoint's: {listed}. "
            "Pass the same data in the same order, or set `ignore_data_skip=True` to begin these from their start."
        )


@contextlib.contextmanager
def keep_optimizer_settings(
    optimizer: torch.optim.Optimizer, scheduler: Any, rate: float, rate_before: float | None
) -> Iterator[None]:
    """Have what this run's arguments set in optimizer and schedule survive the loading of a checkpoint within; see
    [`OptimizerSettings`]."""
    own = OptimizerSettings(optimizer, scheduler, rate, rate_before)
    yield
    own.restore(optimizer, scheduler)


class OptimizerSettings:
    """The learning rate, weight decay, betas and so on as this run's arguments have set them, to be set again after a
    checkpoint's optimizer and schedule were loaded, which bring along what they had.

    Args:
        optimizer (`torch.optim.Optimizer`): As the engine has wrapped it, before anything is loaded.
        scheduler (`LRScheduler`): Likewise.
        rate (`float`): The run's learning rate.
        rate_before (`float`, *optional*): The checkpoint's; of one from before it was stored, this run's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any, rate: float, rate_before: float | None):
        kept = (*GROUP_SETTINGS, "initial_lr")
        self.groups = [{name: group[name] for name in kept if name in group} for group in optimizer.param_groups]
        self.base_rates = list(_inner(scheduler).__dict__.get("base_lrs", ()))
        self.rate, self.rate_before = rate, rate if rate_before is None else rate_before

    def restore(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Set them again; the schedule's place stays the checkpoint's."""
        groups, schedule = optimizer.param_groups, _inner(scheduler)
        factors = []
        for group, ours in zip(groups, self.groups, strict=True):
            factors.append(self._factor(ours.get("initial_lr"), group.get("initial_lr")))
            for name, value in ours.items():
                if name in group and _plain(group[name]) != _plain(value):
                    group[name] = value
        if self.base_rates:
            schedule.base_lrs = list(self.base_rates)
        for group, rate in zip(groups, self._rates(groups, schedule, factors), strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        if "_last_lr" in schedule.__dict__:
            schedule._last_lr = [group["lr"] for group in groups]

    def _rates(self, groups: list[dict[str, Any]], schedule: Any, factors: list[float]) -> list[Any]:
        """The rates of the next step."""
        if isinstance(schedule, LambdaLR):
            step = schedule.last_epoch
            return [base * of(step) for base, of in zip(self.base_rates, schedule.lr_lambdas, strict=True)]
        if not isinstance(schedule, LRScheduler):  # DeepSpeed's own, which read their rates from its configuration
            return list(schedule.get_lr())
        return [group["lr"] * factor for group, factor in zip(groups, factors, strict=True)]

    def _factor(self, now: float | None, before: float | None) -> float:
        """How much larger the rate is, for schedules that go on from their last one."""
        if now is None or before is None:
            now, before = self.rate, self.rate_before
        return 1.0 if math.isclose(now, before, rel_tol=1e-12) else now / before


def _inner(scheduler: Any) -> Any:
    return scheduler.scheduler if isinstance(scheduler, AcceleratedScheduler) else scheduler


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value

"""Compare a run with the checkpoint from which it resumes, and replace the checkpoint's optimizer settings by the
run's."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

from ..utils._compat import set_last_rates
from ..utils.errors import UserError
from ..utils.files import json_object
from ..utils.identity import differences, listed
from ..utils.renamed import with_new_names
from .setup import ARGS_FILE, SETUP_FILE, read_setup

logger = logging.getLogger(__name__)

# Entries of the set-up file that must be equal. Otherwise the checkpoint's weights would not fit the model, or change
# it in another way, such as a LoRA on another base.
STRUCTURE = ("pipeline_class", "denoiser_class", "tuning", "reference", "lora", "weights_before_training", "engine")
# Settings that may differ without a warning: paths, logging, the Hub and data loader workers do not change the trained
# weights. Data are compared by their fingerprints, models by `weights_before_training` and `pipeline`.
NOT_COMPARED = (
    "output_dir",
    "logging_dir",
    "run_name",
    "project",
    "report_to",
    "disable_tqdm",
    "_n_gpu",
    "local_rank",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_token",
    "hub_private_repo",
    "hub_always_push",
    "hub_revision",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "ddp_timeout",
    "dataset_num_proc",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_num_workers",
    "dataloader_multiprocessing_context",
    "train_data",
    "eval_data",
    "base_model",
    "adapter_name_or_path",
)
# Facts about training data that may differ without a change of the position: images under the same prompts, and another
# commit of the same files.
SAME_POSITION = ("images", "commits")
# A run may switch between these when it resumes: each loads the other's state.
ADAMW = ("adamw_torch", "adamw_torch_fused")
# Learning rate schedules that need their saved state: the rate does not depend on the step alone.
SCHEDULES_WITH_STATE = ("reduce_lr_on_plateau", "greedy")
# Settings in an optimizer's parameter groups. Other entries may be state and are not overwritten.
GROUP_SETTINGS = ("initial_lr", "weight_decay", "betas", "eps", "momentum", "dampening", "nesterov", "alpha")


def stored_settings(checkpoint: Path) -> dict[str, Any]:
    """Return all arguments of the run that wrote a checkpoint, from `training_args.json`, or nothing if it is missing
    (it is not uploaded to the Hub). Raise `ValueError` if it cannot be read."""
    file = checkpoint / ARGS_FILE
    try:
        return json_object(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} must contain a run's arguments as JSON, and cannot be read: {error}. Copy the file again, or copy "
            "it from another checkpoint of the run."
        ) from error


def check_resumable(
    checkpoint: Path, setup: dict[str, Any], stored_args: dict[str, Any], args: TrainingArguments
) -> None:
    """Compare a checkpoint with the run that resumes from it, before it is loaded. Log the settings that differ.

    Args:
        checkpoint (`Path`): Folder of the checkpoint.
        setup (`dict[str, Any]`): Model, engine, data and settings of this run, as in the set-up file.
        stored_args (`dict[str, Any]`): Arguments of the run that wrote the checkpoint, from [`stored_settings`].
        args (`TrainingArguments`): Arguments of this run.

    Raises:
        `ValueError`: If the checkpoint was written with another model, optimizer, schedule or data set.
    """
    stored = read_setup(checkpoint)
    if not stored:
        raise UserError(
            f"A checkpoint to resume from must contain the file {SETUP_FILE}, and {checkpoint} does not. Pass a "
            "`checkpoint-*` folder that this trainer wrote."
        )
    settings, gone = with_new_names({**stored_args, **stored})
    for sentence in gone:
        logger.warning(sentence)
    _compare(settings, args, json.loads(json.dumps(setup)), checkpoint)
    _compare_data(stored.get("train_data"), setup["train_data"], starts_anew=args.ignore_data_skip)
    if "eval_data" in stored:
        _compare_eval_data(stored["eval_data"], setup["eval_data"], has_budget=setup.get("winner_budget") is not None)


def _compare(stored: dict[str, Any], args: TrainingArguments, setup: dict[str, Any], checkpoint: Path) -> None:
    current = {**json.loads(args.to_json_string()), **setup}
    names = [name for name in current if name not in NOT_COMPARED and (name in stored or name in setup)]
    stored["pipeline"], current["pipeline"] = _known_to_both(stored.get("pipeline"), current["pipeline"])
    found = {name: differences({name: stored.get(name)}, {name: current[name]}) for name in names}
    differing = {name: "; ".join(phrases) for name, phrases in found.items() if phrases}
    broken = [differing[name] for name in STRUCTURE if name in differing]
    if broken:
        raise UserError(
            f"A run must resume with the set-up of its checkpoint, and these entries differ: {'; '.join(broken)}. "
            f"Restore the earlier values, or start anew without resuming from {checkpoint}."
        )
    has_state = stored.get("lr_scheduler_type") in SCHEDULES_WITH_STATE
    for name, phrase in differing.items():
        reason = _why_not(name, stored.get(name), current[name], has_state)
        if reason:
            raise UserError(
                f"A run cannot resume with another `{name}`, because {reason}: {phrase}. Restore the earlier value, or "
                "pass the checkpoint's folder as `model` to start anew from its weights."
            )
    if differing:
        logger.warning("The run resumes with other settings than its checkpoint's: %s.", "; ".join(differing.values()))


def _why_not(name: str, before: Any, now: Any, has_state: bool) -> str:
    if name == "optim" and not {before, now} <= set(ADAMW):
        return "an optimizer cannot load the state of another optimizer"
    if name == "lr_scheduler_type" and {before, now} & set(SCHEDULES_WITH_STATE):
        return "a schedule of this kind cannot load the state of another schedule"
    if name == "learning_rate" and has_state:
        return "the learning rate is part of the schedule's state"
    return ""


def _compare_data(before: dict[str, Any] | None, now: dict[str, Any] | None, *, starts_anew: bool) -> None:
    """Compare the fingerprints of the training data in the checkpoint and in this run. Raise `ValueError` if the
    checkpoint's position means nothing in this run's data, unless it reads them from the start."""
    before, now = _known_to_both(before, now)
    found = differences(before, now)
    same_rows = {name: value for name, value in before.items() if name not in SAME_POSITION}
    if not found:
        return
    if not differences(same_rows, {name: now[name] for name in same_rows}):
        logger.warning(
            "The training data differ from those of the checkpoint (%s). The run continues at its position.",
            listed(found),
        )
    elif starts_anew:
        logger.warning(
            "The training data differ from those of the checkpoint (%s). The run reads the new data from the start.",
            listed(found),
        )
    else:
        raise UserError(
            "A run resumes at its position in the training data, so the data must be those of the checkpoint, and they "
            f"differ: {listed(found)}. Pass the same data in the same order, or set `ignore_data_skip=True` to read "
            "the new data from the start."
        )


def _compare_eval_data(before: dict[str, Any] | None, now: dict[str, Any] | None, *, has_budget: bool) -> None:
    """Compare the fingerprints of the evaluation data. `winner_budget` needs the pairs on which it measured the errors
    before training; otherwise, other pairs only make evaluations incomparable."""
    found = differences(*_known_to_both(before, now))
    if has_budget and (found or (before is None) != (now is None)):
        raise UserError(
            "`winner_budget` compares errors with those before training on the same evaluation pairs, and these differ "
            f"from the checkpoint's ({listed(found) or 'only one of the runs has some'}). Pass the checkpoint's "
            "`eval_dataset`, or start anew from its weights."
        )
    if found:
        logger.warning(
            "The evaluation data differ from those of the checkpoint (%s). Do not compare evaluations of this run with "
            "earlier ones.",
            listed(found),
        )


def _known_to_both(before: Any, now: Any) -> tuple[Any, Any]:
    """Return two descriptions without entries that one of them lacks or has as `None`: a checkpoint of an earlier
    version does not know them all, and weights that are not loaded have no hash."""
    if before is None or now is None:
        return {}, {}
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return before, now
    names = [name for name in now if before.get(name) is not None and now[name] is not None]
    both = {name: _known_to_both(before[name], now[name]) for name in names}
    return {name: pair[0] for name, pair in both.items()}, {name: pair[1] for name, pair in both.items()}


@contextlib.contextmanager
def keeping_optimizer_settings(optimizer: torch.optim.Optimizer, scheduler: Any) -> Iterator[None]:
    """Return a context in which the caller loads a checkpoint's optimizer and learning rate schedule. When it ends,
    this run's optimizer settings, such as learning rate and betas, replace the checkpoint's. The schedule stays at the
    checkpoint's step.

    The learning rate is replaced only where the schedule computes it from the step alone, as all of transformers do
    except [`SCHEDULES_WITH_STATE`], which continue with the checkpoint's rate.
    """
    schedule = scheduler.scheduler if isinstance(scheduler, AcceleratedScheduler) else scheduler
    replaced = [name for name in GROUP_SETTINGS if name != "initial_lr" or isinstance(schedule, LambdaLR)]
    settings = [{name: group[name] for name in replaced if name in group} for group in optimizer.param_groups]
    base_rates = list(schedule.base_lrs) if isinstance(schedule, LambdaLR) else []
    yield
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
    if not isinstance(schedule, LambdaLR):
        logger.warning("The learning rate of a %s continues from the checkpoint.", type(schedule).__name__)
        return
    schedule.base_lrs = base_rates
    step = schedule.last_epoch
    rates = [base * factor(step) for base, factor in zip(base_rates, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    set_last_rates(schedule, [group["lr"] for group in optimizer.param_groups])

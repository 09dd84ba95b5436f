"""The options that name the training and evaluation pairs, and how to load them."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import IntervalStrategy
from trl import ScriptArguments

from ..data.holdout import hold_out
from ..data.loading import has_one_split, load_pairs
from ..data.mixtures import PairMixture
from ..utils.errors import UserError

if TYPE_CHECKING:
    from ..trainer import DiffusionSDPOConfig

logger = logging.getLogger(__name__)

_HOW_TO_EVALUATE = (
    "Name evaluation pairs with `eval_dataset_name`, hold out training pairs with `test_size`, or leave out "
    "`eval_strategy`."
)


@dataclass
class PairSet:
    """One entry of the option `datasets`.

    Parameters:
        path (`str`): Hub id, folder or file of the data set, like the option `dataset_name`.
        name (`str`, *optional*): Configuration of a data set on the Hub, like the option `dataset_config`.
        split (`str`, *optional*): Split of the data set, by default `"train"`.
        weight (`float`, *optional*): Share of the training pairs to draw from this data set, relative to the sum of all
            weights. Set it for all data sets or for none.
        dataset_format (`str`, *optional*): Format of this data set, instead of the option `dataset_format`.
    """

    path: str
    name: str | None = None
    split: str = "train"
    weight: float | None = None
    dataset_format: str | None = None

    def __post_init__(self) -> None:
        self.path = str(self.path)
        self.weight = None if self.weight is None else float(self.weight)  # YAML reads `1e-1` as text


@dataclass
class PairArguments(ScriptArguments):
    """TRL's [`~trl.ScriptArguments`], with options for several training data sets and for evaluation pairs."""

    datasets: list[Any] | str | None = field(
        default=None,
        metadata={
            "help": "Several data sets to train on together, instead of `dataset_name`: a list of mappings, in YAML or "
            "as JSON, each with a `path` and optionally `name`, `split`, `weight` and `dataset_format`."
        },
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, folder or file of the evaluation pairs; by default the test split of `dataset_name`. The "
            "run then evaluates after every epoch, unless you set `eval_strategy`."
        },
    )
    test_size: float | None = field(
        default=None,
        metadata={
            "help": "Share in (0, 1) or number of rows of the training split to hold out for evaluation. The run then "
            "evaluates after every epoch, unless you set `eval_strategy`."
        },
    )

    def __post_init__(self):
        self.sets = _read_sets(self.datasets)
        if self.sets and self.dataset_name is not None:
            raise UserError(
                "Only one of `datasets` and `dataset_name` can name the training pairs, got both (`dataset_name` is "
                f"{self.dataset_name}). Move this data set into `datasets`, or leave one of the two out."
            )
        size = self.test_size
        if size is not None and not (0 < size < 1 or (size >= 1 and size == int(size))):
            raise UserError(
                f"`test_size` must be a share in (0, 1) or a whole number of rows, got {size}. Example: 0.05."
            )
        if size is not None and self.eval_dataset_name is not None:
            raise UserError(
                "Only one of `test_size` and `eval_dataset_name` can choose the evaluation pairs, got both. Leave out "
                "one of the two options."
            )


def _read_sets(value: Any) -> list[PairSet]:
    if value is None:
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"`datasets` must be a list of mappings, in YAML or as JSON, got {value!r}.") from error
    try:
        sets = [PairSet(**entry) for entry in value]
    except (TypeError, ValueError) as error:
        raise UserError(
            "`datasets` must be a list of mappings, each with a `path`, and optionally `name`, `split`, `weight` and "
            f"`dataset_format`. Got {value!r}."
        ) from error
    weighted = [entry.weight is not None for entry in sets]
    if any(weighted) and not all(weighted):
        raise UserError(
            f"`weight` must be set for all entries of `datasets` or for none, got {[entry.weight for entry in sets]}."
        )
    return sets


def load_datasets(script_args: PairArguments, training_args: DiffusionSDPOConfig) -> tuple[Any, Any]:
    """Return the training pairs and the evaluation pairs.

    With `eval_strategy="no"`, the evaluation pairs are `None`, but `test_size` and `eval_dataset_name` set it to
    `"epoch"`.

    Args:
        script_args (`PairArguments`): Options that name the data. `dataset_name` is as for
            [`~trl_diffusion_sdpo.load_pairs`].
        training_args (`DiffusionSDPOConfig`): Gives `eval_strategy`, `seed` and `dataset_format`.
    """
    sets = script_args.sets or [_only_set(script_args)]
    size = script_args.test_size
    if training_args.eval_strategy == "no" and (size is not None or script_args.eval_dataset_name is not None):
        training_args.eval_strategy = IntervalStrategy.EPOCH
        training_args.do_eval = True
        logger.info("The run evaluates at the end of every epoch. Set `eval_strategy` to evaluate at other times.")
    evaluates = training_args.eval_strategy != "no"
    if evaluates and size is not None and script_args.dataset_streaming:
        raise UserError(
            f"`test_size={size}` cannot hold out pairs of a stream, because its length and prompts are not known. Name "
            "evaluation pairs with `eval_dataset_name`, or leave out `dataset_streaming`."
        )
    trained = [_load_set(entry, script_args) for entry in sets]
    formats = [entry.dataset_format or training_args.dataset_format for entry in sets]
    held_out: list[Any] = []
    evaluation: Any = None
    if evaluates and size is not None:
        splits = hold_out(trained, size, seed=training_args.seed, formats=formats)
        trained = [train for train, _ in splits]
        held_out = [test for _, test in splits]
    elif evaluates:
        evaluation = _load_evaluation(script_args)
        for entry in sets:
            _refuse_training_pairs(script_args, entry)
    if not script_args.sets:
        return trained[0], held_out[0] if held_out else evaluation
    names = [f"{number}: {entry.path}" for number, entry in enumerate(sets)]
    weights = [entry.weight for entry in sets if entry.weight is not None] or None  # all have a weight, or none has
    if held_out:
        filled = [i for i, rows in enumerate(held_out) if len(rows)]
        evaluation = PairMixture({names[i]: held_out[i] for i in filled}, None, [formats[i] for i in filled])
    return PairMixture(dict(zip(names, trained, strict=True)), weights, formats), evaluation


def _only_set(script_args: ScriptArguments) -> PairSet:
    name = script_args.dataset_name
    if name is None:
        raise UserError(
            "`dataset_name` must be the Hub id, folder or file of a preference data set, got none. Set it."
        )
    return PairSet(name, script_args.dataset_config, script_args.dataset_train_split)


def _load_set(entry: PairSet, script_args: ScriptArguments) -> Any:
    return load_pairs(entry.path, entry.split, config=entry.name, streaming=script_args.dataset_streaming)


def public_name(script_args: ScriptArguments) -> str | None:
    """Return `dataset_name` if it is a Hub id, or `None` for a local path or several data sets."""
    name = script_args.dataset_name
    return None if name is None or Path(name).expanduser().exists() else name


def _load_evaluation(script_args: PairArguments) -> Any:
    """Load the test split of `eval_dataset_name`, or without it of `dataset_name`."""
    name = script_args.eval_dataset_name or script_args.dataset_name
    if name is None:
        raise UserError(
            f"`eval_strategy` needs evaluation pairs, and `datasets` has none by default. {_HOW_TO_EVALUATE}"
        )
    config = None if Path(name).expanduser().exists() else script_args.dataset_config
    try:
        return _load_set(PairSet(name, config, script_args.dataset_test_split), script_args)
    except ValueError as error:
        raise UserError(f"{error} {_HOW_TO_EVALUATE}") from error


def _refuse_training_pairs(script_args: PairArguments, trained: PairSet) -> None:
    """Raise `ValueError` if the evaluation pairs are the training pairs: the same split of one data set, or one file
    without splits."""
    evaluated = script_args.eval_dataset_name or trained.path
    path = Path(evaluated).expanduser()
    split = script_args.dataset_test_split
    if path.resolve() != Path(trained.path).expanduser().resolve():
        return
    is_whole = "[" not in split or "[" not in trained.split
    if split == trained.split or (is_whole and has_one_split(path)):
        raise UserError(
            "Evaluation pairs must not be training pairs. `eval_dataset_name` or `dataset_test_split` names the split "
            f"{trained.split} of {trained.path}, which is trained on. {_HOW_TO_EVALUATE}"
        )

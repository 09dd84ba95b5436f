"""Arguments for the training and evaluation pairs, and the functions that load them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from trl import ScriptArguments
from trl.scripts.utils import DatasetConfig

from ..data.holdout import hold_out
from ..data.loading import (
    ALL_SPLITS,
    ONLY_SPLIT,
    is_one_split,
    is_saved,
    load_pairs,
    load_pairs_from_files,
    rename_split,
    saved_splits,
    share_rows,
    surely_share_rows,
)
from ..data.sources import PairMixture
from ..utils.hints import did_you_mean

if TYPE_CHECKING:
    from ..trainer import DiffusionSDPOConfig

_HOW_TO_EVALUATE = (
    "Name other pairs with `eval_dataset_name`, hold some out of these with `test_size`, or leave `eval_strategy` out."
)
# Messages of `datasets` and `load_pairs` for a missing split.
_NO_SPLIT = re.compile("Unknown split|Bad split|must have the split")


@dataclass
class PairSet(DatasetConfig):
    """Entry of `datasets`: TRL's arguments of a data set, and the weight and format of its pairs.

    Parameters:
        path (`str`): Hub id, folder or file, like `dataset_name`.
        weight (`float`, *optional*): Share of pairs from this data set, relative to the sum of all weights. Set it for
            all data sets or for none.
        dataset_format (`str`, *optional*): Format of this data set. It overrides the setting `dataset_format`.
    """

    weight: float | None = None
    dataset_format: str | None = None

    @classmethod
    def read(cls, entry: Any) -> PairSet:
        """Read an entry of `datasets`."""
        keys = [field.name for field in fields(cls)]
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise ValueError(f"Each of `datasets` must be a mapping with a `path`, got {entry!r}.")
        if entry.get("fraction") is not None:
            raise ValueError(
                "`fraction` of a data set is TRL's share of a mixture that drops the rest of larger sets. Use "
                "`weight`, which keeps all pairs, and repeats those of smaller sets."
            )
        for key in entry:
            if key not in keys:
                raise ValueError(f"`{key}` is no key of a data set.{did_you_mean(str(key), keys)}")
        return cls(**entry)


@dataclass
class PairArguments(ScriptArguments):
    """[`~trl.ScriptArguments`] with several data sets, and two ways to name the pairs for evaluation."""

    datasets: list[Any] | str | None = field(
        default=None,
        metadata={
            "help": "Several data sets to train on together, instead of `dataset_name`: a list of mappings with `path` "
            "and, as needed, `name`, `split`, `data_dir`, `data_files`, `columns`, `weight` and `dataset_format`; in "
            "YAML, or as JSON."
        },
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Pairs for evaluation, as `dataset_name`; that data set's test split if unset."},
    )
    test_size: float | None = field(
        default=None,
        metadata={"help": "Share in (0, 1) or number of rows of the training split to hold out for evaluation."},
    )

    def __post_init__(self):
        self.sets = _read_sets(self.datasets)
        if self.sets and self.dataset_name is not None:
            raise ValueError(
                f"`datasets` names the training pairs in place of `dataset_name`, got both ({self.dataset_name}). Put "
                "it into the list, or leave one out."
            )
        size = self.test_size
        if size is not None and not (0 < size < 1 or (size >= 1 and size == int(size))):
            raise ValueError(f"`test_size` must be a share in (0, 1) or a whole number of rows, got {size}.")
        if size is not None and self.eval_dataset_name is not None:
            raise ValueError(
                "`test_size` holds pairs out of the training split and `eval_dataset_name` names others; got both. "
                "Leave one out."
            )


def _read_sets(value: Any) -> list[PairSet]:
    if value is None:
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"`datasets` must be a list of mappings, in YAML or as JSON, got {value!r}.") from error
    if not isinstance(value, list) or not value:
        raise ValueError(f"`datasets` must be a list of at least one mapping with a `path`, got {value!r}.")
    sets = [PairSet.read(entry) for entry in value]
    weighted = [entry.weight is not None for entry in sets]
    if any(weighted) and not all(weighted):
        raise ValueError(
            f"`weight` must be given for all of `datasets` or for none, got {[entry.weight for entry in sets]}."
        )
    return sets


def load_datasets(script_args: PairArguments, training_args: DiffusionSDPOConfig) -> tuple[Any, Any]:
    """Load the pairs for training, and those for evaluation unless `eval_strategy` is `"no"`.

    Args:
        script_args (`PairArguments`): The data. [`~trl_diffusion_sdpo.load_pairs`] says what `dataset_name` may be.
        training_args (`DiffusionSDPOConfig`): `eval_strategy`, seed and format.
    """
    sets = script_args.sets or [_only_set(script_args)]
    size = script_args.test_size
    evaluates = training_args.eval_strategy != "no"
    if evaluates and script_args.sets and size is None and script_args.eval_dataset_name is None:
        raise ValueError(f"`eval_strategy` needs pairs that are not among `datasets`. {_HOW_TO_EVALUATE}")
    if evaluates and size is not None and script_args.dataset_streaming:
        raise ValueError(
            f"`test_size={size}` cannot act on a stream, whose length and prompts are unknown. Name pairs with "
            "`eval_dataset_name`, or leave `dataset_streaming` out."
        )
    parts = [_load_set(entry, script_args, training_args.on_bad_row) for entry in sets]
    formats = [entry.dataset_format or training_args.dataset_format for entry in sets]
    held_out: list[Any] = []
    evaluation: Any = None
    if evaluates and size is not None:
        split = hold_out(parts, size, seed=training_args.seed, formats=formats)
        parts, held_out = [train for train, _ in split], [test for _, test in split]
    elif evaluates:
        evaluation = _load_evaluation(script_args, training_args.on_bad_row)
        for entry, part in zip(sets, parts, strict=True):
            _refuse_training_pairs(script_args, entry, part)
    if not script_args.sets:
        return parts[0], held_out[0] if held_out else evaluation
    names = [f"{number}: {entry.path}" for number, entry in enumerate(sets)]
    weights = [entry.weight for entry in sets if entry.weight is not None] or None  # all have one, or none has
    if held_out:
        filled = [i for i, rows in enumerate(held_out) if len(rows)]
        evaluation = PairMixture({names[i]: held_out[i] for i in filled}, None, [formats[i] for i in filled])
    return PairMixture(dict(zip(names, parts, strict=True)), weights, formats), evaluation


def _only_set(script_args: ScriptArguments) -> PairSet:
    name = script_args.dataset_name
    if name is None:
        raise ValueError("`dataset_name` must be the Hub id, folder or file of a preference data set, got none.")
    return PairSet(name, script_args.dataset_config, split=script_args.dataset_train_split)


def _load_set(entry: PairSet, script_args: ScriptArguments, on_bad_row: str) -> Any:
    streaming = script_args.dataset_streaming
    if entry.data_dir is None and entry.data_files is None:
        split = _split_of(entry.path, entry.split)
        loaded = load_pairs(entry.path, split, config=entry.name, streaming=streaming, on_bad_row=on_bad_row)
    else:
        files: dict[str, Any] = {"data_dir": entry.data_dir, "data_files": entry.data_files}
        loaded = load_pairs_from_files(entry.path, entry.split, streaming, entry.name, **files)
    return loaded if entry.columns is None else loaded.select_columns(entry.columns)


def public_name(script_args: ScriptArguments) -> str | None:
    """Return `dataset_name` if it is a Hub id; `None` for a local path and for several data sets."""
    name = script_args.dataset_name
    return None if name is None or Path(name).expanduser().exists() else name


def _load_evaluation(script_args: PairArguments, on_bad_row: str) -> Any:
    """Load the test split of `eval_dataset_name`, or else of the training data set."""
    other = script_args.eval_dataset_name
    is_local_other = other is not None and Path(other).expanduser().exists()
    config = None if is_local_other else script_args.dataset_config
    entry = PairSet(other or _only_set(script_args).path, config, split=script_args.dataset_test_split)
    try:
        return _load_set(entry, script_args, on_bad_row)
    except ValueError as error:
        if _NO_SPLIT.search(str(error)) is None:
            raise
        raise ValueError(f"{error} {_HOW_TO_EVALUATE}") from error


def _split_of(name: str, split: str) -> str:
    """Return a split of a data set. If it has only one, every name means that one."""
    return rename_split(split, ONLY_SPLIT) if is_one_split(Path(name).expanduser()) else split


def _refuse_training_pairs(script_args: PairArguments, trained: PairSet, loaded: Any) -> None:
    """Raise `ValueError` if evaluation pairs are also among the loaded training pairs of a data set."""
    evaluated = script_args.eval_dataset_name or trained.path
    test_split = script_args.dataset_test_split
    here, there = Path(trained.path).expanduser(), Path(evaluated).expanduser()
    is_same = here.resolve() == there.resolve() if here.exists() else str(here) == str(there)
    if not is_same:
        return
    is_whole = bool(trained.data_dir or trained.data_files)  # its rows may be those of any split
    splits = ALL_SPLITS if is_whole else _split_of(trained.path, trained.split), _split_of(evaluated, test_split)
    lengths = None if is_whole else _lengths(here, loaded)
    if not (surely_share_rows(*splits) if lengths is None else share_rows(*splits, lengths)):
        return
    if script_args.eval_dataset_name is not None:
        raise ValueError(
            f"`eval_dataset_name` must name other pairs than those that are trained on, got {trained.path} for both, "
            f"{test_split} beside {trained.split}. Hold pairs out of them with `test_size`."
        )
    raise ValueError(
        f"`dataset_test_split` must have other rows than `dataset_train_split`, got {test_split} beside "
        f"{trained.split} of {trained.path}: the evaluation would be on training pairs. {_HOW_TO_EVALUATE}"
    )


def _lengths(path: Path, loaded: Any) -> dict[str, int] | None:
    """Return the number of rows of each split of a data set; `None` for a stream, whose splits cannot be sliced."""
    if is_saved(path):
        return {name: len(part) for name, part in saved_splits(path).items()}
    if not isinstance(loaded, Dataset) or loaded.info.splits is None:
        return None
    return {name: part.num_examples for name, part in loaded.info.splits.items()}

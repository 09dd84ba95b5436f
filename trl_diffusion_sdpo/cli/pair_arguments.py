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
        """Read an entry of `datasets`.

        Raises:
            ValueError: If the entry is no mapping, has unknown keys or no path.
        """
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
    r"""
    [`~trl.ScriptArguments`] with several data sets, and two ways to name the pairs for evaluation.

    Parameters:
        datasets (`list` of `dict`, *optional*):
            Several data sets to train on together, instead of `dataset_name`, in YAML or as JSON. Each entry is a
            mapping with `path` and, as needed, `name`, `split`, `data_dir`, `data_files`, `columns`, `weight` and
            `dataset_format`.
        eval_dataset_name (`str`, *optional*):
            Pairs for evaluation, named like `dataset_name`. Their split `dataset_test_split` is used. Defaults to
            `dataset_name`.
        test_size (`float`, *optional*):
            Holds pairs out of the training split for evaluation: a share in `(0, 1)`, or a whole number of rows. All
            rows of a prompt go to one side; the run's `seed` decides which. Several data sets are split together.
    """

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

    Raises:
        ValueError: If there is no such data set or split, or the evaluation would be on training pairs.
    """
    if script_args.sets:
        return _load_mixture(script_args, training_args)
    name = _name_of(script_args)
    split = script_args.dataset_train_split
    on_bad_row = training_args.on_bad_row
    if training_args.eval_strategy == "no":
        return load_split(script_args, split, on_bad_row), None
    if script_args.test_size is not None:
        _refuse_streaming(script_args)
        pairs = load_split(script_args, split, on_bad_row)
        formats = [training_args.dataset_format]
        return hold_out([pairs], script_args.test_size, seed=training_args.seed, formats=formats)[0]
    _refuse_training_pairs(script_args, name, split)
    train = load_split(script_args, _split_of(name, split), on_bad_row)
    evaluation = _load_evaluation(script_args, on_bad_row)
    _refuse_training_pairs(script_args, name, split, train)
    return train, evaluation


def _load_mixture(script_args: PairArguments, training_args: DiffusionSDPOConfig) -> tuple[PairMixture, Any]:
    """Load all of `datasets`, and the pairs for evaluation: another data set, or rows that are held out."""
    sets = script_args.sets
    evaluates = training_args.eval_strategy != "no"
    names_others = evaluates and script_args.eval_dataset_name is not None
    if evaluates and not names_others and script_args.test_size is None:
        raise ValueError(f"`eval_strategy` needs pairs that are not among `datasets`. {_HOW_TO_EVALUATE}")
    if names_others:
        for entry in sets:
            is_whole = entry.data_dir or entry.data_files
            _refuse_training_pairs(script_args, entry.path, ALL_SPLITS if is_whole else entry.split)
    parts = [_load_set(entry, script_args, training_args.on_bad_row) for entry in sets]
    names = [f"{number}: {entry.path}" for number, entry in enumerate(sets)]
    weights = [entry.weight for entry in sets if entry.weight is not None] or None  # all have one, or none has
    formats = [entry.dataset_format or training_args.dataset_format for entry in sets]
    evaluation: Any = None
    if names_others:
        evaluation = _load_evaluation(script_args, training_args.on_bad_row)
        for entry, part in zip(sets, parts, strict=True):
            if not entry.data_dir and not entry.data_files:
                _refuse_training_pairs(script_args, entry.path, entry.split, part)
    elif evaluates and script_args.test_size is not None:
        _refuse_streaming(script_args)
        split = hold_out(parts, script_args.test_size, seed=training_args.seed, formats=formats)
        parts = [train for train, _ in split]
        held = [i for i, (_, test) in enumerate(split) if len(test)]
        evaluation = PairMixture({names[i]: split[i][1] for i in held}, None, [formats[i] for i in held])
    return PairMixture(dict(zip(names, parts, strict=True)), weights, formats), evaluation


def _load_set(entry: PairSet, script_args: PairArguments, on_bad_row: str) -> Any:
    streaming = script_args.dataset_streaming
    if entry.data_dir is None and entry.data_files is None:
        named = ScriptArguments(dataset_name=entry.path, dataset_config=entry.name, dataset_streaming=streaming)
        loaded = load_split(named, entry.split, on_bad_row)
    else:
        files: dict[str, Any] = {"data_dir": entry.data_dir, "data_files": entry.data_files}
        loaded = load_pairs_from_files(entry.path, entry.split, streaming, entry.name, **files)
    return loaded if entry.columns is None else loaded.select_columns(entry.columns)


def load_split(script_args: ScriptArguments, split: str, on_bad_row: str = "drop") -> Any:
    """Load one split of `dataset_name`. A single file has one split, so any name of a split loads it.

    Raises:
        ValueError: If there is no such data set or split, or a folder has images and no pairs.
    """
    name, config = _name_of(script_args), script_args.dataset_config
    return load_pairs(name, split, config=config, streaming=script_args.dataset_streaming, on_bad_row=on_bad_row)


def public_name(script_args: ScriptArguments) -> str | None:
    """Return `dataset_name` if it is a Hub id; `None` for a local path and for several data sets."""
    name = script_args.dataset_name
    return None if name is None or Path(name).expanduser().exists() else name


def _name_of(script_args: ScriptArguments) -> str:
    if script_args.dataset_name is None:
        raise ValueError("`dataset_name` must be the Hub id, folder or file of a preference data set, got none.")
    return script_args.dataset_name


def _load_evaluation(script_args: PairArguments, on_bad_row: str) -> Any:
    """Load the split for evaluation, of `eval_dataset_name` or else of the training data set."""
    name = script_args.eval_dataset_name or _name_of(script_args)
    is_local_other = script_args.eval_dataset_name is not None and Path(name).expanduser().exists()
    named = ScriptArguments(
        dataset_name=name,
        dataset_config=None if is_local_other else script_args.dataset_config,
        dataset_streaming=script_args.dataset_streaming,
    )
    try:
        return load_split(named, _split_of(name, script_args.dataset_test_split), on_bad_row)
    except ValueError as error:
        if _NO_SPLIT.search(str(error)) is None:
            raise
        raise ValueError(f"{error} {_HOW_TO_EVALUATE}") from error


def _split_of(name: str, split: str) -> str:
    """Return a split of a data set. If it has only one, every name means that one."""
    return rename_split(split, ONLY_SPLIT) if is_one_split(Path(name).expanduser()) else split


def _refuse_training_pairs(script_args: PairArguments, name: str, split: str, loaded: Any = None) -> None:
    """Raise `ValueError` if evaluation pairs are also training pairs.

    Args:
        name (`str`): Data set that is trained on.
        split (`str`): Its split that is trained on.
        loaded (*optional*): The loaded split. Without it, only the names of the splits are compared.
    """
    evaluated = script_args.eval_dataset_name or name
    test_split = script_args.dataset_test_split
    here, there = Path(name).expanduser(), Path(evaluated).expanduser()
    is_same = here.resolve() == there.resolve() if here.exists() else str(here) == str(there)
    if not is_same:
        return
    splits = _split_of(name, split), _split_of(evaluated, test_split)
    lengths = None if loaded is None else _lengths(here, loaded)
    if not (surely_share_rows(*splits) if lengths is None else share_rows(*splits, lengths)):
        return
    if script_args.eval_dataset_name is not None:
        raise ValueError(
            f"`eval_dataset_name` must name other pairs than those that are trained on, got {name} for both, "
            f"{test_split} beside {split}. Hold pairs out of them with `test_size`."
        )
    raise ValueError(
        f"`dataset_test_split` must have other rows than `dataset_train_split`, got {test_split} beside {split} of "
        f"{name}: the evaluation would be on training pairs. {_HOW_TO_EVALUATE}"
    )


def _lengths(path: Path, loaded: Any) -> dict[str, int] | None:
    """Return the number of rows of each split of a data set; `None` for a stream, whose splits cannot be sliced."""
    if is_saved(path):
        return {name: len(part) for name, part in saved_splits(path).items()}
    if not isinstance(loaded, Dataset) or loaded.info.splits is None:
        return None
    return {name: part.num_examples for name, part in loaded.info.splits.items()}


def _refuse_streaming(script_args: PairArguments) -> None:
    if script_args.dataset_streaming:
        raise ValueError(
            f"`test_size={script_args.test_size}` cannot act on a stream, whose length and prompts are not known. Name "
            "pairs with `eval_dataset_name`, or leave `dataset_streaming` out."
        )

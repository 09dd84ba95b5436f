"""The arguments that name the training and evaluation pairs, and the data sets that they load."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import ScriptArguments
from trl.scripts.utils import DatasetConfig

from ..data.holdout import hold_out, hold_out_of_several
from ..data.loading import (
    ALL_SPLITS,
    ONLY_SPLIT,
    is_one_split,
    is_saved,
    load_pairs,
    load_pairs_from_files,
    rename_split,
    saved_parts,
    share_rows,
    surely_share_rows,
)
from ..data.pairs import PairMixture
from ..utils.hints import did_you_mean

if TYPE_CHECKING:
    from ..trainer import DiffusionSDPOConfig

_HOW_TO_EVALUATE = (
    "Name other pairs with `eval_dataset_name`, hold some out of these with `test_size`, or leave `eval_strategy` out."
)
# What `datasets` and `load_pairs` say of a split that is not there.
_NO_SPLIT = re.compile("Unknown split|Bad split|must have the split")


@dataclass
class PairSet(DatasetConfig):
    """One of the data sets of `datasets`: TRL's arguments of a data set, with the weight and the format of its pairs.

    Parameters:
        path (`str`): Given like `dataset_name`.
        weight (`float`, *optional*): How often a pair is of this data set, as a share of the sum of all; for all or for
            none.
        dataset_format (`str`, *optional*): As `dataset_format`, which it overrides.
    """

    weight: float | None = None
    dataset_format: str | None = None

    @classmethod
    def read(cls, given: Any) -> PairSet:
        """An entry of `datasets`.

        Raises:
            ValueError: If it is no mapping, has unknown keys or no path.
        """
        keys = [field.name for field in fields(cls)]
        if not isinstance(given, dict) or not isinstance(given.get("path"), str):
            raise ValueError(f"Each of `datasets` must be a mapping with a `path`, got {given!r}.")
        if given.get("fraction") is not None:
            raise ValueError(
                "`fraction` of a data set is TRL's share of a mixture that drops the rest of larger sets. Use "
                "`weight`, which keeps all pairs, and repeats those of smaller sets."
            )
        for key in given:
            if key not in keys:
                raise ValueError(f"`{key}` is no key of a data set.{did_you_mean(str(key), keys)}")
        return cls(**given)


@dataclass
class PairArguments(ScriptArguments):
    r"""
    [`~trl.ScriptArguments`] with several data sets, and two ways to name the pairs for evaluation.

    Parameters:
        datasets (`list` of `dict`, *optional*):
            Several data sets to train on together, instead of `dataset_name`: of each a mapping with `path` and, as
            needed, `name`, `split`, `data_dir`, `data_files`, `columns`, `weight` and `dataset_format`. In YAML, or as
            JSON.
        eval_dataset_name (`str`, *optional*):
            Pairs for evaluation, given like `dataset_name`; their split `dataset_test_split` is used. The data of
            `dataset_name` if unset.
        test_size (`float`, *optional*):
            Holds pairs out of the training split for evaluation: a share in `(0, 1)`, or a whole number of rows. All
            rows of a prompt go to one side; the run's `seed` decides which. Of several data sets, of all their rows.
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


def _read_sets(given: Any) -> list[PairSet]:
    if given is None:
        return []
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"`datasets` must be a list of mappings, in YAML or as JSON, got {given!r}.") from error
    if not isinstance(given, list) or not given:
        raise ValueError(f"`datasets` must be a list of at least one mapping with a `path`, got {given!r}.")
    sets = [PairSet.read(entry) for entry in given]
    weighted = [entry.weight is not None for entry in sets]
    if any(weighted) and not all(weighted):
        raise ValueError(
            f"`weight` must be given for all of `datasets` or for none, got {[entry.weight for entry in sets]}."
        )
    return sets


def load_datasets(script_args: PairArguments, training_args: DiffusionSDPOConfig) -> tuple[Any, Any]:
    """The pairs for training, and those for evaluation unless `eval_strategy` is `"no"`.

    `dataset_name` is what [`~trl_diffusion_sdpo.load_pairs`] takes.

    Args:
        script_args (`PairArguments` or `trl.ScriptArguments`): The data.
        training_args (`DiffusionSDPOConfig`): `eval_strategy`, seed and format.

    Raises:
        ValueError: If there is no such data set or split, or the evaluation would be on training pairs.
    """
    if script_args.sets:
        return _load_mixture(script_args, training_args)
    train_split, bad = script_args.dataset_train_split, training_args.on_bad_row
    if training_args.eval_strategy == "no":
        return load_split(script_args, train_split, bad), None
    if script_args.eval_dataset_name is not None and not _names_one_data_set(script_args):
        evaluation = _load_other(script_args, bad)
        return load_split(script_args, train_split, bad), evaluation
    if script_args.test_size is not None:
        _refuse_streaming(script_args)
        known: dict[str, Any] = {"dataset_format": training_args.dataset_format, "seed": training_args.seed}
        return hold_out(load_split(script_args, train_split, bad), script_args.test_size, **known)
    _refuse_shared_rows(script_args)
    train, evaluation = load_split(script_args, train_split, bad), _load_test_split(script_args, bad)
    _refuse_shared_rows(script_args, train)
    return train, evaluation


def _load_mixture(script_args: PairArguments, training_args: DiffusionSDPOConfig) -> tuple[PairMixture, Any]:
    """All of `datasets`, and the pairs for evaluation: others, or some held out."""
    sets, evaluates = script_args.sets, training_args.eval_strategy != "no"
    if evaluates and script_args.eval_dataset_name is None and script_args.test_size is None:
        raise ValueError(f"`eval_strategy` needs pairs that are not among `datasets`. {_HOW_TO_EVALUATE}")
    names_others = evaluates and script_args.eval_dataset_name is not None
    beside = _sets_of_evaluation(script_args) if names_others else {}
    for named in beside.values():
        _refuse_shared_rows(named)
    parts = [_load_set(entry, script_args, training_args.on_bad_row) for entry in sets]
    names = [f"{number}: {entry.path}" for number, entry in enumerate(sets)]
    weights = None if sets[0].weight is None else [entry.weight for entry in sets]
    formats = [entry.dataset_format or training_args.dataset_format for entry in sets]
    evaluation: Any = None
    for number, named in beside.items():
        _refuse_shared_rows(named, parts[number])
    if names_others:
        evaluation = _load_other(script_args, training_args.on_bad_row)
    elif evaluates:
        _refuse_streaming(script_args)
        split = hold_out_of_several(parts, script_args.test_size, seed=training_args.seed, formats=formats)
        parts = [train for train, _ in split]
        held = [i for i, (_, test) in enumerate(split) if len(test)]
        evaluation = PairMixture({names[i]: split[i][1] for i in held}, None, [formats[i] for i in held])
    return PairMixture(dict(zip(names, parts, strict=True)), weights, formats), evaluation


def _sets_of_evaluation(script_args: PairArguments) -> dict[int, PairArguments]:
    """Those of `datasets` that `eval_dataset_name` names as well, by their numbers, with the splits of both."""
    name, found = script_args.eval_dataset_name, {}
    for number, entry in enumerate(script_args.sets):
        if not _is_same_place(name, entry.path):
            continue
        found[number] = PairArguments(
            dataset_name=entry.path,
            dataset_train_split=ALL_SPLITS if entry.data_dir or entry.data_files else entry.split,
            dataset_test_split=script_args.dataset_test_split,
            dataset_streaming=script_args.dataset_streaming,
            eval_dataset_name=name,
        )
    return found


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
    """One split of `dataset_name`; a file is one split under any name.

    Raises:
        ValueError: If there is no such data set or split, or a folder has images and no pairs.
    """
    name, config = script_args.dataset_name, script_args.dataset_config
    return load_pairs(name, split, config=config, streaming=script_args.dataset_streaming, on_bad_row=on_bad_row)


def public_name(script_args: ScriptArguments) -> str | None:
    """`dataset_name` if it is a Hub id; `None` for a local path, which is not published, and for several data sets."""
    name = script_args.dataset_name
    if name is None:
        return None
    return None if Path(name).expanduser().exists() else name


def _names_one_data_set(script_args: PairArguments) -> bool:
    """Whether `eval_dataset_name` is the training data set."""
    return _is_same_place(script_args.dataset_name, script_args.eval_dataset_name)


def _is_same_place(first: str, second: str) -> bool:
    here, there = (Path(name).expanduser() for name in (first, second))
    return here.resolve() == there.resolve() if here.exists() else str(here) == str(there)


def _load_other(script_args: PairArguments, on_bad_row: str) -> Any:
    """Pairs of `eval_dataset_name`, where it is not the training data set."""
    there, split = Path(script_args.eval_dataset_name).expanduser(), script_args.dataset_test_split
    other = ScriptArguments(
        dataset_name=script_args.eval_dataset_name,
        dataset_config=None if there.exists() else script_args.dataset_config,
        dataset_streaming=script_args.dataset_streaming,
    )
    return load_split(other, rename_split(split, ONLY_SPLIT) if is_one_split(there) else split, on_bad_row)


def _splits(script_args: PairArguments) -> tuple[str, str]:
    """The splits of `dataset_name` for training and evaluation, by the only name there is if it has one split."""
    splits = script_args.dataset_train_split, script_args.dataset_test_split
    if is_one_split(Path(script_args.dataset_name).expanduser()):
        return rename_split(splits[0], ONLY_SPLIT), rename_split(splits[1], ONLY_SPLIT)
    return splits


def _lengths(script_args: PairArguments, train: Any) -> dict[str, int] | None:
    """Number of rows of each split of `dataset_name`, by its loaded training split; `None` for a stream, whose splits
    cannot be sliced."""
    path = Path(script_args.dataset_name).expanduser()
    if is_saved(path):
        return {name: len(part) for name, part in saved_parts(path).items()}
    if script_args.dataset_streaming:
        return None
    return {name: part.num_examples for name, part in train.info.splits.items()}


def _refuse_shared_rows(script_args: PairArguments, train: Any = None) -> None:
    """Raise `ValueError` where the splits for training and evaluation share rows: as far as their names tell or, given
    the loaded training split, by the splits' lengths."""
    if train is None:
        shared = surely_share_rows(*_splits(script_args))
    else:
        lengths = _lengths(script_args, train)
        shared = lengths is not None and share_rows(*_splits(script_args), lengths)
    if shared:
        raise _on_training_pairs(script_args)


def _on_training_pairs(script_args: PairArguments) -> ValueError:
    """The error for evaluation pairs that are also training pairs."""
    name, test_split = script_args.dataset_name, script_args.dataset_test_split
    if script_args.eval_dataset_name is not None:
        return ValueError(
            f"`eval_dataset_name` must name other pairs than those that are trained on, got {name} for both, "
            f"{test_split} beside {script_args.dataset_train_split}. Hold pairs out of them with `test_size`."
        )
    if is_one_split(Path(name).expanduser()) and "[" not in test_split:
        return ValueError(
            f"`eval_strategy` needs pairs that are not trained on, and {name} is one split, all of it trained on. "
            + _HOW_TO_EVALUATE
        )
    return ValueError(
        f"`dataset_test_split` must be another split than `dataset_train_split`, got {test_split} beside "
        f"{script_args.dataset_train_split}: the evaluation would be on training pairs. {_HOW_TO_EVALUATE}"
    )


def _load_test_split(script_args: PairArguments, on_bad_row: str) -> Any:
    try:
        return load_split(script_args, _splits(script_args)[1], on_bad_row)
    except ValueError as error:
        if _NO_SPLIT.search(str(error)) is None:
            raise
        raise ValueError(f"{error} {_HOW_TO_EVALUATE}") from error


def _refuse_streaming(script_args: PairArguments) -> None:
    if script_args.dataset_streaming:
        raise ValueError(
            f"`test_size={script_args.test_size}` cannot act on a stream, whose length and prompts are not known. Name "
            "pairs with `eval_dataset_name`, or leave `dataset_streaming` out."
        )

"""Which pairs a run trains on and which it is evaluated on, from words to data sets."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from trl import ScriptArguments

from ..data.holdout import hold_out

if TYPE_CHECKING:
    from ..trainer import DiffusionSDPOConfig

# Files of `Dataset.save_to_disk` and `DatasetDict.save_to_disk`.
_SAVED_DATASET, _SAVED_DATASET_DICT = "state.json", "dataset_dict.json"
_FILE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}
_HOW_TO_EVALUATE = (
    "Name other pairs with `eval_dataset_name`, hold some out of these with `test_size`, or leave `eval_strategy` out."
)


@dataclass
class PairArguments(ScriptArguments):
    r"""
    [`~trl.ScriptArguments`] with two ways to say which pairs a run is evaluated on.

    Parameters:
        eval_dataset_name (`str`, *optional*):
            Pairs for evaluation, of the kinds that `dataset_name` takes; their split `dataset_test_split`. The data of
            `dataset_name` if unset.
        test_size (`float`, *optional*):
            Holds pairs out of the training split for evaluation: a share in `(0, 1)`, or a whole number of rows. All
            rows of a prompt go to one side; the run's `seed` decides which.
    """

    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Pairs for evaluation, as `dataset_name`; that data set's test split if unset."},
    )
    test_size: float | None = field(
        default=None,
        metadata={"help": "Share in (0, 1) or number of rows of the training split to hold out for evaluation."},
    )

    def __post_init__(self):
        size = self.test_size
        if size is not None and not (0 < size < 1 or (size >= 1 and size == int(size))):
            raise ValueError(f"`test_size` must be a share in (0, 1) or a whole number of rows, got {size}.")
        if size is not None and self.eval_dataset_name is not None:
            raise ValueError(
                "`test_size` holds pairs out of the training split and `eval_dataset_name` names others; got both. "
                "Leave one out."
            )


def load_datasets(script_args: PairArguments, training_args: DiffusionSDPOConfig) -> tuple[Any, Any]:
    """The pairs to train on, and those to evaluate on if `eval_strategy` asks for them.

    `dataset_name` is a Hub id, a file (parquet, arrow, JSON, CSV), a folder of such files or of images, or a folder
    that `save_to_disk` wrote.

    Args:
        script_args (`PairArguments` or `trl.ScriptArguments`): Which data.
        training_args (`DiffusionSDPOConfig`): Whether there is an evaluation, the seed and the format.

    Raises:
        ValueError: If there is no such data set or split, or the evaluation would be on training pairs.
    """
    train_split = script_args.dataset_train_split
    if training_args.eval_strategy == "no":
        return load_split(script_args, train_split), None
    if script_args.eval_dataset_name is not None:
        evaluation = _load_named_for_evaluation(script_args)
        return load_split(script_args, train_split), evaluation
    if script_args.test_size is not None:
        _refuse_streaming(script_args)
        known = {"dataset_format": training_args.dataset_format, "seed": training_args.seed}
        return hold_out(load_split(script_args, train_split), script_args.test_size, **known)
    _refuse_training_pairs(script_args)
    return load_split(script_args, train_split), _load_test_split(script_args)


def load_split(script_args: ScriptArguments, split: str) -> Any:
    """One split of `dataset_name`; a file is one split, whatever that is called.

    Raises:
        ValueError: If there is no such data set or split.
    """
    name, streaming = script_args.dataset_name, script_args.dataset_streaming
    path = Path(name).expanduser()
    if path.exists() and script_args.dataset_config is not None:
        message = "`dataset_config=%s` has no effect on %s: configurations belong to data sets of the Hub."
        logging.getLogger(__name__).warning(message, script_args.dataset_config, name)
    if _is_saved(path):
        dataset = _load_saved(path, split)
        return dataset.to_iterable_dataset() if streaming else dataset
    if path.is_file():
        builder = _FILE_BUILDERS.get(path.suffix.lower())
        if builder is None:
            raise ValueError(
                f"A data set in one file must end in {', '.join(_FILE_BUILDERS)}; got {name}. Pass its folder instead."
            )
        files = {_name_of(split): str(path)}
        return datasets.load_dataset(builder, data_files=files, split=split, streaming=streaming)
    if path.is_dir():
        return datasets.load_dataset(str(path), split=split, streaming=streaming)
    return datasets.load_dataset(name, name=script_args.dataset_config, split=split, streaming=streaming)


def _load_named_for_evaluation(script_args: PairArguments) -> Any:
    """Pairs of `eval_dataset_name`, if they are others than those that are trained on."""
    here, there = (Path(name).expanduser() for name in (script_args.dataset_name, script_args.eval_dataset_name))
    same = here.resolve() == there.resolve() if here.exists() else str(here) == str(there)
    split = script_args.dataset_test_split
    if same and (_is_one_split(here) or split == script_args.dataset_train_split):
        raise ValueError(
            f"`eval_dataset_name` must name other pairs than those that are trained on, got {there} for both. Hold "
            "pairs out of them with `test_size`."
        )
    other = ScriptArguments(
        dataset_name=script_args.eval_dataset_name,
        dataset_config=None if there.exists() else script_args.dataset_config,
        dataset_streaming=script_args.dataset_streaming,
    )
    return load_split(other, "train" if _is_one_split(there) else split)


def _refuse_training_pairs(script_args: PairArguments) -> None:
    """Raise `ValueError` where the split to evaluate on is the one that is trained on."""
    path = Path(script_args.dataset_name).expanduser()
    train_split, test_split = script_args.dataset_train_split, script_args.dataset_test_split
    sliced = "[" in train_split and "[" in test_split and train_split != test_split
    if _is_one_split(path) and not sliced:
        raise ValueError(
            f"`eval_strategy` needs pairs that are not trained on, and {path} is one split, all of it trained on. "
            f"{_HOW_TO_EVALUATE}"
        )
    if _name_of(train_split) == _name_of(test_split) and not sliced:
        raise ValueError(
            f"`dataset_test_split` must be another split than `dataset_train_split`, got {test_split} beside "
            f"{train_split}: the evaluation would be on training pairs. {_HOW_TO_EVALUATE}"
        )


def _load_test_split(script_args: PairArguments) -> Any:
    try:
        return load_split(script_args, script_args.dataset_test_split)
    except ValueError as error:  # that there is no such split
        raise ValueError(f"{error} {_HOW_TO_EVALUATE}") from error


def _refuse_streaming(script_args: PairArguments) -> None:
    if script_args.dataset_streaming:
        raise ValueError(
            f"`test_size={script_args.test_size}` cannot act on a stream, whose length and prompts are not known. Name "
            "pairs with `eval_dataset_name`, or leave `dataset_streaming` out."
        )


def _is_saved(path: Path) -> bool:
    return (path / _SAVED_DATASET).is_file() or _is_saved_dict(path)


def _is_saved_dict(path: Path) -> bool:
    return (path / _SAVED_DATASET_DICT).is_file()


def _is_one_split(path: Path) -> bool:
    return path.is_file() or (_is_saved(path) and not _is_saved_dict(path))


def _name_of(split: str) -> str:
    """`train` of `train[:90%]`."""
    return split.partition("[")[0]


def _load_saved(path: Path, split: str) -> Any:
    """A split of what `save_to_disk` wrote; a single `Dataset` is the split `train`."""
    saved = datasets.load_from_disk(str(path))
    parts = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if split not in parts:
        raise ValueError(f"The data set {path} must have the split {split!r}; it has {', '.join(parts)}.")
    return parts[split]

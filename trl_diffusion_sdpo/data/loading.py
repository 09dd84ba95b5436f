"""Loading of pairs from a data set on the Hub, a file or a folder. Splits are named by split expressions of `datasets`,
such as `train[:90%]` or `train+test`."""

from __future__ import annotations

import logging
import ntpath
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from .formats import FORMATS, SOURCE_COLUMNS
from .image_folders import LAYOUTS, make_datasets, read_image_folder

logger = logging.getLogger(__name__)

ALL_SPLITS = "all"  # the name in `datasets` for the concatenation of all splits
ONLY_SPLIT = "train"  # the name in `datasets` for the single split of data without splits

# Files of `Dataset.save_to_disk` and `DatasetDict.save_to_disk`.
_SAVED_DATASET, _SAVED_DATASET_DICT = "state.json", "dataset_dict.json"
FILE_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {  # file suffix -> builder of `datasets` and its arguments
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
}
_SPLIT_NAMES = (ONLY_SPLIT, "validation", "test")
_COLUMNS = [name for each in FORMATS.values() for name in (*each.image_columns, *each.other_image_columns)]
_IMAGE_COLUMNS = tuple(dict.fromkeys((*_COLUMNS, *SOURCE_COLUMNS, "mask", *(f"{name}_mask" for name in _COLUMNS))))
_PROMPT_COLUMNS = {name for each in FORMATS.values() for name in each.prompt_columns}


def load_pairs(
    name: str | os.PathLike,
    split: str = ONLY_SPLIT,
    *,
    config: str | None = None,
    streaming: bool = False,
    on_bad_row: str = "drop",
) -> datasets.Dataset | datasets.IterableDataset:
    """Load the rows of a data set by its name, as the command `train` does.

    Args:
        name (`str` or `os.PathLike`): Id on the Hub, or path of a file or folder. Files may be parquet, arrow, JSON,
            JSONL (also Flow-Factory's `schema_version` 2), CSV or TSV. A folder may contain these files, or images with
            `metadata.jsonl` or `metadata.csv`, or images in the folders `chosen` and `rejected`, or images with ranks
            at the end of their names. A folder may also be the output of `pairs pick`, `pairs generate` or
            `save_to_disk`. Relative names of images in a local file are looked up in its folder, then in the working
            directory.
        split (`str`): Split expression, such as `"train"` or `"train[:90%]"`. A single file is accepted under any split
            name.
        config (`str`, *optional*): Configuration of a data set of the Hub.
        streaming (`bool`): Whether to load a stream.
        on_bad_row (`str`): `"drop"` skips images of a folder that are in no pair, and counts them. `"raise"` raises an
            error.

    Raises:
        ValueError: If the data set or split does not exist, or if a folder has images but no pairs.
    """
    path = Path(name).expanduser()
    if (path / "manifest.jsonl").is_file() and (path / "pairs.jsonl").is_file():
        path /= "pairs.jsonl"  # ignore the other files that `pairs pick` and `pairs generate` write
    if path.exists() and config is not None:
        message = "`dataset_config=%s` has no effect on %s, because only data sets on the Hub have configurations."
        logger.warning(message, config, name)
    if is_saved(path):
        loaded = with_resolved_names(_rows_of_splits(path, saved_splits(path), split), [path])
        return loaded.to_iterable_dataset() if streaming else loaded
    if path.is_file():
        return _load_file(path, split, streaming)
    if not path.is_dir():
        return refuse_mixed_types(datasets.load_dataset(str(name), name=config, split=split, streaming=streaming))
    layout = read_image_folder(path)
    if layout is None:
        return _load_folder(path, split, streaming)
    made = _rows_of_splits(path, make_datasets(layout), split)
    for name in {_split_name(summand) for summand in _summands(split)} & set(layout) or layout:
        layout[name].report(strict=on_bad_row == "raise")
    return made.to_iterable_dataset() if streaming else made


def is_saved(path: Path) -> bool:
    """Return whether a folder was written by `save_to_disk`."""
    return (path / _SAVED_DATASET).is_file() or (path / _SAVED_DATASET_DICT).is_file()


def is_one_split(path: Path) -> bool:
    """Return whether a path has only one split, so that any split name is accepted for it."""
    return path.is_file() or ((path / _SAVED_DATASET).is_file() and not (path / _SAVED_DATASET_DICT).is_file())


def saved_splits(path: Path) -> dict[str, datasets.Dataset]:
    """Return the data sets that `save_to_disk` wrote, by split. A single `Dataset` is the split `train`."""
    saved = datasets.load_from_disk(str(path))
    return saved if isinstance(saved, datasets.DatasetDict) else {ONLY_SPLIT: saved}


def _rows_of_splits(path: Path, splits: Mapping[str, datasets.Dataset], split: str) -> datasets.Dataset:
    """Return the rows of a split expression."""
    if split in splits:
        return splits[split]
    try:
        rows = rows_of(split, {name: len(rows) for name, rows in splits.items()})
    except ValueError as error:
        raise ValueError(f"The data set {path} must have the split {split!r}; it has {', '.join(splits)}.") from error
    joined = datasets.concatenate_datasets([splits[name].select(numbers) for name, numbers in rows])
    joined.info.splits = next(iter(splits.values())).info.splits
    return joined


def _load_file(path: Path, split: str, streaming: bool) -> Any:
    if path.suffix.lower() not in FILE_BUILDERS:
        raise ValueError(
            f"A data set in one file must end in {', '.join(FILE_BUILDERS)}; got {path}. Pass the folder of the "
            "file instead."
        )
    name, options = FILE_BUILDERS[path.suffix.lower()]
    builder = datasets.load_dataset_builder(name, data_files={ONLY_SPLIT: str(path)}, **options)
    return _load(builder, rename_split(split, ONLY_SPLIT), streaming)


def _load_folder(path: Path, split: str, streaming: bool) -> Any:
    try:
        return _load(_builder_of(path), split, streaming, path)
    except ValueError as error:
        if "_file_name`" not in str(error):
            raise
        raise ValueError(
            f"The folder {path} needs columns with the names of its images, such as `chosen_file_name` and "
            f"`rejected_file_name`. If other columns have these names, pass the metadata file instead of "
            f"its folder. ({error})"
        ) from error


def _load(builder: datasets.DatasetBuilder, split: str, streaming: bool, *folders: Path) -> Any:
    """Load a split like `datasets.load_dataset`. Relative names of images are looked up in the folder of the data
    files, then in `folders`."""
    if streaming:
        loaded = builder.as_streaming_dataset(split)
    else:
        builder.download_and_prepare()
        loaded = builder.as_dataset(split)
    return with_resolved_names(loaded, [*_folders_of_files(builder, split), *folders])


def _builder_of(path: Path) -> datasets.DatasetBuilder:
    """Return the builder that `datasets` chooses for a folder, or one for its data files if `datasets` skips them."""
    try:
        builder = datasets.load_dataset_builder(str(path))
    except ValueError:  # the splits have files of different types
        pass
    else:
        names = [name for files in (builder.config.data_files or {}).values() for name in files]
        if builder.name != "imagefolder" or any(_is_metadata(name) for name in names):
            return builder
    return datasets.load_dataset_builder(str(path), data_files=_data_files(path))


def _is_metadata(name: str) -> bool:
    stem, suffix = os.path.splitext(os.path.basename(name))
    return stem == "metadata" or suffix.lower() in (".tar", ".zip")  # archives may contain a metadata file


def _data_files(path: Path) -> dict[str, list[str]]:
    """Return the data files, such as CSV files, of a folder that also has images, by split.

    Raises:
        ValueError: If there are no data files, or data files of several types.
    """
    files = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in FILE_BUILDERS)
    if len({file.suffix.lower() for file in files}) != 1:
        listed = f" Pass one of its files {', '.join(file.name for file in files)}." if files else ""
        raise ValueError(f"{path} has images but no pairs.{listed} {LAYOUTS}")
    by_split = {file.stem: [file.name] for file in files if file.stem in _SPLIT_NAMES}
    return by_split if ONLY_SPLIT in by_split else {ONLY_SPLIT: [file.name for file in files]}


def _folders_of_files(builder: datasets.DatasetBuilder, split: str) -> list[Path]:
    """Return the folder of a split's local data files. The list is empty if the files are in several folders."""
    of_splits = builder.config.data_files or {}
    wanted = {_split_name(summand) for summand in _summands(split)}
    names = [name for each in of_splits if wanted & {each, ALL_SPLITS} for name in of_splits[each]]
    folders = {Path(name).parent for name in names if "://" not in name}
    return list(folders) if len(folders) == 1 else []


# ---- Names of images ----------------------------------------------------------------------------------------------


def with_resolved_names(dataset: Any, folders: Sequence[str | os.PathLike]) -> Any:
    """Replace relative names of images by absolute paths. Search `folders` in order, then the working directory.

    If no folder has the file, the result is the path that the file would have in the first folder.
    """
    dataset = with_flat_rows(dataset)
    features = refuse_mixed_types(dataset).features or {}
    names = dataset.column_names or list(next(iter(dataset), {}))
    columns = [name for name in _IMAGE_COLUMNS if name in names and not _is_image_feature(features.get(name))]
    if not folders or not columns:
        return dataset
    roots = [os.path.abspath(folder) for folder in (*folders, os.curdir)]
    options: dict[str, Any] = {"input_columns": columns, "features": dataset.features}
    if isinstance(dataset, datasets.IterableDataset):
        rows = dataset.decode(False) if features else dataset
        return rows.map(partial(_in_row, columns, roots), **options)
    batches = dataset.select_columns(columns).iter(1000)
    if not any(_find(value, roots) != value for batch in batches for values in batch.values() for value in values):
        return dataset
    find = partial(_in_batch, columns, roots)
    # The cache of `datasets` would not notice that a file has moved.
    return dataset.map(find, batched=True, load_from_cache_file=False, desc="Finding images", **options)


def with_flat_rows(dataset: Any) -> Any:
    """Turn rows of Flow-Factory's JSONL (`schema_version` 2) into rows with `prompt`, `chosen`, `rejected` and, if some
    have media in their input, `source_image`. Return data sets in other formats unchanged."""
    names = dataset.column_names or list(next(iter(dataset), {}))
    if not {"schema_version", "input", "supervision"} <= set(names):
        return dataset
    is_stream = isinstance(dataset, datasets.IterableDataset)
    sources = 0 if is_stream else max((len(_images(row)) for row in dataset["input"]), default=0)
    return dataset.map(partial(_flat_row, sources), remove_columns=names)


def _flat_row(most_sources: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a pair. If a row is no pair, the result has no prompt, so the row counts as bad."""
    task = row["supervision"] or {}
    is_pair = task.get("type") == "preference"
    flat = {"prompt": (row["input"] or {}).get("prompt") if is_pair else None}
    flat |= {side: next(iter(_images(task.get(side))), None) for side in ("chosen", "rejected")}
    if most_sources == 1:
        flat["source_image"] = next(iter(_images(row["input"])), None)
    elif most_sources:
        flat["source_image"] = _images(row["input"])
    return flat


def _images(message: Mapping[str, Any] | None) -> list[str]:
    media = (message or {}).get("media") or []
    return [medium["path"] for medium in media if medium.get("type") == "image"]


def refuse_mixed_types(dataset: Any) -> Any:
    """Return the data set. Raise `ValueError` if prompts or images are text in some rows of a JSON file, and not in
    others. `datasets` reads a column of mixed types as JSON, so that texts would have quotation marks."""
    json_feature = getattr(datasets, "Json", ())  # older versions of `datasets` have no `Json`
    mixed = [name for name, feature in (dataset.features or {}).items() if isinstance(feature, json_feature)]
    if wrong := [name for name in mixed if name in _IMAGE_COLUMNS or name in _PROMPT_COLUMNS]:
        raise ValueError(
            f"Prompts and images must be text in all rows; the columns {wrong} have values of several types. Write "
            "all values of these columns as text, or remove rows with other types."
        )
    return dataset


def _in_row(columns: Sequence[str], roots: Sequence[str], *values: Any) -> dict[str, Any]:
    return {name: _find(value, roots) for name, value in zip(columns, values, strict=True)}


def _in_batch(columns: Sequence[str], roots: Sequence[str], *values: list[Any]) -> dict[str, list[Any]]:
    return {name: [_find(value, roots) for value in column] for name, column in zip(columns, values, strict=True)}


def _find(value: Any, roots: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_find(entry, roots) for entry in value]
    if not isinstance(value, str) or not value or "://" in value or os.path.isabs(value) or ntpath.isabs(value):
        return value
    names = [value, value.replace("\\", "/")]  # names with Windows separators are also accepted on other systems
    tried = [os.path.join(folder, name) for folder in roots for name in names]
    return next(filter(os.path.exists, tried), tried[0])


def _is_image_feature(feature: Any) -> bool:
    """Return whether a column has the type `datasets.Image`, or is a list of this type."""
    return isinstance(getattr(feature, "feature", feature), datasets.Image)


# ---- Split expressions --------------------------------------------------------------------------------------------


def rename_split(split: str, name: str) -> str:
    """Replace the name of a split and keep its slices: `test[:90%]` becomes `train[:90%]`."""
    return "+".join(name + summand[len(_split_name(summand)) :] for summand in _summands(split))


def rows_of(split: str, lengths: dict[str, int]) -> list[tuple[str, range]]:
    """Return split name and rows for each part of a split expression, such as `train[:100]+test`. `lengths` are the
    numbers of rows of the splits.

    Raises:
        ValueError: If a split does not exist, or if the expression is invalid.
    """
    if split == ALL_SPLITS:
        return [(name, range(length)) for name, length in lengths.items()]
    absolute = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return [(summand.splitname, range(summand.from_, summand.to)) for summand in absolute]


def surely_share_rows(first: str, second: str) -> bool:
    """Return whether two split expressions have a common row whatever the numbers of rows of the splits are.

    The numbers of rows are unknown before the data are loaded.
    """
    if ALL_SPLITS in (first, second):
        return True
    return any(
        _split_name(summand) == _split_name(other) and (summand == other or _split_name(summand) in (summand, other))
        for summand in _summands(first)
        for other in _summands(second)
    )


def _summands(split: str) -> list[str]:
    return [summand.strip() for summand in split.split("+")]


def _split_name(summand: str) -> str:
    """Return the split name without slices: `train` for `train[:90%]`."""
    return summand.partition("[")[0]

"""Loads the rows of preference pairs from a data set on the Hub, a file or a folder."""

from __future__ import annotations

import glob
import os
import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from ..utils.errors import UserError
from ..utils.identity import describe_files, short_hash
from .formats import FLOW_FACTORY_COLUMNS, IMAGE_COLUMNS, PROMPT_COLUMNS, flow_factory_images, flow_factory_row
from .image_folders import LAYOUTS, read_image_folder

CARD_FILE = "README.md"
FILE_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {  # file suffix -> builder of `datasets` and its arguments
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
}


def load_pairs(
    name: str | os.PathLike,
    split: str = "train",
    *,
    config: str | None = None,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load the rows of a data set by its name, as the command `train` does.

    Args:
        name (`str` or `os.PathLike`): Id on the Hub, or path of a file or folder. Files may be parquet, arrow, JSON,
            JSONL (also Flow-Factory's `schema_version` 2), CSV or TSV. A folder may be a data set for
            `datasets.load_dataset`, the output of `pairs pick`, `pairs generate`, `pairs score` or `save_to_disk`, or
            have images in the folders `chosen` and `rejected` or `liked` and `disliked`, or with ranks at the end of
            their names. Relative names of images are looked up in the folder `name`, or that of the file `name`, and
            then in the working directory.
        split (`str`): Split, such as `"train"`, or for what `datasets` reads an expression such as `"train[:90%]"`. A
            single file accepts any name.
        config (`str`, *optional*): Configuration of a data set of the Hub.
        streaming (`bool`): Whether to load a stream.

    Raises:
        ValueError: If the data set or split does not exist, or a folder has images but no pairs.
    """
    path = Path(name).expanduser()
    path = _table_in(path) or path
    if not path.exists():
        return datasets.load_dataset(str(name), name=config, split=split, streaming=streaming)
    if path.is_file():
        return with_resolved_names(_load_file(path, split, streaming), path.parent)
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    splits = datasets.load_from_disk(str(path)) if saved else read_image_folder(path)
    if splits is None:
        _refuse_patterns(path, "[", "::")
        loaded = datasets.load_dataset(str(path), split=split, streaming=streaming, cache_dir=_cache_folder(path))
        if set(loaded.column_names or ()) <= {"image", "label"}:
            tables = sorted(file.name for file in path.glob("[!.]*") if file.suffix.lower() in FILE_BUILDERS)
            found = f" The folder has {', '.join(tables)}." if tables else ""
            raise UserError(f"{path} has images but no pairs. {LAYOUTS}{found}")
        return with_resolved_names(loaded, path)
    if isinstance(splits, datasets.Dataset):
        if "[" in split or "+" in split:
            raise UserError(
                f"The data set {path} has one split, whose rows cannot be selected by name. Got the split {split!r}. "
                "Select the rows before `save_to_disk`, or load a file."
            )
        rows = splits
    elif split not in splits:
        raise UserError(f"The data set {path} must have the split {split!r}; it has {', '.join(splits)}.")
    else:
        rows = splits[split] if saved else splits[split].rows()
    rows = with_resolved_names(rows, path)
    return rows.to_iterable_dataset() if streaming else rows


def has_one_split(path: Path) -> bool:
    """Return whether a path has only one split, so that [`load_pairs`] accepts any name for it."""
    return path.is_file() or (path / "state.json").is_file() or _table_in(path) is not None


def _table_in(path: Path) -> Path | None:
    """Return the table that `pairs pick`, `pairs generate` or `pairs score` wrote into a folder, or `None`."""
    names = (("manifest.jsonl", "pairs.jsonl"), ("manifest.jsonl", "images.jsonl"), ("scores.json", "pairs.parquet"))
    for mark, table in names:
        if (path / mark).is_file() and (path / table).is_file():
            return path / table
    return None


def _cache_folder(path: Path) -> str | None:
    """Return the cache folder for the tables of a local folder as they are now, or `None` for the usual one.

    Where a README.md lists a folder's tables, `datasets` caches their rows by the folder's name alone, and would return
    those of another folder of this name, or of tables replaced since.
    """
    if not (path / CARD_FILE).is_file():
        return None
    kinds = (*FILE_BUILDERS, ".tar", ".zip")
    tables = (file for file in path.absolute().rglob("*") if file.suffix.lower() in kinds and file.is_file())
    return os.path.join(datasets.config.HF_DATASETS_CACHE, f"folder-{short_hash(describe_files(tables))}")


def _load_file(path: Path, split: str, streaming: bool) -> Any:
    if path.suffix.lower() not in FILE_BUILDERS:
        raise UserError(
            f"A data set in one file must end in {', '.join(FILE_BUILDERS)}; got {path}. Pass the folder of the "
            "file instead."
        )
    _refuse_patterns(path, "::")
    with open(path, "rb") as file:
        start = file.read(2**16)
    if not start.strip():
        raise UserError(f"A data set must have rows, and {path} is empty.")
    name, options = FILE_BUILDERS[path.suffix.lower()]
    header = start.partition(b"\n")[0]
    if name == "csv" and header.count(b";") > header.count(options.get("sep", ",").encode()):
        options = {"sep": ";"}  # as spreadsheets of some countries write
    files = {split.partition("[")[0]: glob.escape(str(path))}
    return datasets.load_dataset(name, data_files=files, split=split, streaming=streaming, **options)


def _refuse_patterns(path: Path, *patterns: str) -> None:
    """Raise `ValueError` if `datasets` would read a part of a path as a pattern or a variable."""
    text = str(path.resolve())
    found = [pattern for pattern in patterns if pattern in text]
    if found or os.path.expandvars(text) != text:
        raise UserError(
            f"`datasets` cannot read a path with {found[0] if found else 'the `$` of a variable'}, got {path}. Rename "
            "the folder or the file."
        )


# ---- Names of images ----------------------------------------------------------------------------------------------


def _refuse_mixed_types(features: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a column of prompts or images has several types of values, which `datasets` reads as
    JSON."""
    json_type: Any = getattr(datasets, "Json", ())
    mixed = [name for name in (*IMAGE_COLUMNS, *PROMPT_COLUMNS) if isinstance(features.get(name), json_type)]
    if mixed:
        raise UserError(
            "A column of prompts or images must have values of one type in all rows. These columns have values of "
            f"several types: {', '.join(mixed)}. Write all of their values as text."
        )


def with_resolved_names(dataset: Any, folder: Path) -> Any:
    """Replace relative names of images by absolute paths: in the working directory if the file is only there, else in
    `folder`."""
    dataset = _with_flat_rows(dataset)
    features = dataset.features or {}
    names = dataset.column_names or list(next(iter(dataset), {}))
    _refuse_mixed_types(features)
    columns = [name for name in IMAGE_COLUMNS if name in names and not _is_image_feature(features.get(name))]
    if not columns:
        return dataset
    find = partial(_found, columns, os.path.abspath(folder))
    options: dict[str, Any] = {"input_columns": columns, "features": dataset.features}
    if isinstance(dataset, datasets.IterableDataset):
        rows = dataset.decode(False) if features else dataset
        return rows.map(find, **options)
    # The cache of `datasets` would not notice that a file has moved.
    return dataset.map(find, batched=True, load_from_cache_file=False, desc="Finding images", **options)


def _with_flat_rows(dataset: Any) -> Any:
    """Convert lines of Flow-Factory to rows of the format `canonical`, with the column `source_image` if any line's
    input has images. Return other data sets unchanged."""
    names = dataset.column_names or list(next(iter(dataset), {}))
    if not set(FLOW_FACTORY_COLUMNS) <= set(names):
        return dataset
    is_stream = isinstance(dataset, datasets.IterableDataset)
    has_sources = not is_stream and any(map(flow_factory_images, dataset["input"]))
    return dataset.map(partial(_flat_row, has_sources), remove_columns=names)


def _flat_row(has_sources: bool, row: Mapping[str, Any]) -> dict[str, Any]:
    # `datasets` knows the rows, and so does a cache of latents, by the module and the name of this function.
    return flow_factory_row(row, has_sources=has_sources)


def _found(columns: Sequence[str], folder: str, *values: Any) -> dict[str, Any]:
    """Replace relative names by absolute paths. `values` has, for each of `columns`, the value of one row or a list for
    a batch of rows."""
    return {name: _find(value, folder) for name, value in zip(columns, values, strict=True)}


def _find(value: Any, folder: str) -> Any:
    if isinstance(value, list):
        return [_find(entry, folder) for entry in value]
    if not isinstance(value, str) or not value or "://" in value or os.path.isabs(value):
        return value
    # Some systems store accents apart from their letters (NFD), others do not (NFC).
    names = dict.fromkeys([value, *(unicodedata.normalize(form, value) for form in ("NFC", "NFD"))])
    tried = [os.path.join(directory, name) for directory in (folder, os.getcwd()) for name in names]
    return next(filter(os.path.exists, tried), tried[0])


def _is_image_feature(feature: Any) -> bool:
    return isinstance(getattr(feature, "feature", feature), datasets.Image)

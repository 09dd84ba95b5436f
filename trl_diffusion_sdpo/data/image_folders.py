"""Folders of images without a data file: equal names in two folders, `chosen` and `rejected`, or ranks at the end of
names in one, with prompts in text files beside them."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from .checking import MAX_EXAMPLES
from .images import FILE_FORMATS

logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")
CAPTION = ".txt"
DATA_FILES = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tsv", ".tar", ".zip")
ALONE, NO_RANK, TWICE = "without a partner", "without a rank at the end of the name", "of one name in one folder"
NO_CAPTION, OTHER_CAPTIONS, NO_TEXT = "without a caption", "with captions that differ", "with a caption not in UTF-8"
NO_FILE = "with a caption that is a broken link"
OUTSIDE, UNUSED, OTHER_FILES = "outside of chosen and rejected", "captions without images", "files of other kinds"
NOTES = (UNUSED, OTHER_FILES)  # which are no bad rows
LAYOUTS = (
    "Pairs are equal names in its folders chosen and rejected, or ranks at the end of names (a_0.png is better than "
    "a_1.png), with the prompt in a text file of that name (a.txt); or a data file names them."
)
_RANKED = re.compile(r"(.+)_(\d+)")
_CLUTTER = ("thumbs.db", "desktop.ini")  # of file managers; those of others begin with a dot


@dataclass
class Part:
    """The pairs of a split, and what was left out: the names of files by reason."""

    folder: Path
    rows: dict[str, list[Any]]  # columns
    left_out: dict[str, list[str]]

    def report(self, *, strict: bool) -> None:
        """Logs what was left out.

        Raises:
            ValueError: If nothing is left, or, if `strict`, at anything that is a bad row.
        """
        count, found = len(self.rows["prompt"]), []
        for reason, names in self.left_out.items():
            more = ", ..." if len(names) > MAX_EXAMPLES else ""
            found.append(f"  {len(names)} {reason}: {', '.join(names[:MAX_EXAMPLES])}{more}")
        left_out = "\n".join(found)
        if not count:
            raise ValueError(f"{self.folder} has no pair of images with a prompt. {LAYOUTS}\n{left_out}")
        if strict and set(self.left_out) - {*NOTES}:
            raise ValueError(
                f'{self.folder} has images that are in no pair. Add what is missing, or pass on_bad_row="drop" to '
                f"leave them out.\n{left_out}"
            )
        if found:
            logger.warning("%s: %d prompts with images. Left out:\n%s", self.folder, count, left_out)


@dataclass
class _Images:
    """The images of one name."""

    by_rank: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))  # lower is better

    @property
    def files(self) -> list[str]:
        return [name for rank in sorted(self.by_rank) for name in self.by_rank[rank]]


def read_image_folder(path: Path) -> dict[str, Part] | None:
    """The pairs of a folder by split, or `None` if its files are in neither layout.

    Raises:
        ValueError: If one of the two folders is missing.
    """
    here = [path] if _sides(path) else [folder for folder in _folders(path) if _sides(folder)]
    if here:
        if any(_is_data_file(entry.name) for folder in {path, *here} for entry in os.scandir(folder)):
            return None  # it may name the images of the two folders
        for folder in here:
            if len(_sides(folder)) == 1:
                raise ValueError(f"{folder} has the folder {_sides(folder)[0]} and not the other one. {LAYOUTS}")
        return _by_split(path, here, _read_sides)
    names = [*_files(path)]
    if any(_is_data_file(name) for name in names):
        return None
    here = _folders(path) if (path / "train").is_dir() else [path]
    stems = [found[1] for name in names if _is_image(name) and (found := _RANKED.fullmatch(_stem(name)))]
    if len(stems) == len(set(stems)):
        return None  # no two images of one name
    return _by_split(path, here, _read_ranked)


def make_datasets(parts: dict[str, Part]) -> dict[str, datasets.Dataset]:
    """A data set of each part, which knows the lengths of all."""
    made = {name: datasets.Dataset.from_dict(part.rows) for name, part in parts.items()}
    splits = {name: datasets.SplitInfo(name, num_examples=len(dataset)) for name, dataset in made.items()}
    for dataset in made.values():
        dataset.info.splits = datasets.SplitDict(splits)
    return made


def _read_sides(folder: Path) -> Part:
    images: dict[str, _Images] = defaultdict(_Images)
    captions: dict[str, list[str]] = defaultdict(list)
    left_out: dict[str, list[str]] = defaultdict(list)
    for name in _files(folder):
        side, _, within = name.partition("/")
        inside = bool(within) and side.lower() in SIDES
        stem = _stem(within if inside else name)
        if name.lower().endswith(CAPTION):
            captions[stem].append(name)
        elif not _is_image(name):
            left_out[OTHER_FILES].append(name)
        elif not inside:
            left_out[OUTSIDE].append(name)
        else:
            images[stem].by_rank[SIDES.index(side.lower())].append(name)
    rows: dict[str, list[Any]] = {"prompt": [], "chosen": [], "rejected": []}
    for stem in sorted(images):
        found = images[stem]
        if twice := [name for names in found.by_rank.values() for name in names if len(names) > 1]:
            left_out[TWICE] += twice
            continue
        prompt = _prompt(folder, found, captions.pop(stem, []), left_out)
        if prompt is not None:
            for column, value in zip(rows, (prompt, *_paths(folder, found)), strict=True):
                rows[column].append(value)
    return _part(folder, rows, captions, left_out)


def _read_ranked(folder: Path) -> Part:
    images: dict[str, _Images] = defaultdict(_Images)
    captions: dict[str, list[str]] = defaultdict(list)
    left_out: dict[str, list[str]] = defaultdict(list)
    for name in _files(folder):
        ranked = _RANKED.fullmatch(_stem(name))
        if name.lower().endswith(CAPTION):
            captions[_stem(name)].append(name)
        elif not _is_image(name):
            left_out[OTHER_FILES].append(name)
        elif ranked is None:
            left_out[NO_RANK].append(name)
        else:
            images[ranked[1]].by_rank[int(ranked[2])].append(name)
    for stem in [stem for stem in captions if stem not in images]:  # a caption of one image
        ranked = _RANKED.fullmatch(stem)
        if ranked is not None and ranked[1] in images:
            captions[ranked[1]] += captions.pop(stem)
    rows: dict[str, list[Any]] = {"prompt": [], "image_path": [], "rank": []}
    for stem in sorted(images):
        found = images[stem]
        prompt = _prompt(folder, found, captions.pop(stem, []), left_out)
        if prompt is not None:
            # in their order: a number in a name, such as a time, may be larger than a column holds
            ranks = [place for place, rank in enumerate(sorted(found.by_rank)) for _ in found.by_rank[rank]]
            for column, value in zip(rows, (prompt, _paths(folder, found), ranks), strict=True):
                rows[column].append(value)
    return _part(folder, rows, captions, left_out)


def _part(
    folder: Path, rows: dict[str, list[Any]], captions: dict[str, list[str]], left_out: dict[str, list[str]]
) -> Part:
    """`captions` are those that no image has taken."""
    if unused := [name for names in captions.values() for name in names]:
        left_out[UNUSED] += unused
    return Part(folder, rows, dict(left_out))


def _prompt(folder: Path, images: _Images, captions: list[str], left_out: dict[str, list[str]]) -> str | None:
    """The one text of all captions of a name; `None` if its images are left out."""
    reason, texts = "", set()
    try:
        texts = {" ".join((folder / name).read_text(encoding="utf-8-sig").split()) for name in captions}
    except UnicodeDecodeError:
        reason = NO_TEXT
    except FileNotFoundError:
        reason = NO_FILE
    if len(images.files) == 1:
        reason = ALONE
    elif not reason and len(texts) != 1:
        reason = OTHER_CAPTIONS if texts else NO_CAPTION
    if reason:
        left_out[reason] += images.files
    return None if reason else texts.pop()


def _paths(folder: Path, images: _Images) -> list[str]:
    return [os.path.join(os.path.abspath(folder), *name.split("/")) for name in images.files]


def _sides(folder: Path) -> list[str]:
    names = {entry.name.lower() for entry in _folders(folder)}
    return [side for side in SIDES if side in names]


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _by_split(path: Path, folders: list[Path], read: Callable[[Path], Part]) -> dict[str, Part]:
    """The parts of a folder that is one split, or has folders that are."""
    if folders == [path]:
        return {"train": read(path)}
    with os.scandir(path) as entries:
        others = sorted(entry.name for entry in entries if Path(entry.path) not in folders and not _is_clutter(entry))
    if others:
        logger.warning("%s: not read, as it is in no split: %s", path, ", ".join(others))
    return {folder.name: read(folder) for folder in folders}


def _files(folder: Path | str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The files below a folder, through links too, relative to it and with slashes, in the order of their names."""
    here = os.path.realpath(folder)
    if here in above:  # a link to a folder that it is in
        return
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if _is_clutter(entry):
            continue
        if entry.is_dir():
            yield from (f"{entry.name}/{name}" for name in _files(entry.path, (*above, here)))
        else:
            yield entry.name


def _is_clutter(entry: os.DirEntry) -> bool:
    return entry.name.startswith(".") or entry.name.lower() in _CLUTTER


def _stem(name: str) -> str:
    """A name without its suffix, with the letters of file systems that decompose them as others have them."""
    return unicodedata.normalize("NFC", os.path.splitext(name)[0])


def _is_image(name: str) -> bool:
    return Image.registered_extensions().get(os.path.splitext(name)[1].lower()) in FILE_FORMATS


def _is_data_file(name: str) -> bool:
    return name.lower().endswith(DATA_FILES) and not name.startswith(".")

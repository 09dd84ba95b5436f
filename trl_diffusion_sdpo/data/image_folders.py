"""Folders of images without a table: equal names in two folders, `chosen` and `rejected`, or ranks at the end of names,
with prompts in text files beside them."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from ..utils.files import check_regular_file
from .checking import MAX_EXAMPLES
from .images import FILE_FORMATS

logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")
DATA_FILES = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tsv", ".tar", ".zip")
MAX_RANKED = 8  # images of one prompt; a longer row of numbers counts photos
MAX_CAPTION_BYTES = 2**20
LAYOUTS = (
    "Pairs are equal names in its folders chosen and rejected, or ranks of one or two digits at the end of the names "
    f"of at most {MAX_RANKED} images (a_0.png is better than a_1.png), with the prompt in a text file of that name "
    "(a.txt); or a table names them (pairs.csv with the columns prompt, chosen, rejected)."
)
_NUMBERED = re.compile(r"(.+)_(\d+)")
_CLUTTER = ("thumbs.db", "desktop.ini")  # of file managers; those of others begin with a dot
NOTES = ("captions without images", "files of other kinds")  # these are not bad rows


@dataclass
class Part:
    """The pairs of one split, and the names of files that were left out, by reason."""

    folder: Path
    rows: dict[str, list[Any]]  # columns
    left_out: dict[str, list[str]]

    def report(self, *, strict: bool) -> None:
        """Log how ranks were read and what was left out.

        Raises:
            ValueError: If nothing is left, or, if `strict`, an image is in no pair.
        """
        lines = []
        for reason, names in self.left_out.items():
            more = ", ..." if len(names) > MAX_EXAMPLES else ""
            lines.append(f"\n  {len(names)} {reason}: {', '.join(names[:MAX_EXAMPLES])}{more}")
        if not self.rows["prompt"]:
            raise ValueError(f"{self.folder} has no pair of images with a prompt. {LAYOUTS}{''.join(lines)}")
        if strict and set(self.left_out) - set(NOTES):
            raise ValueError(
                f'{self.folder} has images that are in no pair. Add what is missing, or pass on_bad_row="drop" to '
                f"leave them out.{''.join(lines)}"
            )
        if "rank" in self.rows:
            names = [Path(name).name for name in self.rows["image_path"][0]]
            logger.warning("%s: names are read as ranks: %s is the best of %s.", self.folder, names[0], names)
        if lines:
            prompts = len(self.rows["prompt"])
            logger.warning("%s: %d prompts with images. Left out:%s", self.folder, prompts, "".join(lines))


def read_image_folder(path: Path) -> dict[str, Part] | None:
    """Return the pairs of a folder by split, or `None` if its files are in neither layout.

    Raises:
        ValueError: If one of the two folders is missing.
    """
    with_sides = [folder for folder in (path, *_folders(path)) if _sides(folder)]
    if path in with_sides:
        with_sides = [path]
    for folder in with_sides:
        if len(_sides(folder)) == 1 and not _has_table(folder, path):
            raise ValueError(f"{folder} has the folder {_sides(folder)[0]} and not the other one. {LAYOUTS}")
    if with_sides:
        splits = with_sides
    else:
        stems = [_stem(file, path) for file in _files(path) if _is_image(file)]
        numbered = [match[1] for stem in stems if (match := _NUMBERED.fullmatch(stem))]
        if len(numbered) == len(set(numbered)):
            return None  # no two images of one name
        splits = _folders(path) if (path / "train").is_dir() else [path]
    if _has_table(path, *splits):
        return None  # it may name the images
    if splits == [path]:
        return {"train": _read(path, bool(with_sides))}
    if others := sorted(entry.name for entry in path.iterdir() if entry not in splits and not _is_clutter(entry)):
        logger.warning("%s: not read, because it is in no split: %s", path, ", ".join(others))
    return {folder.name: _read(folder, bool(with_sides)) for folder in splits}


def make_datasets(parts: dict[str, Part]) -> dict[str, datasets.Dataset]:
    """Return a data set of each part. Each knows the lengths of all."""
    made = {name: datasets.Dataset.from_dict(part.rows) for name, part in parts.items()}
    splits = {name: datasets.SplitInfo(name, num_examples=len(dataset)) for name, dataset in made.items()}
    for dataset in made.values():
        dataset.info.splits = datasets.SplitDict(splits)
    return made


def _read(folder: Path, has_sides: bool) -> Part:
    """Read one split: sort the files by the name of their group, then make a row of each group."""
    groups: dict[str, list[tuple[int, Path]]] = defaultdict(list)  # ranks and images, the lower the better
    captions: dict[str, list[Path]] = defaultdict(list)
    left_out: dict[str, list[str]] = defaultdict(list)

    def leave_out(reason: str, files: list[Path]) -> None:
        left_out[reason] += [file.relative_to(folder).as_posix() for file in files]

    for file in sorted(_files(folder)):
        side = file.relative_to(folder).parts[0]
        is_inside = has_sides and side.lower() in SIDES
        stem = _stem(file, folder / side if is_inside else folder)
        number = _NUMBERED.fullmatch(stem)
        if file.suffix.lower() == ".txt":
            captions[stem].append(file)
        elif not _is_image(file):
            leave_out("files of other kinds", [file])
        elif is_inside:
            groups[stem].append((SIDES.index(side.lower()), file))
        elif has_sides:
            leave_out("outside of chosen and rejected", [file])
        elif number is None:
            leave_out("without a rank at the end of the name", [file])
        elif len(number[2]) > 2:
            leave_out("with a number of more than two digits, which is no rank", [file])
        else:
            groups[number[1]].append((int(number[2]), file))

    rows: dict[str, list[Any]] = {
        "prompt": [],
        **{key: [] for key in (SIDES if has_sides else ("image_path", "rank"))},
    }
    for stem in sorted(groups):
        ranked = sorted(groups[stem], key=lambda entry: entry[0])
        files = [file for _, file in ranked]
        names = [stem] if has_sides else [stem, *(_stem(file, folder) for file in files)]
        reason, prompt = _prompt([text for name in names for text in captions.pop(name, [])])
        if len({rank for rank, _ in ranked}) < len(ranked) and has_sides:
            reason = "of one name in one folder"
        elif len(files) == 1:
            reason = "without a partner"
        elif len(files) > MAX_RANKED:
            reason = f"of more than {MAX_RANKED} images of one name, whose numbers are no ranks"
        if reason:
            leave_out(reason, files)
            continue
        paths = [str(file.absolute()) for file in files]
        values = (prompt, *paths) if has_sides else (prompt, paths, [rank for rank, _ in ranked])
        for column, value in zip(rows, values, strict=True):
            rows[column].append(value)
    if unused := [file for files in captions.values() for file in files]:
        leave_out("captions without images", unused)
    return Part(folder, rows, dict(left_out))


def _prompt(captions: list[Path]) -> tuple[str, str]:
    """Return why the captions of a group cannot be used, if so, and their one text."""
    texts = set()
    for file in captions:
        try:
            check_regular_file(file, MAX_CAPTION_BYTES)
            texts.add(" ".join(file.read_text(encoding="utf-8-sig").split()))
        except UnicodeDecodeError:
            return "with a caption not in UTF-8", ""
        except (FileNotFoundError, ValueError):
            return "with a caption that is a broken link, no regular file or larger than 1 MiB", ""
    if len(texts) != 1:
        return "with captions that differ" if texts else "without a caption", ""
    return "", texts.pop()


def _files(folder: Path) -> Iterator[Path]:
    """Yield what is below a folder and is no folder. Of links to folders, only those directly in it are followed."""
    for entry in folder.iterdir():
        for file in entry.rglob("*") if entry.is_dir() else [entry]:
            if not file.is_dir() and not any(map(_is_clutter, [file, *file.relative_to(folder).parents])):
                yield file


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not _is_clutter(entry))


def _sides(folder: Path) -> list[str]:
    names = {entry.name.lower() for entry in _folders(folder)}
    return [side for side in SIDES if side in names]


def _has_table(*folders: Path) -> bool:
    files = [entry for folder in folders for entry in folder.iterdir() if not _is_clutter(entry)]
    return any(file.suffix.lower() in DATA_FILES for file in files)


def _stem(file: Path, folder: Path) -> str:
    """Return a name in a folder without its suffix. macOS decomposes letters that other systems do not."""
    return unicodedata.normalize("NFC", file.relative_to(folder).with_suffix("").as_posix())


def _is_image(file: Path) -> bool:
    return Image.registered_extensions().get(file.suffix.lower()) in FILE_FORMATS


def _is_clutter(file: Path) -> bool:
    return file.name.startswith(".") or file.name.lower() in _CLUTTER

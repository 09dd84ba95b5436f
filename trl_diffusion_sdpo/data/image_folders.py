"""Pairs from folders of images without a table of pairs. Two images form a pair if they have equal names in the folders
`chosen` and `rejected`, or if their names differ only in a rank at the end. Prompts are in text files."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from .data_report import MAX_EXAMPLES
from .images import FILE_FORMATS

logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")
DATA_FILES = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tsv", ".tar", ".zip")
MAX_RANKED = 8  # largest number of ranked images of a prompt; more numbered images are probably a photo series
MAX_CAPTION_BYTES = 2**20
LAYOUTS = (
    "Give the two images of a pair the same name in the folders chosen and rejected, and write the prompt into a text "
    "file of this name (a.txt). Or give at most "
    f"{MAX_RANKED} images of a prompt ranks of one or two digits at the end of their names (a_0.png is better than "
    "a_1.png). Or list the images in a table (pairs.csv with the columns prompt, chosen, rejected)."
)
_RANKED = re.compile(r"(.+)_(\d\d?)")
_CLUTTER = ("thumbs.db", "desktop.ini")  # files of file managers to ignore, besides files whose names begin with a dot
NOTES = ("captions without images", "files of other kinds")  # reasons for skipping a file that are no errors


@dataclass
class FolderSplit:
    """Pairs of one split, and the names of the skipped files by reason."""

    folder: Path
    rows: list[dict[str, Any]]
    left_out: dict[str, list[str]]

    def report(self, *, strict: bool) -> None:
        """Log an example of the ranking by names, and the skipped files.

        Raises:
            ValueError: If the split has no pair, or if `strict` and an image is in no pair.
        """
        lines = []
        for reason, names in self.left_out.items():
            more = ", ..." if len(names) > MAX_EXAMPLES else ""
            lines.append(f"\n  {len(names)} {reason}: {', '.join(names[:MAX_EXAMPLES])}{more}")
        if not self.rows:
            raise ValueError(f"{self.folder} has no pair of images with a prompt. {LAYOUTS}{''.join(lines)}")
        if strict and set(self.left_out) - set(NOTES):
            raise ValueError(
                f'{self.folder} has images that are in no pair. Add the missing files, or pass on_bad_row="drop" '
                f"to skip these images.{''.join(lines)}"
            )
        if "rank" in self.rows[0]:
            names = [Path(name).name for name in self.rows[0]["image_path"]]
            message = "%s: numbers at the end of names are ranks. %s is the best image of %s."
            logger.warning(message, self.folder, names[0], names)
        if lines:
            logger.warning("%s: %d prompts with images. Skipped files:%s", self.folder, len(self.rows), "".join(lines))


def read_image_folder(path: Path) -> dict[str, FolderSplit] | None:
    """Return the pairs of a folder by split.

    Return `None` if a table lists the images, or if images are neither in `chosen` and `rejected` nor ranked by name.

    Raises:
        ValueError: If there is only one of the folders `chosen` and `rejected`.
    """
    splits = [path] if _sides(path) else [folder for folder in _folders(path) if _sides(folder)]
    has_sides = bool(splits)
    for folder in splits:
        if len(_sides(folder)) == 1 and not _has_table(folder, path):
            raise ValueError(
                f"{folder} must have both folders, chosen and rejected. It has only {_sides(folder)[0]}. {LAYOUTS}"
            )
    if not has_sides:
        stems = [_stem(file, path) for file in _files(path) if _is_image(file)]
        ranked = [match[1] for stem in stems if (match := _RANKED.fullmatch(stem))]
        if len(ranked) == len(set(ranked)):
            return None  # no two images have names that differ only in a rank
        splits = _folders(path) if (path / "train").is_dir() else [path]
    if _has_table(path, *splits):
        return None  # a table may name the images
    if splits == [path]:
        return {"train": _read(path, has_sides)}
    if others := sorted(entry.name for entry in path.iterdir() if entry not in splits and not _is_clutter(entry)):
        logger.warning("%s: these files and folders belong to no split and are ignored: %s", path, ", ".join(others))
    return {folder.name: _read(folder, has_sides) for folder in splits}


def make_datasets(splits: dict[str, FolderSplit]) -> dict[str, datasets.Dataset]:
    """Return one data set per split. `info.splits` of each data set has the number of rows of every split."""
    made = {name: datasets.Dataset.from_list(split.rows) for name, split in splits.items()}
    lengths = {name: datasets.SplitInfo(name, num_examples=len(dataset)) for name, dataset in made.items()}
    for dataset in made.values():
        dataset.info.splits = datasets.SplitDict(lengths)
    return made


def _read(folder: Path, has_sides: bool) -> FolderSplit:
    """Read one split. Images whose names differ only in folder or rank form a group. Each group becomes a row."""
    groups: dict[str, list[tuple[int, Path]]] = defaultdict(list)  # ranks and images; a lower rank is better
    captions: dict[str, list[Path]] = defaultdict(list)
    left_out: dict[str, list[str]] = defaultdict(list)

    def leave_out(reason: str, files: Sequence[Path]) -> None:
        left_out[reason] += [file.relative_to(folder).as_posix() for file in files]

    for file in sorted(_files(folder)):
        side = file.relative_to(folder).parts[0].lower()
        is_inside = has_sides and side in SIDES
        stem = _stem(file, folder / file.relative_to(folder).parts[0] if is_inside else folder)
        rank = _RANKED.fullmatch(stem)
        if file.suffix.lower() == ".txt":
            captions[stem].append(file)
        elif not _is_image(file):
            leave_out("files of other kinds", [file])
        elif is_inside:
            groups[stem].append((SIDES.index(side), file))
        elif has_sides:
            leave_out("outside of chosen and rejected", [file])
        elif rank is None:
            leave_out("without a rank of one or two digits at the end of the name", [file])
        else:
            groups[rank[1]].append((int(rank[2]), file))

    rows: list[dict[str, Any]] = []
    for stem in sorted(groups):
        ranks, files = zip(*sorted(groups[stem], key=lambda entry: entry[0]), strict=True)
        names = [stem] if has_sides else [stem, *(_stem(file, folder) for file in files)]
        reason, prompt = _prompt([text for name in names for text in captions.pop(name, [])])
        if has_sides and len(set(ranks)) < len(ranks):
            reason = "with the same name in the same folder"
        elif len(files) == 1:
            reason = "without a second image"
        elif len(files) > MAX_RANKED:
            reason = f"of more than {MAX_RANKED} images of one name, so that the numbers are not ranks"
        paths = [str(file.absolute()) for file in files]
        if reason:
            leave_out(reason, files)
        elif has_sides:
            rows.append({"prompt": prompt, "chosen": paths[0], "rejected": paths[1]})
        else:
            rows.append({"prompt": prompt, "image_path": paths, "rank": list(ranks)})
    leave_out("captions without images", [file for files in captions.values() for file in files])
    return FolderSplit(folder, rows, {reason: names for reason, names in left_out.items() if names})


def _prompt(captions: list[Path]) -> tuple[str, str]:
    """Return why the caption files of a group cannot be used (`""` if they can), and the text of the caption."""
    if not all(file.is_file() and file.stat().st_size <= MAX_CAPTION_BYTES for file in captions):
        return "with a caption that is a broken link, no regular file or larger than 1 MiB", ""
    try:
        texts = {" ".join(file.read_text(encoding="utf-8-sig").split()) for file in captions}
    except UnicodeDecodeError:
        return "with a caption not in UTF-8", ""
    if len(texts) != 1:
        return "with captions that differ" if texts else "without a caption", ""
    return "", texts.pop()


def _files(folder: Path) -> list[Path]:
    """Return all files in a folder and its subfolders. Links to other folders are followed only at the top level."""
    entries = [entry for entry in folder.iterdir() if not _is_clutter(entry)]
    files = [file for entry in entries for file in (entry.rglob("*") if entry.is_dir() else [entry])]
    return [file for file in files if not file.is_dir() and not _is_clutter(file)]


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not _is_clutter(entry))


def _sides(folder: Path) -> list[str]:
    names = {entry.name.lower() for entry in _folders(folder)}
    return [side for side in SIDES if side in names]


def _has_table(*folders: Path) -> bool:
    files = [entry for folder in folders for entry in folder.iterdir() if not _is_clutter(entry)]
    return any(file.suffix.lower() in DATA_FILES for file in files)


def _stem(file: Path, folder: Path) -> str:
    """Return the path of a file relative to a folder, without the suffix of the file name."""
    return file.relative_to(folder).with_suffix("").as_posix()


def _is_image(file: Path) -> bool:
    return Image.registered_extensions().get(file.suffix.lower()) in FILE_FORMATS


def _is_clutter(file: Path) -> bool:
    return file.name.startswith(".") or file.name.lower() in _CLUTTER

"""Lists the pairs in folders of images without a table, as rows of a format in `formats.py`. Two images are a pair if
they have equal names in the folders `chosen` and `rejected`, or if only a rank at the end of their names differs. An
image in the folders `liked` and `disliked` is a row by itself. Prompts are in text files."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from ..utils.errors import UserError
from .data_report import MAX_EXAMPLES
from .images import check_regular_file, is_image, is_unread_image

logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")
KINDS = ("liked", "disliked")  # of images by themselves
LAYOUTS = (
    "Give the two images of a pair the same name in the folders chosen and rejected, and write the prompt into a text "
    "file of this name (a.txt). Or give up to 8 images of a prompt ranks of one or two digits at the end of their "
    "names (a_0.png is better than a_1.png). Or put single images, each with its own text file, into the folders liked "
    "and disliked. Or list the images in a table (pairs.csv with the columns prompt, chosen, "
    "rejected), and pass the path of the table."
)
TABLES = (".parquet", ".arrow", ".jsonl", ".csv", ".tsv")
OTHER_CAPTION = "text files that are not read as captions: the caption of a.png is a.txt"
UNREAD_FORMAT = "in a format that is not read: save them as PNG, JPEG or WebP"
MAX_CAPTION_BYTES = 80_000
MAX_RANKS = 8  # more images than this whose names end in numbers are counted, not ranked
_RANKED = re.compile(r"(.+)_(\d\d?)")


@dataclass
class FolderSplit:
    """Pairs of one split, and skipped files by reason."""

    folder: Path
    pairs: list[dict[str, Any]]
    skipped: dict[str, list[Path]]

    def rows(self) -> datasets.Dataset:
        """Return the pairs as a data set. Log skipped files and, for images ranked by name, an example of a ranking.

        Raises:
            ValueError: If the split has no pair.
        """
        lines = []
        for reason, files in self.skipped.items():
            names = [file.relative_to(self.folder).as_posix() for file in files[:MAX_EXAMPLES]]
            lines.append(f"\n  {len(files)} {reason}: {', '.join(names)}")
        if not self.pairs:
            raise UserError(f"{self.folder} has no pair of images with a prompt. {LAYOUTS}{''.join(lines)}")
        if "rank" in self.pairs[0]:
            names = [Path(name).name for name in self.pairs[0]["image_path"]]
            message = "%s: numbers at the end of names are ranks. %s is the best image of %s."
            logger.warning(message, self.folder, names[0], names)
        if lines:
            logger.warning("%s: skipped:%s", self.folder, "".join(lines))
        return datasets.Dataset.from_list(self.pairs)


def read_image_folder(path: Path) -> dict[str, FolderSplit] | None:
    """Return the pairs of each split of a folder. Beside a subfolder `train`, each subfolder is a split; otherwise, the
    whole folder is the split `train`.

    Return `None` if there is a table `metadata.*`, and, without folders `chosen` and `rejected` or `liked` and
    `disliked`, if there is another table or no images are ranked by name.

    Raises:
        ValueError: If there is only one of the two folders, or there are all four.
    """
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    has_splits = any(folder.name == "train" for folder in folders)
    splits = folders if has_splits else [path]
    tables = [file for folder in {path, *splits} for file in folder.glob("[!.]*") if file.suffix.lower() in TABLES]
    if any(file.stem == "metadata" for file in tables):
        return None  # `datasets` reads the images that this table lists
    sides = {folder: tuple(side for side in (*SIDES, *KINDS) if (folder / side).is_dir()) for folder in splits}
    for folder, present in sides.items():
        if present not in ((), SIDES, KINDS):
            raise UserError(
                f"{folder} must have both folders, chosen and rejected or liked and disliked. It has only "
                f"{', '.join(present)}. {LAYOUTS}"
            )
    if not any(sides.values()):
        stems = [stem_of(file, path) for file in _files(path) if is_image(file)]
        ranked = [match[1] for stem in stems if (match := _RANKED.fullmatch(stem))]
        if tables or len(ranked) == len(set(ranked)):
            return None  # a table may list the images, or no two names differ only in a rank
    return {folder.name if has_splits else "train": _read(folder, sides[folder]) for folder in splits}


def _read(folder: Path, sides: tuple[str, ...]) -> FolderSplit:
    """Read one split with the folders `sides`. Images whose names differ only in folder or rank form a group, which
    becomes a row. Each image of `KINDS` is a group."""
    groups: dict[str, list[tuple[int, Path]]] = defaultdict(list)  # ranks and files; a lower rank is better
    captions: dict[str, list[Path]] = defaultdict(list)
    skipped: dict[str, list[Path]] = defaultdict(list)

    for file in sorted(_files(folder)):
        side = file.relative_to(folder).parts[0]
        is_inside = side in sides
        stem = stem_of(file, folder / side if is_inside and sides == SIDES else folder)
        rank = _RANKED.fullmatch(stem)
        if is_unread_image(file):
            skipped[UNREAD_FORMAT].append(file)
        elif is_other_caption(file):
            skipped[OTHER_CAPTION].append(file)
        elif file.suffix.lower() in (*TABLES, ".json", ".tar", ".zip"):
            skipped["other files (to read a table, pass its path)"].append(file)
        elif file.suffix.lower() == ".txt":
            captions[stem].append(file)
        elif not is_image(file):
            continue
        elif is_inside:
            groups[stem].append((sides.index(side), file))
        elif sides:
            skipped[f"outside of {' and '.join(sides)}"].append(file)
        elif rank is None:
            skipped["without a rank of one or two digits at the end of the name"].append(file)
        else:
            groups[rank[1]].append((int(rank[2]), file))

    rows: list[dict[str, Any]] = []
    for stem in sorted(groups):
        ranks, files = zip(*sorted(groups[stem], key=lambda entry: entry[0]), strict=True)
        names = [stem] if sides else [stem, *(stem_of(file, folder) for file in files)]
        texts = {read_caption(text) for name in names for text in captions[name]}
        reason = ""
        if sides and len(set(ranks)) < len(ranks):
            reason = "with the same name in the same folder"
        elif len(files) == 1 and sides != KINDS:
            reason = "without a second image"
        elif len(files) > MAX_RANKS:
            reason = f"with numbers that count images: more than {MAX_RANKS} images of one name are not a ranking"
        elif len(texts) != 1:
            reason = "with captions that differ" if texts else "without a caption"
        paths = [str(file.absolute()) for file in files]
        if reason:
            skipped[reason] += files
        elif sides == KINDS:
            rows.append({"prompt": texts.pop(), "image": paths[0], "label": KINDS[ranks[0]]})  # `single_images`
        elif sides:
            rows.append({"prompt": texts.pop(), "chosen": paths[0], "rejected": paths[1]})  # `canonical`
        else:
            rows.append({"prompt": texts.pop(), "image_path": paths, "rank": list(ranks)})  # `hpdv2`
    return FolderSplit(folder, rows, dict(skipped))


def read_caption(file: Path) -> str:
    """Return the text of a caption file, on one line.

    Raises:
        ValueError: If it is not a regular file, is larger than `MAX_CAPTION_BYTES`, or is not in UTF-8.
    """
    try:
        check_regular_file(file, MAX_CAPTION_BYTES)
        return " ".join(file.read_text(encoding="utf-8-sig").split())
    except ValueError as error:
        raise UserError(
            f"Captions must be text in UTF-8 of at most {MAX_CAPTION_BYTES} bytes, and {file} is not: {error}. Correct "
            "or remove the file."
        ) from error


def _files(folder: Path) -> list[Path]:
    """Return all files in a folder and its subfolders, except those whose name, or folder's name, begins with a dot.
    Links to other folders are followed only directly in `folder`."""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    files = [file for entry in entries for file in (entry.rglob("*") if entry.is_dir() else [entry])]
    return [file for file in files if file.is_file() and not file.name.startswith(".")]


def stem_of(file: Path, folder: Path = Path()) -> str:
    """Return the path of a file relative to a folder, without the file's suffix. Some systems store an accent apart
    from its letter (NFD); the result has it within the letter (NFC), so that equal names are equal."""
    return unicodedata.normalize("NFC", file.relative_to(folder).with_suffix("").as_posix())


def is_other_caption(file: Path) -> bool:
    """Return whether a file is probably a caption, but not named like its image with the suffix `.txt`."""
    suffix = file.suffix.lower()
    return suffix in (".caption", ".captions") or (suffix == ".txt" and is_image(Path(file.stem)))

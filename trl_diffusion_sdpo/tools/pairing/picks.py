"""Save a person's picks in a log that survives a crash, and write the pairs or single images that training reads.

`picks.jsonl` gets a line for each pick, undo or change of a prompt, and lines are never changed. `pairs.jsonl`, or
`images.jsonl` of images that are judged by themselves, is written again after each pick.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ...utils.errors import UserError
from ...utils.files import json_lines, write_atomically
from .manifest import CONTENT, COPIES, MAX_PROMPT, OWN_COLUMNS, RATING, ListedImage, read_json_lines

logger = logging.getLogger(__name__)

PICKS_FILE = "picks.jsonl"
PAIRS_FILE = "pairs.jsonl"
IMAGES_FILE = "images.jsonl"
# Verdict -> points for the first image, of the one point that both share. Skipped pairs give none.
SHARES = {"first": 1.0, "second": 0.0, "tie": 0.5, "both_bad": 0.5, "skip": None}
THUMBS = {"liked": True, "disliked": False, "unsure": None}  # verdict on an image by itself -> its label


class ConflictError(UserError):
    """Raised if a tab repeats a pick or an undo that another tab has already made."""


@dataclass(frozen=True)
class Pick:
    """A person's verdict on a pair of images. `first` was shown on the left, and `verdict` is a key of `SHARES`. Of an
    image by itself, `second` is the same, and `verdict` is a key of `THUMBS`."""

    number: int
    first: str
    second: str
    verdict: str

    @property
    def pair(self) -> frozenset[str]:
        return frozenset((self.first, self.second))

    @property
    def is_thumb(self) -> bool:
        """Whether the verdict is on one image."""
        return self.verdict in THUMBS


class PickLog:
    """Log of a folder's picks, `picks.jsonl`, read by the constructor. `add`, `undo` and `edit_prompt` append a line.

    Args:
        folder (`Path`): The folder.
        images (`Mapping[str, ListedImage]`, *optional*): The images of the manifest by name. Picks find theirs by the
            pixels, under whatever name the manifest lists them now.
        read_only (`bool`): Whether the log is only read.
    """

    def __init__(
        self, folder: Path, images: Mapping[str, ListedImage] | None = None, *, read_only: bool = False
    ) -> None:
        self.path = folder / PICKS_FILE
        # Two images -> their pick, from the oldest to the newest, without undone ones.
        self.picks: dict[frozenset[str], Pick] = {}
        self.left_out: Counter[str] = Counter()  # picks that no longer say anything, by reason
        self._images = images or {}
        # Hashes of images, and names and hashes of their copies -> name in the manifest.
        self._names: dict[str, str] = {}
        for image in self._images.values():
            copies = image.facts.get(COPIES) or {}
            self._names |= dict.fromkeys([*copies, *copies.values()], image.name)
        self._names |= {image.facts[CONTENT]: name for name, image in self._images.items() if CONTENT in image.facts}
        self._by_number: dict[int, Pick] = {}
        self.prompts: dict[str, str] = {}  # prompt in the manifest -> the one that replaces it
        self._number = 0
        self._file: BinaryIO | None = None
        if not read_only:
            try:
                self._file = open(self.path, "ab", buffering=0)
            except OSError as error:
                raise UserError(
                    f"{self.path} cannot be written: {error}. Use a folder that you can write to."
                ) from error
        content = self.path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content) and self._file is not None:
            logger.warning(
                "The last line of %s was incomplete, because an earlier process was killed. It is removed.",
                self.path,
            )
            self._file.truncate(complete)
        for number, entry in enumerate(read_json_lines(self.path, content[:complete]), 1):
            try:
                self._apply(entry)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{self.path}, line {number} is not a valid entry: {error!r}. Remove the line."
                ) from error
        for pick in self._by_number.values():
            if pick.first == "" or pick.second == "":
                self.left_out["of an image whose file now shows another picture"] += 1
            elif pick.first == pick.second and not pick.is_thumb:
                self.left_out["of two copies of one image"] += 1
            else:
                self.picks.pop(pick.pair, None)  # the newest pick of two images counts
                self.picks[pick.pair] = pick

    @property
    def verdicts(self) -> dict[str, int]:
        """Number of picks with each verdict. Those on single images are listed if there are any."""
        counts = Counter(pick.verdict for pick in self.picks.values())
        return {verdict: counts[verdict] for verdict in (*SHARES, *THUMBS) if verdict in SHARES or counts[verdict]}

    @property
    def last(self) -> Pick | None:
        """The last pick not undone."""
        return next(reversed(self.picks.values()), None)

    def add(self, first: str, second: str, verdict: str) -> None:
        """Append a pick, and wait until it is on the disk. If the disk is full, the log does not change."""
        if frozenset((first, second)) in self.picks:
            raise ConflictError("This has already been judged, perhaps in another tab.")
        entry: dict[str, Any] = {"pick": self._number + 1, "first": first, "second": second, "verdict": verdict}
        contents = [image and image.facts.get(CONTENT) for image in map(self._images.get, (first, second))]
        self._append({**entry, "contents": contents} if any(contents) else entry)
        pick = self._by_number[self._number]
        self.picks[pick.pair] = pick

    def undo(self, number: int) -> Pick:
        """Take back the last pick and return it."""
        last = self.last
        if last is None or last.number != number:
            raise ConflictError("Only the last pick can be undone, and another tab has added or undone a pick since.")
        self._append({"undo": number})
        return self.picks.pop(last.pair)

    def edit_prompt(self, prompt: str, edited: str) -> None:
        """Replace a prompt of the manifest by an edited one. The manifest itself does not change."""
        edited = edited.strip()
        if not 0 < len(edited) <= MAX_PROMPT:
            raise UserError(f"A prompt must have 1 to {MAX_PROMPT} characters, got {len(edited)}. Edit it again.")
        self._append({"prompt": prompt, "edited": edited})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _apply(self, entry: Mapping[str, Any]) -> None:
        if "pick" in entry:
            content, other = entry.get("contents", (None, None))
            first = self._name_now(entry["first"], content)
            second = self._name_now(entry["second"], other)
            pick = Pick(int(entry["pick"]), first, second, entry["verdict"])
            if pick.verdict not in (*SHARES, *THUMBS):
                raise UserError(f"verdict {pick.verdict!r}")
            self._by_number[pick.number] = pick
            self._number = pick.number
        elif "undo" in entry:
            del self._by_number[entry["undo"]]
        else:
            self.prompts[entry["prompt"]] = entry["edited"]

    def _name_now(self, name: str, content: str | None) -> str:
        """Return the manifest's name for an image of a pick, or `""` if the file of that name now has other pixels. An
        image that is no longer listed keeps its name."""
        image = self._images.get(name)
        known = [] if image is None else image.contents
        if image is not None and (content is None or not known or content in known):
            return name
        return self._names.get(name if content is None else content, name if image is None else "")

    def _append(self, entry: dict[str, Any]) -> None:
        assert self._file is not None
        line = json.dumps({**entry, "time": round(time.time(), 1)}).encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(size)  # remove the incomplete line
            raise
        self._apply(entry)


class PairsFile:
    """The file `pairs.jsonl` of a folder.

    It has a line for each pick that prefers one image, and for each two images of a prompt with different ratings and
    no pick. Other columns of the manifest become `chosen_*` and `rejected_*`. Lines are kept in memory, so that writing
    the file again after a pick is fast.
    """

    def __init__(self, folder: Path, images: Mapping[str, ListedImage]) -> None:
        self._folder = folder
        self._images = images
        self.rated = rated_pairs(images)
        self._lines: dict[tuple[str, str, str], bytes] = {}  # chosen image, rejected image and prompt -> line

    def write(self, log: PickLog, gone: Collection[str] = ()) -> tuple[int, Counter[str]]:
        """Write the file. Return the number of pairs, and how many picks give none because of their images, by reason.
        `gone` names images whose files were deleted."""
        preferred = [
            (pick.first, pick.second) if pick.verdict == "first" else (pick.second, pick.first)
            for pick in log.picks.values()
            if pick.verdict in ("first", "second")
        ]
        preferred += [pair for pair in self.rated if frozenset(pair) not in log.picks]
        left_out = Counter(log.left_out)
        lines = []
        for better, worse in preferred:
            if better not in self._images or worse not in self._images:
                left_out["of an image that the manifest no longer lists"] += 1
                continue
            chosen = self._images[better]
            rejected = self._images[worse]
            prompt = log.prompts.get(chosen.prompt, chosen.prompt)
            if prompt != log.prompts.get(rejected.prompt, rejected.prompt):
                left_out["of two images whose prompts differ now"] += 1
            elif line := self._line(chosen, rejected, prompt, gone):
                lines.append(line)
            else:
                left_out["of an image whose file is missing"] += 1
        write_atomically(self._folder / PAIRS_FILE, b"".join(lines))
        return len(lines), left_out

    def _line(self, chosen: ListedImage, rejected: ListedImage, prompt: str, gone: Collection[str]) -> bytes:
        """Return the line of a pair, or nothing if one of its files is missing."""
        key = (chosen.name, rejected.name, prompt)
        if chosen.name in gone or rejected.name in gone:
            return b""
        if key not in self._lines:
            if not all((self._folder / name).is_file() for name in (chosen.name, rejected.name)):
                return b""
            row = {"prompt": prompt, "chosen": chosen.name, "rejected": rejected.name}
            for name in sorted(chosen.facts.keys() & rejected.facts.keys() - {*OWN_COLUMNS}):
                row[f"chosen_{name}"] = chosen.facts[name]
                row[f"rejected_{name}"] = rejected.facts[name]
            self._lines[key] = json_lines([row])
        return self._lines[key]


class ImagesFile:
    """The file `images.jsonl` of a folder, with a line for each image that was liked or disliked by itself. Other
    columns of the manifest are kept, except one of the name `label`."""

    rated: tuple[()] = ()  # images are not compared

    def __init__(self, folder: Path, images: Mapping[str, ListedImage]) -> None:
        self._folder = folder
        self._images = images

    def write(self, log: PickLog, gone: Collection[str] = ()) -> tuple[int, Counter[str]]:
        """Write the file, as [`PairsFile.write`]."""
        left_out = Counter(log.left_out)
        rows = []
        for pick in log.picks.values():
            label = THUMBS.get(pick.verdict)
            image = self._images.get(pick.first)
            if label is None:
                continue
            if image is None:
                left_out["of an image that the manifest no longer lists"] += 1
            elif image.name in gone or not (self._folder / image.name).is_file():
                left_out["of an image whose file is missing"] += 1
            else:
                prompt = log.prompts.get(image.prompt, image.prompt)
                row = {"prompt": prompt, "image": image.name, "label": label}
                others = sorted(image.facts.keys() - {*OWN_COLUMNS, *row})
                rows.append(row | {name: image.facts[name] for name in others})
        write_atomically(self._folder / IMAGES_FILE, json_lines(rows))
        return len(rows), left_out


def rated_pairs(images: Mapping[str, ListedImage]) -> list[tuple[str, str]]:
    """Return all pairs of images with the same prompt and different ratings, the higher-rated one first."""
    rated: dict[str, list[tuple[float, str]]] = {}
    for image in images.values():
        rating = image.facts.get(RATING)
        if isinstance(rating, int | float):
            rated.setdefault(image.prompt, []).append((rating, image.name))
    return [
        (better, worse) for group in rated.values() for high, better in group for low, worse in group if high > low
    ]

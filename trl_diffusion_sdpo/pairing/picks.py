"""Save the picks of a person in `picks.jsonl`, and write the pairs that training reads into `pairs.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..utils.files import write_atomically
from .manifest import ListedImage, json_lines, read_json_lines

PICKS_FILE = "picks.jsonl"
PAIRS_FILE = "pairs.jsonl"
# Verdict -> points for the first image; the second image gets the rest of 1. Skipped pairs give no points.
SHARES = {"first": 1.0, "second": 0.0, "tie": 0.5, "both_bad": 0.5, "skip": None}


@dataclass(frozen=True)
class Pick:
    """A person's verdict on a pair of images. `first` was shown on the left. `verdict` is a key of `SHARES`."""

    first: str
    second: str
    verdict: str

    @property
    def pair(self) -> frozenset[str]:
        return frozenset((self.first, self.second))


def read_picks(folder: Path) -> dict[frozenset[str], Pick]:
    """Return the picks in a folder by their two images, the oldest pick first."""
    path = folder / PICKS_FILE
    picks = {}
    for number, row in enumerate(read_json_lines(path, path.read_bytes()) if path.is_file() else [], 1):
        pick = Pick(*(row.get(name, "") for name in ("first", "second", "verdict")))
        if pick.verdict not in SHARES:
            raise ValueError(f"{path}, line {number} is not a pick with a known verdict: {row}. Remove the line.")
        picks[pick.pair] = pick
    return picks


def write_picks(folder: Path, picks: Mapping[frozenset[str], Pick]) -> None:
    """Write all picks into `picks.jsonl`. If the process is killed or the disk is full, the earlier file remains."""
    write_atomically(folder / PICKS_FILE, json_lines(asdict(pick) for pick in picks.values()))


def write_pairs(folder: Path, picks: Mapping[frozenset[str], Pick], images: Mapping[str, ListedImage]) -> int:
    """Write `pairs.jsonl`, with one line for each pair in which a person prefers one image. Return the number of pairs.

    Two images of one prompt with different ratings are also a pair, unless a person has judged the two images. Other
    columns of the manifest become columns `chosen_*` and `rejected_*`. A pair is skipped if the manifest no longer
    lists one of its images.
    """
    preferred = [
        (pick.first, pick.second) if pick.verdict == "first" else (pick.second, pick.first)
        for pick in picks.values()
        if pick.verdict in ("first", "second") and pick.pair <= images.keys()
    ]
    preferred += [pair for pair in rated_pairs(images) if frozenset(pair) not in picks]
    rows = []
    for chosen, rejected in ((images[winner], images[loser]) for winner, loser in preferred):
        row = {"prompt": chosen.prompt, "chosen": chosen.name, "rejected": rejected.name}
        for name in sorted(chosen.facts.keys() & rejected.facts.keys() - {"rating"}):
            row[f"chosen_{name}"] = chosen.facts[name]
            row[f"rejected_{name}"] = rejected.facts[name]
        rows.append(row)
    write_atomically(folder / PAIRS_FILE, json_lines(rows))
    return len(rows)


def rated_pairs(images: Mapping[str, ListedImage]) -> list[tuple[str, str]]:
    """Return all pairs of images with the same prompt and different ratings, the image with the higher rating first."""
    rated: dict[str, list[tuple[float, str]]] = {}
    for image in images.values():
        rating = image.facts.get("rating")
        if isinstance(rating, int | float):
            rated.setdefault(image.prompt, []).append((rating, image.name))
    return [
        (better, worse) for group in rated.values() for high, better in group for low, worse in group if high > low
    ]

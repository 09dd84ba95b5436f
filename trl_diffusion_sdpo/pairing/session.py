"""Hold the state of a pick page: which pair of images it shows next, the picks, and the result of a comparison."""

from __future__ import annotations

import itertools
import json
import random
import secrets
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ..utils.files import write_atomically
from .manifest import ListedImage, read_manifest
from .picks import PAIRS_FILE, SHARES, Pick, rated_pairs, read_picks, write_pairs, write_picks

HUMAN_FILE = "human.json"
LOCK_FILE = ".picks.lock"
Pairs = list[tuple[str, str]]


class PickSession:
    """One run of the pick page on a folder with `manifest.jsonl`.

    If the column `model` names several models, the page compares these models without showing their names. With at most
    one model, the page compares the images of each prompt. The page refers to images by random codes, so that file
    names do not reveal the model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed, self.left_out = read_manifest(folder)
        self.images = {image.name: image for image in listed}
        models = {image.facts.get("model") for image in listed}
        self.is_blind = len(models) > 1 and None not in models
        self.order = (pairs_of_models if self.is_blind else pairs_of_prompts)(self.images)
        self.picks = read_picks(folder)
        if not self.order and not self.picks and not rated_pairs(self.images):
            reasons = "".join(f" {count} were left out: {reason}." for reason, count in self.left_out.items())
            prompts = len({image.prompt for image in listed})
            raise ValueError(
                f"`pairs pick` needs two images of one prompt, and {folder} has {len(listed)} images of {prompts} "
                f"prompts, none with two images to compare.{reasons}"
            )
        self._lock = threading.RLock()  # the server answers each request in its own thread
        self._file_lock = FileLock(folder / LOCK_FILE, blocking=False)
        try:
            self._file_lock.acquire()
        except Timeout:
            raise ValueError(
                f"Only one `pairs pick` can use a folder at a time, and another one is using {folder}. Use the page of "
                "that command, or end it first."
            ) from None
        self.codes = {secrets.token_urlsafe(12): name for name in self.images}
        self._code_of = {name: code for code, name in self.codes.items()}
        self.pairs = 0  # number of pairs in `pairs.jsonl`
        # Pairs that scorers chose are only replaced after the first pick.
        if self.picks or not (folder / PAIRS_FILE).is_file():
            self.pairs = write_pairs(folder, self.picks, self.images)

    def close(self) -> None:
        """Release the lock of the folder."""
        self._file_lock.release()

    def state(self) -> dict[str, Any]:
        """Return the pair to show next, or no pair if all are judged, and the progress."""
        with self._lock:
            left = [pair for pair in self.order if frozenset(pair) not in self.picks]
            counts = Counter(pick.verdict for pick in self.picks.values())
            return {
                "pair": self._shown(left[0]) if left else None,
                "judged": len(self.picks),
                "left": len(left),
                "verdicts": {verdict: counts[verdict] for verdict in SHARES},
                "pairs": self.pairs,
                "blind": self.is_blind,
                "left_out": dict(self.left_out),
                "folder": str(self.folder),
            }

    def pick(self, first: str, second: str, verdict: str) -> dict[str, Any]:
        """Save a verdict on the two images with these codes, and return the new state with the next pair."""
        with self._lock:
            pick = Pick(self.codes[first], self.codes[second], verdict)
            prompts = {self.images[name].prompt for name in pick.pair}
            if verdict not in SHARES or len(pick.pair) < 2 or len(prompts) > 1:
                raise ValueError("A pick needs two images of one prompt and a known verdict. Reload the page.")
            if pick.pair in self.picks:
                return self.state() | {"error": "This pair has already been judged, perhaps in another tab."}
            return self._save({**self.picks, pick.pair: pick})

    def undo(self) -> dict[str, Any]:
        """Remove the last pick, and return the new state."""
        with self._lock:
            return self._save(dict(list(self.picks.items())[:-1]))

    def result(self) -> list[str]:
        """Return the win rates of a comparison of models as sentences, and write the numbers to `human.json`."""
        if not self.is_blind:
            return []
        with self._lock:
            sentences, numbers = win_rates(self.images, self.picks)
            write_atomically(self.folder / HUMAN_FILE, json.dumps(numbers, indent=1).encode() + b"\n")
            return sentences

    def _save(self, picks: dict[frozenset[str], Pick]) -> dict[str, Any]:
        write_picks(self.folder, picks)
        self.picks = picks
        self.pairs = write_pairs(self.folder, picks, self.images)
        return self.state()

    def _shown(self, pair: tuple[str, str]) -> dict[str, str]:
        # Sides are random, because people may prefer one side.
        left, right = pair if secrets.randbelow(2) else pair[::-1]
        codes = {"first": self._code_of[left], "second": self._code_of[right]}
        return {**codes, "prompt": self.images[left].prompt}


def pairs_of_prompts(images: Mapping[str, ListedImage]) -> Pairs:
    """Return the pairs of two images of one prompt, in the order in which the page shows them. Pairs whose images have
    different ratings are left out.

    First come pairs of neighbours in the manifest, for every prompt, so that a person who stops early has seen each
    image.
    """
    rated = {frozenset(pair) for pair in rated_pairs(images)}
    by_prompt: dict[str, list[str]] = {}
    for image in images.values():
        by_prompt.setdefault(image.prompt, []).append(image.name)
    pairs = [
        (second - first, names[first], names[second])
        for names in by_prompt.values()
        for first, second in itertools.combinations(range(len(names)), 2)
    ]
    ordered = sorted(pairs, key=lambda pair: pair[0])
    return [(first, second) for _, first, second in ordered if frozenset((first, second)) not in rated]


def pairs_of_models(images: Mapping[str, ListedImage]) -> Pairs:
    """Return the pairs of an image of the first model and an image of another model, with the same prompt and seed.

    Pairs of the first seed come first, in random order, then pairs of the next seed.
    """
    base, *others = _models(images)
    cells = _cells(images)
    seeds = list(dict.fromkeys(seed for _, seed in cells))
    pairs = [
        (seeds.index(seed), cell[base], cell[other])
        for (_, seed), cell in cells.items()
        for other in others
        if base in cell and other in cell
    ]
    random.Random(0).shuffle(pairs)
    return [(first, second) for _, first, second in sorted(pairs, key=lambda pair: pair[0])]


def win_rates(
    images: Mapping[str, ListedImage], picks: Mapping[frozenset[str], Pick]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the win rate of each other model against the first model, as sentences and as rows for JSON."""
    from ..evaluation.evaluate import Comparison  # takes seconds, and only a comparison of models needs it
    from ..evaluation.report import verdict_sentence
    from ..rewards.statistics import holm, win_rate

    base, *others = _models(images)
    cells = _cells(images)
    prompts = list(dict.fromkeys(prompt for prompt, _ in cells))
    seeds = list(dict.fromkeys(seed for _, seed in cells))
    rates = {}
    for other in others:
        scores = np.full((2, len(prompts), len(seeds)), np.nan)  # [0]: the other model, [1]: the base
        for (prompt, seed), cell in cells.items():
            pick = picks.get(frozenset((cell.get(base, ""), cell.get(other, ""))))
            share = None if pick is None else SHARES[pick.verdict]
            if pick is not None and share is not None:
                wins = share if pick.first == cell[other] else 1 - share
                scores[:, prompts.index(prompt), seeds.index(seed)] = wins, 1 - wins
        if np.isfinite(scores).any():
            rates[other] = win_rate(scores[0], scores[1])
    adjusted = holm([rate.p_value for rate in rates.values()])
    sentences, numbers = [], []
    for (model, rate), p_value in zip(rates.items(), adjusted, strict=True):
        compared = Comparison(model, "your eye", rate, p_value)
        sentence = verdict_sentence(compared, base)
        sentences.append(sentence[0].upper() + sentence[1:])
        verdict = {"model": model, "base": base, "verdict": compared.verdict, "adjusted_p_value": p_value}
        numbers.append(verdict | asdict(rate))
    return sentences, numbers


def _models(images: Mapping[str, ListedImage]) -> list[str]:
    return list(dict.fromkeys(str(image.facts["model"]) for image in images.values()))


def _cells(images: Mapping[str, ListedImage]) -> dict[tuple[str, Any], dict[str, str]]:
    """Return the images by prompt and seed, and then by model."""
    cells: dict[tuple[str, Any], dict[str, str]] = {}
    for image in images.values():
        cells.setdefault((image.prompt, image.facts.get("seed")), {})[str(image.facts["model"])] = image.name
    return cells

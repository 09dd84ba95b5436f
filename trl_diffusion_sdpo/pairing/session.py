"""The state of a pick page: which pair comes next, what was picked, and what is known by now."""

from __future__ import annotations

import json
import logging
import random
import secrets
import threading
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ..utils.files import write_atomically
from .manifest import ListedImage, is_inside, read_manifest
from .picks import SHARES, PickLog, rated_pairs, write_pairs
from .ratings import Group

logger = logging.getLogger(__name__)

HUMAN_FILE = "human.json"
LOCK_FILE = ".picks.lock"


class RankOrder:
    """Order of pairs that rates the images of each prompt. Images that were not seen come first, then close ratings."""

    def __init__(self, images: dict[str, ListedImage], log: PickLog) -> None:
        self._images, self._log = images, log
        by_prompt: dict[str, list[str]] = {}
        for image in images.values():
            by_prompt.setdefault(image.prompt, []).append(image.name)
        self.alone = sum(len(names) == 1 for names in by_prompt.values())
        self.groups = {prompt: Group(names) for prompt, names in by_prompt.items() if len(names) > 1}
        self._rated: dict[str, list[tuple[str, str, float | None]]] = {}
        for better, worse in rated_pairs(images):
            self._rated.setdefault(images[better].prompt, []).append((better, worse, 1.0))
        for prompt in self.groups:
            self.update(prompt)

    def update(self, prompt: str) -> None:
        """Rate the images of a prompt anew."""
        names = set(self.groups[prompt].names)
        picked = [
            (pick.first, pick.second, SHARES[pick.verdict]) for pick in self._log.picks.values() if pick.pair <= names
        ]
        judged = {frozenset(pair[:2]) for pair in picked}
        rated = [pair for pair in self._rated.get(prompt, []) if frozenset(pair[:2]) not in judged]
        self.groups[prompt].update(picked + rated)

    def remove(self, name: str) -> None:
        """Leave out an image whose file has gone."""
        prompt = self._images[name].prompt
        self.groups[prompt] = Group(other for other in self.groups[prompt].names if other != name)
        self.update(prompt)

    def offers(self) -> list[tuple[str, str]]:
        """Return pairs to judge, the most informative first."""
        offered = [offer for group in self.groups.values() for offer in group.offers]
        return [(first, second) for _, first, second in sorted(offered, key=lambda offer: -offer[0])]

    def progress(self) -> dict[str, int]:
        """Return how many pairs are left at most, and for how many prompts the order is uncertain."""
        left = [group.open for group in self.groups.values()]
        return {"left": sum(left), "uncertain": sum(map(bool, left)), "prompts": len(left)}


class BlindOrder:
    """Order of pairs that compares models: images of one prompt and seed, by the first model and by another one.

    All prompts come once before further seeds do, in an order that does not depend on the picks.
    """

    def __init__(self, images: dict[str, ListedImage], log: PickLog) -> None:
        self._log = log
        cells: dict[tuple[str, Any], dict[str, str]] = {}
        for image in images.values():
            cells.setdefault((image.prompt, image.facts.get("seed")), {})[str(image.facts["model"])] = image.name
        self.models = list(dict.fromkeys(str(image.facts["model"]) for image in images.values()))
        self.prompts = list(dict.fromkeys(prompt for prompt, _ in cells))
        self.seeds = list(dict.fromkeys(seed for _, seed in cells))
        self.cells = cells
        base, *others = self.models
        pairs = [
            (self.seeds.index(seed), cell[base], cell[other])
            for (_, seed), cell in cells.items()
            for other in others
            if base in cell and other in cell
        ]
        random.Random(0).shuffle(pairs)
        self.pairs = [(first, second) for _, first, second in sorted(pairs, key=lambda pair: pair[0])]
        self._gone: set[str] = set()
        self.alone = 0

    def update(self, prompt: str) -> None:
        """Do nothing: the order does not depend on picks."""

    def remove(self, name: str) -> None:
        """Leave out an image whose file has gone."""
        self._gone.add(name)

    def offers(self) -> list[tuple[str, str]]:
        """Return the pairs that were not judged."""
        return [
            pair for pair in self.pairs if frozenset(pair) not in self._log.picks and not self._gone.intersection(pair)
        ]

    def progress(self) -> dict[str, int]:
        """Return how many pairs are left."""
        left = len(self.offers())
        return {"left": left, "uncertain": left, "prompts": len(self.prompts)}

    def result(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Return the win rates of all other models against the first one, in words and in numbers."""
        from dataclasses import asdict

        from ..evaluation.evaluate import Comparison
        from ..evaluation.report import verdict_sentence
        from ..evaluation.statistics import holm, win_rate

        base, *others = self.models
        rates = {}
        for other in others:
            scores = np.full((2, len(self.prompts), len(self.seeds)), np.nan)  # of the other model, and of the base
            for (prompt, seed), cell in self.cells.items():
                pick = self._log.picks.get(frozenset((cell.get(base, ""), cell.get(other, ""))))
                share = None if pick is None else SHARES[pick.verdict]
                if pick is not None and share is not None:
                    wins = share if pick.first == cell[other] else 1 - share
                    scores[:, self.prompts.index(prompt), self.seeds.index(seed)] = wins, 1 - wins
            if np.isfinite(scores).any():
                rates[other] = win_rate(scores[0], scores[1])
        adjusted = holm([rate.p_value for rate in rates.values()])
        compared = [
            Comparison(model, "your eye", rate, p_value)
            for (model, rate), p_value in zip(rates.items(), adjusted, strict=True)
        ]
        numbers = [
            {"model": one.model, "base": base, "verdict": one.verdict, "adjusted_p_value": one.adjusted}
            | asdict(one.result)
            for one in compared
        ]
        return [verdict_sentence(one, base) for one in compared], numbers


class PickSession:
    """Picks of a folder, shared by all tabs of a page. All methods may be called from several threads.

    Args:
        folder (`Path`): A folder with `manifest.jsonl`. If its images have more than one `model`, they are compared
            blindly; otherwise the images of each prompt are rated.

    Raises:
        `ValueError`: If the folder has no pair to judge, or another process has it open.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed, self.left_out = read_manifest(folder)
        self.images = {image.name: image for image in listed}
        self._lock = threading.RLock()
        self._file_lock = FileLock(folder / LOCK_FILE, blocking=False)
        try:
            self._file_lock.acquire()
        except Timeout:
            raise ValueError(f"Another `pairs pick` has {folder} open. Use its page, or end it first.") from None
        self.log = PickLog(folder)
        models = {image.facts.get("model") for image in listed}
        self.is_blind = len(models) > 1 and None not in models
        self.order: RankOrder | BlindOrder = (BlindOrder if self.is_blind else RankOrder)(self.images, self.log)
        self.gone: set[str] = set()
        self.problem = ""  # with writing the pairs
        self._shown: dict[str, frozenset[str]] = {}  # tab -> the pair that it shows
        # Names that say nothing of the model, and that no other page can guess.
        self.codes = {secrets.token_urlsafe(12): name for name in self.images}
        self._code_of = {name: code for code, name in self.codes.items()}
        if not self.order.offers() and not self.log.picks:
            reasons = "".join(f" {count} images are {reason}." for reason, count in self.left_out.items())
            raise ValueError(
                f"{folder} has no two images of one prompt to compare: {len(self.images)} images, "
                f"{self.order.alone} of them the only one of their prompt.{reasons}"
            )
        self._write_pairs()

    def close(self) -> None:
        """Close the log, so that another process can open the folder."""
        self.log.close()
        self._file_lock.release()

    def state(self, tab: str, wanted: frozenset[str] | None = None) -> dict[str, Any]:
        """Return the next pair of a tab and the progress."""
        with self._lock:
            pair = self._next(tab, wanted)
            last = self.log.last
            return {
                "pair": pair,
                "judged": len(self.log.picks),
                "verdicts": self.log.verdicts,
                "pairs": self.pairs,
                "last": None if last is None else last.number,
                "blind": self.is_blind,
                "gone": len(self.gone),
                "left_out": dict(self.left_out),
                "problem": self.problem,
                "folder": str(self.folder),
                **self.order.progress(),
            }

    def pick(self, tab: str, first: str, second: str, verdict: str) -> dict[str, Any]:
        """Save a pick of two codes, and return the next pair.

        Raises:
            `ConflictError`: If the pair has a pick.
            `ValueError`: If there is no such pair or verdict.
            `OSError`: If the disk is full.
        """
        with self._lock:
            names = self._names(first, second)
            if verdict not in SHARES:
                raise ValueError(f"A verdict is one of {', '.join(SHARES)}, got {verdict!r}.")
            self.log.add(names[0], names[1], verdict)
            return self._changed(tab, names[0])

    def undo(self, tab: str, number: int) -> dict[str, Any]:
        """Take back the last pick, and return its pair as the next one.

        Raises:
            `ConflictError`: If `number` is not that of the last pick.
            `OSError`: If the disk is full.
        """
        with self._lock:
            pick = self.log.undo(number)
            return self._changed(tab, pick.first, pick.pair)

    def edit_prompt(self, tab: str, code: str, prompt: str) -> dict[str, Any]:
        """Replace the prompt of an image and of all others of its prompt.

        Raises:
            `ValueError`: If there is no such image, or the prompt is empty or too long.
            `OSError`: If the disk is full.
        """
        with self._lock:
            (name,) = self._names(code)
            self.log.edit_prompt(self.images[name].prompt, prompt)
            return self._changed(tab, name, self._shown.get(tab))

    def ranking(self) -> list[dict[str, Any]]:
        """Return the images of each prompt from the best to the worst, with codes in place of names."""
        if not isinstance(self.order, RankOrder):
            return []
        with self._lock:
            return [
                {
                    "prompt": self.log.prompts.get(prompt, prompt),
                    "images": [
                        {"code": self._code_of[name], "rating": round(rating, 2), "uncertain": uncertain}
                        for name, rating, uncertain in group.ranking()
                    ],
                }
                for prompt, group in self.order.groups.items()
            ]

    def result(self) -> list[str]:
        """Return the win rates of a blind comparison in words, and write them to `human.json`."""
        if not isinstance(self.order, BlindOrder):
            return []
        with self._lock:
            sentences, numbers = self.order.result()
            if numbers:
                write_atomically(self.folder / HUMAN_FILE, json.dumps(numbers, indent=1).encode() + b"\n")
            return sentences

    def _names(self, *codes: str) -> list[str]:
        names = [self.codes[code] for code in codes if code in self.codes]
        prompts = {self.images[name].prompt for name in names}
        if len(set(names)) < len(codes) or len(prompts) > 1:
            raise ValueError("There is no such pair in this folder.")
        return names

    def _changed(self, tab: str, name: str, wanted: frozenset[str] | None = None) -> dict[str, Any]:
        if name not in self.gone:
            self.order.update(self.images[name].prompt)
        self._shown.pop(tab, None)
        self._write_pairs()
        return self.state(tab, wanted)

    def _write_pairs(self) -> None:
        """Write the pairs. The picks are safe without them, so a full disk is only reported."""
        try:
            self.pairs = write_pairs(self.folder, self.log, self.images)
            self.problem = ""
        except OSError as error:
            self.pairs = getattr(self, "pairs", 0)
            self.problem = f"pairs.jsonl could not be written ({error.strerror}). Your picks are safe."

    def _next(self, tab: str, wanted: frozenset[str] | None) -> dict[str, Any] | None:
        """Return the pair that a tab shows next: one that no other tab shows, if there is one."""
        while True:
            offers = self.order.offers()
            others = {pair for other, pair in self._shown.items() if other != tab}
            free = [offer for offer in offers if frozenset(offer) not in others] or offers
            chosen = sorted(wanted) if wanted else (free[0] if free else None)
            if chosen is None:
                self._shown.pop(tab, None)
                return None
            lost = [name for name in chosen if not self.file(name)]
            if not lost:
                break
            wanted = None
            for name in lost:
                if name not in self.gone:
                    self.gone.add(name)
                    self.order.remove(name)
        self._shown[tab] = frozenset(chosen)
        left, right = chosen if secrets.randbelow(2) else reversed(chosen)  # so that no side is favoured
        prompt = self.images[left].prompt
        return {
            "first": self._code_of[left],
            "second": self._code_of[right],
            "prompt": self.log.prompts.get(prompt, prompt),
        }

    def file(self, name: str) -> Path | None:
        """Return the file of an image, or `None` if it has gone or leads out of the folder."""
        path = self.folder / name
        return path if path.is_file() and is_inside(self.folder, name) else None

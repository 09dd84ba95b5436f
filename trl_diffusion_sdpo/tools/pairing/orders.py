"""Choose which pair of images a pick page shows next: to rate the images of each prompt, or to compare models
blindly. Or choose which image it shows by itself."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from .manifest import ListedImage
from .picks import SHARES, Pick, PickLog, rated_pairs

PRIOR = 3.0  # standard deviation of a rating before any comparison, in log odds
# With ratings this many standard deviations apart, the higher-rated image is better with probability 0.85.
CERTAIN = 1.036
OFFERED = 16  # most pairs of a prompt that are candidates for the next one


class RankOrder:
    """Order of pairs for rating the images of each prompt: first those with images that have no pick yet, then those
    of images with similar ratings."""

    def __init__(self, images: Mapping[str, ListedImage], log: PickLog) -> None:
        self._log = log
        self._rated: dict[str, list[tuple[str, str]]] = {}
        for pair in rated_pairs(images):
            self._rated.setdefault(images[pair[0]].prompt, []).append(pair)
        self._names: dict[str, list[str]] = {}
        for image in images.values():
            self._names.setdefault(image.prompt, []).append(image.name)
        picks: dict[str, list[Pick]] = {}
        for pick in log.picks.values():
            if pick.first in images:
                picks.setdefault(images[pick.first].prompt, []).append(pick)
        self.groups: dict[str, Group] = {}
        for prompt, names in self._names.items():
            if len(names) > 1:
                self._rate(prompt, names, picks.get(prompt, []))

    def update(self, prompt: str, gone: set[str]) -> None:
        """Rate the images of a prompt again after a pick, without those in `gone`."""
        names = [name for name in self._names[prompt] if name not in gone]
        self._rate(prompt, names, self._log.picks.values())

    def _rate(self, prompt: str, names: list[str], picks: Iterable[Pick]) -> None:
        present = set(names)
        compared: list[tuple[str, str, float | None]] = [
            (pick.first, pick.second, SHARES[pick.verdict])
            for pick in picks
            if pick.pair <= present and not pick.is_thumb
        ]
        compared += [
            (better, worse, 1.0)
            for better, worse in self._rated.get(prompt, [])
            if {better, worse} <= present and frozenset((better, worse)) not in self._log.picks
        ]
        self.groups[prompt] = Group(names, compared)

    def offers(self, gone: set[str]) -> Iterator[tuple[str, str]]:
        """Iterate over the pairs to judge, those first whose pick would tell most about the ratings."""
        offers = heapq.merge(*(group.offers for group in self.groups.values()), key=lambda offer: -offer[0])
        return ((first, second) for _, first, second in offers)

    def left(self, gone: set[str]) -> int:
        """Return how many pairs may still be shown, at most. A pick often makes others unnecessary."""
        return sum(group.open for group in self.groups.values())


class Group:
    """The images of one prompt, their ratings, and the pairs to show next.

    Args:
        names (`Iterable[str]`): Names of the images.
        compared (`Iterable`): Picks as tuples of two names and a number: 1 if the first image won, 0 if the second
            did, 0.5 for a tie, and `None` for a skipped pair, which does not affect the ratings.
    """

    def __init__(self, names: Iterable[str], compared: Iterable[tuple[str, str, float | None]] = ()) -> None:
        self.names = list(names)
        count = len(self.names)
        index = {name: position for position, name in enumerate(self.names)}
        wins = np.zeros((count, count))
        judged = np.eye(count, dtype=bool)
        for first, second, share in compared:
            one, other = index[first], index[second]
            judged[one, other] = True
            judged[other, one] = True
            if share is not None:
                wins[one, other] += share
                wins[other, one] += 1 - share
        # Images that were never compared keep the prior's rating, independent of the others.
        self.ratings: np.ndarray = np.zeros(count)
        covariance = np.eye(count) * PRIOR**2
        known = np.flatnonzero(wins.sum(0) + wins.sum(1))
        if len(known):
            block = np.ix_(known, known)
            self.ratings[known], covariance[block] = bradley_terry(wins[block])
        difference = np.abs(self.ratings[:, None] - self.ratings[None, :])
        variance = np.diag(covariance)[:, None] + np.diag(covariance)[None, :] - 2 * covariance
        self.uncertain = ~judged & (difference < CERTAIN * np.sqrt(np.maximum(variance, 0)))
        chance = 1 / (1 + np.exp(-difference))
        # Information that a pick of the pair would add, to first order, and a large number for images without a pick,
        # so that they come first.
        gain = chance * (1 - chance) * variance
        unseen = judged.sum(1) == 1
        gain += PRIOR**2 * (unseen[:, None].astype(float) + unseen[None, :])
        rows, columns = np.nonzero(np.triu(self.uncertain))
        order = np.argsort(-gain[rows, columns], kind="stable")[:OFFERED]
        self.open = len(rows)  # pairs whose order is still uncertain
        self.offers = [
            (float(gain[one, other]), self.names[one], self.names[other])
            for one, other in zip(rows[order].tolist(), columns[order].tolist(), strict=True)
        ]

    def ranking(self) -> list[tuple[str, float, bool]]:
        """Return name, rating, and whether the rank is still uncertain, of each image from the best to the worst."""
        order = np.argsort(-self.ratings, kind="stable").tolist()
        doubtful = self.uncertain.sum(1)
        return [(self.names[index], float(self.ratings[index]), bool(doubtful[index])) for index in order]


def bradley_terry(wins: np.ndarray, prior: float = PRIOR) -> tuple[np.ndarray, np.ndarray]:
    """Return the most probable ratings of K images, and their covariance by Laplace's method.

    A person prefers image i to image j with probability `sigmoid(rating[i] - rating[j])`. Each rating's prior is a
    normal distribution with mean 0.

    Args:
        wins (`np.ndarray` of shape `(K, K)`): `wins[i, j]` is how often image i was preferred to image j. A tie adds
            one half to `wins[i, j]` and to `wins[j, i]`.
        prior (`float`): Standard deviation of the prior.

    Returns:
        `tuple`: Ratings of shape `(K,)`, and their covariance of shape `(K, K)`.
    """
    games = wins + wins.T
    ratings = np.zeros(len(wins))
    for _ in range(100):  # Newton's method; the log-probability is concave, so few steps are needed
        chance = 1 / (1 + np.exp(ratings[None, :] - ratings[:, None]))
        gradient = wins.sum(1) - (games * chance).sum(1) - ratings / prior**2
        information = games * chance * (1 - chance)
        precision = np.diag(information.sum(1) + prior**-2) - information
        step = np.linalg.solve(precision, gradient)
        ratings = ratings + np.clip(step, -2, 2)
        if np.abs(step).max(initial=0) < 1e-6:  # the next step would be about the square of this one
            break
    return ratings, np.linalg.inv(precision)


class SingleOrder:
    """Order of images that are judged by themselves, at random. Picks do not change it."""

    def __init__(self, images: Mapping[str, ListedImage], log: PickLog) -> None:
        self._log = log
        self._names = sorted(images)
        random.Random(0).shuffle(self._names)

    def update(self, prompt: str, gone: set[str]) -> None:
        """Do nothing: picks do not change the order."""

    def offers(self, gone: set[str]) -> Iterator[tuple[str, str]]:
        """Iterate over the images without a verdict and not in `gone`, each twice, as a pair."""
        picks = self._log.picks
        return ((name, name) for name in self._names if name not in gone and frozenset((name,)) not in picks)

    def left(self, gone: set[str]) -> int:
        """Return the number of images not judged yet."""
        return sum(1 for _ in self.offers(gone))


class BlindOrder:
    """Order of pairs for comparing models. A pair has an image of the first model and one of another, with the same
    prompt and seed. A model's images with equal prompts and seeds, or without seeds, are numbered as in the manifest.

    Pairs of the first seed come first, in random order, then those of the next one. Picks do not change the order.
    """

    def __init__(self, images: Mapping[str, ListedImage], log: PickLog) -> None:
        self._log = log
        self._cells: dict[tuple[str, Any], dict[str, str]] = {}  # prompt and seed -> model -> image
        numbers: Counter[tuple[str, Any, str]] = Counter()  # images so far, by prompt, seed and model
        for image in images.values():
            seed = image.facts.get("seed")
            model = str(image.facts["model"])
            number = numbers[image.prompt, seed, model]
            numbers[image.prompt, seed, model] += 1
            self._cells.setdefault((image.prompt, (seed, number)), {})[model] = image.name
        self.models = list(dict.fromkeys(str(image.facts["model"]) for image in images.values()))
        self.prompts = list(dict.fromkeys(prompt for prompt, _ in self._cells))
        self.seeds = list(dict.fromkeys(seed for _, seed in self._cells))
        base, *others = self.models
        pairs = [
            (self.seeds.index(seed), cell[base], cell[other])
            for (_, seed), cell in self._cells.items()
            for other in others
            if base in cell and other in cell
        ]
        random.Random(0).shuffle(pairs)
        self._pairs = [(first, second) for _, first, second in sorted(pairs, key=lambda pair: pair[0])]
        self.alone = len(images) - len({name for pair in self._pairs for name in pair})  # images in no pair

    def update(self, prompt: str, gone: set[str]) -> None:
        """Do nothing: picks do not change the order."""

    def offers(self, gone: set[str]) -> Iterator[tuple[str, str]]:
        """Iterate over the pairs without a pick and without images in `gone`."""
        picks = self._log.picks
        return (pair for pair in self._pairs if frozenset(pair) not in picks and not gone.intersection(pair))

    def left(self, gone: set[str]) -> int:
        """Return the number of pairs not judged yet."""
        return sum(1 for _ in self.offers(gone))

    def result(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Return each other model's win rate against the first, as sentences and as rows for JSON."""
        from ...utils.statistics import holm, win_rate
        from ..evaluation.report import verdict_sentence  # takes seconds, so it is not at the top
        from ..evaluation.results import Comparison

        base, *others = self.models
        rates = {}
        for other in others:
            scores = np.full((2, len(self.prompts), len(self.seeds)), np.nan)  # [0]: the other model, [1]: the base
            for (prompt, seed), cell in self._cells.items():
                pick = self._log.picks.get(frozenset((cell.get(base, ""), cell.get(other, ""))))
                share = None if pick is None else SHARES[pick.verdict]
                if pick is not None and share is not None:
                    wins = share if pick.first == cell[other] else 1 - share
                    scores[:, self.prompts.index(prompt), self.seeds.index(seed)] = wins, 1 - wins
            if np.isfinite(scores).any():
                rates[other] = win_rate(scores[0], scores[1])
        adjusted = holm([rate.p_value for rate in rates.values()])
        sentences = []
        numbers = []
        for (model, rate), p_value in zip(rates.items(), adjusted, strict=True):
            compared = Comparison(model, "your eye", rate, p_value)
            sentence = verdict_sentence(compared, base)
            sentences.append(sentence[0].upper() + sentence[1:])
            verdict = {"model": model, "base": base, "verdict": compared.verdict, "adjusted_p_value": p_value}
            numbers.append(verdict | asdict(rate))
        return sentences, numbers

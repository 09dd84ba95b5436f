"""Check a data set of pairs before training: report dropped and doubtful pairs, and write a contact sheet."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from ...data import PairOptions, PairTransform, PreferenceDataset, UndecodableImageError, prepare_dataset
from ...data.data_report import evenly_spaced
from ...utils.errors import UserError
from ...utils.files import write_atomically
from ..evaluation.report import template, thumbnail_url
from ..rewards import Scorer
from .manifest import pixel_hash
from .picks import PICKS_FILE, THUMBS, PickLog

SHEET = Path(__file__).parent / "sheet.html"
SHOWN_SIDE = 256  # longer side of images in the contact sheet, in pixels
EXAMINED = 500  # most pairs to examine


def check_pairs(
    dataset: Any,
    options: PairOptions | None = None,
    *,
    scorer: Scorer | None = None,
    sheet: Path | None = None,
    folder: Path | None = None,
) -> list[str]:
    """Report which pairs training reads, which it drops, and which look doubtful, as lines of text.

    All pairs are checked for images that cannot be decoded. Up to 500, evenly spaced, are also examined for identical
    images, repeated pairs and contradictions.

    Args:
        dataset (`Any`): See [`prepare_dataset`].
        options (`PairOptions`, *optional*): Settings with which training would read the data set.
        scorer (`Scorer`, *optional*): Scorer of the examined pairs. The report gives the share whose chosen image gets
            the higher score.
        sheet (`Path`, *optional*): HTML file for a contact sheet of the examined pairs with their prompts.
        folder (`Path`, *optional*): Output folder of `pairs pick`. The report also counts its picks by verdict.

    Raises:
        `ValueError`: If training would raise an error for the data set, or the scorer fails.
    """
    options = options or PairOptions(PairTransform(512), verify_images="all", min_side=1)
    pairs = prepare_dataset(dataset, options, name="pairs")
    if not isinstance(pairs, PreferenceDataset):
        raise UserError("A stream cannot be checked. Load the data set without `streaming=True`.")
    source, origins = pairs.source, pairs.positions
    prompts = source.prompts_of_rows(origins[:, 0])
    counts = Counter(prompts)
    sizes = Counter[str]()
    agreed: list[float] = []
    seen: set[tuple[str, ...]] = set()
    compared = 0
    identical = 0
    repeated = 0
    contradictory = 0
    shown = []
    for pair in evenly_spaced(len(pairs), EXAMINED).tolist():
        try:
            stored = source.images(origins[pair].reshape(2, 2).tolist())
            winner, loser = (image.decode(pairs.reader) for image in stored)
        except UndecodableImageError:  # the file was deleted since `prepare_dataset` read it
            continue
        prompt = prompts[pair]
        own_prompts = [image.prompt for image in stored]
        first = pixel_hash(winner)
        second = pixel_hash(loser)
        compared += 1
        identical += first == second
        repeated += (prompt, first, second) in seen
        contradictory += first != second and (prompt, second, first) in seen
        seen.add((prompt, first, second))
        sizes.update(f"{image.width}x{image.height}" for image in (winner, loser))
        if scorer is not None:
            better, worse = _scores(scorer, [winner, loser], own_prompts)
            if math.isfinite(better - worse):
                agreed.append(0.5 if better == worse else float(better > worse))
        if sheet is not None:
            shown.append(
                (
                    " / ".join(dict.fromkeys(own_prompts)),
                    *(thumbnail_url(image, SHOWN_SIDE) for image in (winner, loser)),
                )
            )

    lines = [
        str(pairs.report),
        f"  {len(counts)} different prompts; the most frequent prompt has {max(counts.values())} pairs",
        f"  of {compared} examined pairs, {identical} have two identical images, {repeated} repeat an earlier pair, "
        f"and {contradictory} contradict an earlier pair: the same two images with the other one chosen",
        f"  {len(sizes)} different image sizes; the most frequent: "
        + ", ".join(f"{size} ({count} times)" for size, count in sizes.most_common(5)),
    ]
    if pairs.scores is not None:
        better, worse = pairs.scores.T
        share = ((better > worse).mean() + (better >= worse).mean()) / 2
        lines.append(f"  the score columns prefer the chosen image in {share:.0%} of the pairs; a tie counts half")
    if scorer is not None and agreed:
        lines.append(
            f"  {scorer.name} prefers the chosen image in {sum(agreed) / len(agreed):.0%} of {len(agreed)} examined "
            "pairs; a tie counts half"
        )
    if scorer is not None and len(agreed) < compared:
        lines.append(f"  {scorer.name} gave no score to an image of {compared - len(agreed)} examined pairs")
    if folder is not None and (folder / PICKS_FILE).is_file():
        verdicts = PickLog(folder, read_only=True).verdicts
        listed = ", ".join(f"{count} {verdict.replace('_', ' ')}" for verdict, count in verdicts.items())
        lines.append(
            f"  picks by verdict: {listed}. Only picks of `first` or `second` become pairs"
            + (", and those of `liked` or `disliked` single images" if verdicts.keys() & THUMBS else "")
        )
    if sheet is not None:
        write_atomically(sheet, template(SHEET).render(summary="\n".join(lines), pairs=shown).encode())
    return lines


def _scores(scorer: Scorer, images: list[Image.Image], prompts: list[str]) -> list[float]:
    try:
        return scorer(images, prompts).tolist()
    except Exception as error:  # a user's function may raise anything, and the data set is not to blame
        raise UserError(f"The scorer {scorer.name} failed with {type(error).__name__}: {error}") from error

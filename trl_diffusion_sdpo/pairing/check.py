"""A look at a data set of pairs before training: what training drops, what is doubtful, and a contact sheet."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data import PairTransform, PreferenceDataset, UndecodableImageError
from ..data.checking import DataReport, evenly_spaced, same_image
from ..data.image_keys import image_key
from ..data.pairs import PairOptions, prepare_dataset
from ..rewards import Scorer
from ..utils.files import write_atomically
from .picks import PICKS_FILE, PickLog

SHOWN_SIDE = 256  # pixels of the longer side of images in the contact sheet
SCORED_AT_ONCE = 16  # pairs


@dataclass
class PairCheck:
    """Findings on a data set of pairs.

    Args:
        report (`DataReport`): What training reads and drops, as training itself reports it.
        prompts (`int`): Distinct prompts.
        most_of_a_prompt (`int`): Pairs of the prompt with the most pairs.
        repeated (`int`): Pairs of images that came before in this order.
        contradictory (`int`): Pairs of images that came before in the other order.
        looked_at (`int`): Pairs whose images were compared.
        identical (`int`): Pairs of them with two identical images.
        sizes (`Counter[str]`): Sizes of their images, such as `512x512`.
        scores (`float`, *optional*): Share of all pairs in whose columns the chosen image has the higher score.
        agreement (`dict[str, float]`): Scorer -> share of the compared pairs in which it prefers the chosen image.
        picks (`dict[str, int]`): Picks of a person by verdict, if the data set is from `pairs pick`.
    """

    report: DataReport
    prompts: int = 0
    most_of_a_prompt: int = 0
    repeated: int = 0
    contradictory: int = 0
    looked_at: int = 0
    identical: int = 0
    sizes: Counter[str] = field(default_factory=Counter)
    scores: float | None = None
    agreement: dict[str, float] = field(default_factory=dict)
    picks: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [str(self.report)]
        lines.append(f"  {self.prompts} prompts; the most frequent one has {self.most_of_a_prompt} pairs")
        if self.repeated or self.contradictory:
            lines.append(
                f"  {self.repeated} pairs repeat an earlier one, and {self.contradictory} contradict one: their images "
                "are preferred in both orders. Training keeps them"
            )
        lines.append(f"  of {self.looked_at} pairs looked at, {self.identical} have two identical images")
        common = ", ".join(f"{count} of {size}" for size, count in self.sizes.most_common(5))
        lines.append(f"  {len(self.sizes)} sizes of images: {common}{', ...' if len(self.sizes) > 5 else ''}")
        if self.scores is not None:
            lines.append(f"  the score columns prefer the chosen image in {self.scores:.0%} of the pairs")
        lines += [f"  {name} prefers the chosen image in {share:.0%}" for name, share in self.agreement.items()]
        if self.picks:
            listed = ", ".join(f"{count} {verdict.replace('_', ' ')}" for verdict, count in self.picks.items())
            lines.append(f"  picks: {listed}. Only `first` and `second` become pairs")
        return "\n".join(lines)


def check_pairs(
    dataset: Any,
    *,
    resolution: int = 512,
    min_side: int | None = None,
    dataset_format: str | None = None,
    look_at: int = 500,
    scorer: Scorer | None = None,
    sheet: Path | None = None,
    folder: Path | None = None,
) -> PairCheck:
    """Check a data set of pairs as training would read it. All images are decoded.

    Args:
        dataset (`Any`): See [`prepare_dataset`].
        resolution (`int`): Side of the images in training. The report says how many are enlarged to it.
        min_side (`int`, *optional*): Pairs with a smaller image are dropped.
        dataset_format (`str`, *optional*): A key of `FORMATS`.
        look_at (`int`): How many pairs, evenly spaced, are compared, scored and shown.
        scorer (`Scorer`, *optional*): A scorer whose preferences are compared with the pairs.
        sheet (`Path`, *optional*): HTML file to write these pairs to, with their prompts.
        folder (`Path`, *optional*): Folder of `pairs pick`, whose ties are reported too.

    Raises:
        `ValueError`: If training would refuse the data set.
    """
    options = PairOptions(
        transform=PairTransform(resolution),
        dataset_format=dataset_format,
        verify_images="all",
        min_side=min_side or 1,
        compare=False,
    )
    pairs = prepare_dataset(dataset, options, name="pairs")
    if not isinstance(pairs, PreferenceDataset):
        raise ValueError("A stream cannot be checked. Load the data set without `streaming=True`.")
    check = PairCheck(pairs.report)
    source, places = pairs.origins()
    prompts = [source.prompt(row, image) for row, image in places[:, :2].tolist()]
    counts = Counter(prompts)
    check.prompts, check.most_of_a_prompt = len(counts), max(counts.values())
    if pairs.scores is not None:
        check.scores = float((pairs.scores[:, 0] > pairs.scores[:, 1]).mean())
    _find_repeated(check, source, places, prompts)
    if folder is not None and (folder / PICKS_FILE).is_file():
        log = PickLog(folder, read_only=True)
        check.picks = log.verdicts
        log.close()
    figures = []
    preferred = []
    batch: list[tuple[str, Image.Image, Image.Image]] = []
    looked_at = evenly_spaced(len(pairs), look_at).tolist()
    for number, pair in enumerate(looked_at, 1):
        winner_row, winner_image, loser_row, loser_image = places[pair].tolist()
        try:
            winner = pairs.reader.decode_at(source.images(winner_row), winner_image)
            loser = pairs.reader.decode_at(source.images(loser_row), loser_image)
        except UndecodableImageError:  # the file has gone since it was checked
            continue
        check.looked_at += 1
        check.identical += same_image(winner, loser)
        check.sizes.update(f"{image.width}x{image.height}" for image in (winner, loser))
        if sheet is not None:
            figures.append(_figure(prompts[pair], winner, loser))
        batch.append((prompts[pair], winner, loser))
        if scorer is not None and (len(batch) == SCORED_AT_ONCE or number == len(looked_at)):
            texts, winners, losers = (list(column) for column in zip(*batch, strict=True))
            preferred.append((scorer(winners, texts) - scorer(losers, texts)).sign().numpy())
        if len(batch) == SCORED_AT_ONCE:
            batch = []
    if scorer is not None and preferred:
        check.agreement[scorer.name] = float((1 + np.concatenate(preferred)).mean() / 2)  # a tie counts one half
    if sheet is not None:
        write_atomically(sheet, _page(str(check), figures).encode())
    return check


def _find_repeated(check: PairCheck, source: Any, places: np.ndarray, prompts: list[str]) -> None:
    seen = set()
    for (winner_row, winner_image, loser_row, loser_image), prompt in zip(places.tolist(), prompts, strict=True):
        winner = image_key(source.images(winner_row)[winner_image])
        loser = image_key(source.images(loser_row)[loser_image])
        check.repeated += (prompt, winner, loser) in seen
        check.contradictory += (prompt, loser, winner) in seen
        seen.add((prompt, winner, loser))


def _figure(prompt: str, winner: Image.Image, loser: Image.Image) -> str:
    images = "".join(
        f'<img class="{kind}" src="{_data_url(image)}" alt="{kind}">'
        for kind, image in (("chosen", winner), ("rejected", loser))
    )
    return f"<figure>{images}<figcaption>{html.escape(prompt)}</figcaption></figure>"


def _data_url(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _page(summary: str, figures: list[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Pairs</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>Pairs</h1><pre>{html.escape(summary)}</pre><p>The chosen image is on the left.</p>"
        f"<main>{''.join(figures)}</main></body></html>\n"
    )


_STYLE = """
:root{color-scheme:light dark}body{font:16px/1.45 system-ui,sans-serif;margin:16px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.9rem}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:24px 16px}
figure{margin:0;display:grid;grid-template-columns:1fr 1fr;gap:4px;align-items:start}
img{width:100%;border-bottom:4px solid #1a7f37}.rejected{border-color:#c62828}
figcaption{grid-column:1/3;font-size:.85rem;overflow-wrap:anywhere;max-height:5.8em;overflow-y:auto}
"""

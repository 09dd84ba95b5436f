"""A look at a data set of pairs before training: what training drops, what is doubtful, and a contact sheet."""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from ..data import PairOptions, PairTransform, PreferenceDataset, UndecodableImageError, prepare_dataset
from ..data.checking import evenly_spaced
from ..rewards import Scorer
from ..utils.files import write_atomically
from .picks import PICKS_FILE, PickLog

SHOWN_SIDE = 256  # pixels of the longer side of images in the contact sheet


def check_pairs(
    dataset: Any,
    options: PairOptions | None = None,
    *,
    look_at: int = 500,
    scorer: Scorer | None = None,
    sheet: Path | None = None,
    folder: Path | None = None,
) -> list[str]:
    """Return what training reads and drops, and what is doubtful, in lines of text. All images are decoded.

    Args:
        dataset (`Any`): See [`prepare_dataset`].
        options (`PairOptions`, *optional*): Settings by which training would read the data set.
        look_at (`int`): How many pairs, evenly spaced, are compared, scored and shown.
        scorer (`Scorer`, *optional*): A scorer whose preferences are compared with the pairs.
        sheet (`Path`, *optional*): HTML file to write these pairs to, with their prompts.
        folder (`Path`, *optional*): Folder of `pairs pick`, whose ties are reported too.

    Raises:
        `ValueError`: If training would refuse the data set.
    """
    options = options or PairOptions(PairTransform(512), verify_images="all", min_side=1, compare=False)
    pairs = prepare_dataset(dataset, options, name="pairs")
    if not isinstance(pairs, PreferenceDataset):
        raise ValueError("A stream cannot be checked. Load the data set without `streaming=True`.")
    source, places = pairs.origins()
    prompts = source.prompts_of_rows(places[:, 0])
    counts, sizes = Counter(prompts), Counter[str]()
    agreed: list[float] = []
    seen: set[tuple[str, ...]] = set()
    compared = identical = repeated = contradictory = 0
    figures = []
    for pair in evenly_spaced(len(pairs), look_at).tolist():
        try:
            winner, loser = (
                image.decode(pairs.reader) for image in source.images(places[pair].reshape(2, 2).tolist())
            )
        except UndecodableImageError:  # the file has gone since it was checked
            continue
        prompt = prompts[pair]
        first, second = _digest(winner), _digest(loser)
        compared += 1
        identical += first == second
        repeated += (prompt, first, second) in seen
        contradictory += first != second and (prompt, second, first) in seen
        seen.add((prompt, first, second))
        sizes.update(f"{image.width}x{image.height}" for image in (winner, loser))
        if scorer is not None:
            better, worse = scorer([winner, loser], [prompt, prompt]).tolist()
            agreed.append(0.5 if better == worse else float(better > worse))
        if sheet is not None:
            figures.append(_figure(prompt, winner, loser))

    lines = [
        str(pairs.report),
        f"  {len(counts)} prompts; the most frequent one has {max(counts.values())} pairs",
        f"  of {compared} pairs compared, {identical} have two identical images, {repeated} repeat an earlier pair, "
        f"and {contradictory} prefer the image that an earlier pair rejects",
        f"  {len(sizes)} sizes of images; the most frequent: "
        + ", ".join(f"{size} ({count} times)" for size, count in sizes.most_common(5)),
    ]
    if pairs.scores is not None:
        share = float((pairs.scores[:, 0] > pairs.scores[:, 1]).mean())
        lines.append(f"  the score columns prefer the chosen image in {share:.0%} of the pairs")
    if scorer is not None and agreed:
        lines.append(f"  {scorer.name} prefers the chosen image in {sum(agreed) / len(agreed):.0%}; a tie counts half")
    if folder is not None and (folder / PICKS_FILE).is_file():
        verdicts = PickLog(folder, read_only=True).verdicts
        listed = ", ".join(f"{count} {verdict.replace('_', ' ')}" for verdict, count in verdicts.items())
        lines.append(f"  picks: {listed}. Only `first` and `second` become pairs")
    if sheet is not None:
        write_atomically(sheet, _page("\n".join(lines), figures).encode())
    return lines


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def _figure(prompt: str, winner: Image.Image, loser: Image.Image) -> str:
    images = ""
    for kind, image in (("chosen", winner), ("rejected", loser)):
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        data = base64.b64encode(buffer.getvalue()).decode()
        images += f'<img class="{kind}" src="data:image/jpeg;base64,{data}" alt="{kind}">'
    return f"<figure>{images}<figcaption>{html.escape(prompt)}</figcaption></figure>"


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

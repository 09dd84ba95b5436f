"""Score the images of given pairs, and write the pairs with their scores and the scores' scale."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm.auto import tqdm

from ... import __version__
from ...data import PairOptions, PairTransform, PreferenceDataset, UndecodableImageError, prepare_dataset
from ...data.formats import BRANCH_PROMPTS, PreferenceFormat
from ...data.image_folders import SIDES
from ...data.images import ImageReader
from ...data.mixtures import PairMixture
from ...data.pair_scores import SCORER_COLUMNS
from ...data.sources import PairSource, StoredImage, images_of_row
from ...data.tables import stored_image
from ...utils.errors import UserError
from ...utils.files import json_lines, write_atomically
from ...utils.identity import write_description
from ...utils.processes import usable_cores
from ...utils.score_scale import SCALE_COLUMN, ScoreScale
from ..rewards import Scorer
from ..rewards.scorer import describe_scorer, fitting, on_device, saved_scores, scale_of
from ..rewards.vlm_server import VLMServerJudge
from .manifest import read_json_lines
from .publish import CARD_FILE

SCORED_FILE = "pairs.parquet"
SUMMARY_FILE = "scores.json"
SCORES_FOLDER = "scores"
_AT_ONCE = 16  # images to score before saving their scores
_ROWS_AT_ONCE = 100  # rows of a row group of the parquet file
_SCALE = {"scorer": datasets.Value("string")} | {
    name: datasets.Value("float64") for name in ("low", "high", "lowest", "highest", "log_odds")
}


def score_pairs(
    dataset: Any,
    scorers: Sequence[Scorer],
    output_dir: str | Path,
    *,
    dataset_format: str | None = None,
    device: str | torch.device = "cpu",
) -> list[str]:
    """Score the images of pairs, and write the pairs with their scores into a folder that training reads.

    Each distinct image is scored once for each of its prompts. Scores are saved at once: call it again to continue
    after an interruption. The labels still decide which image is chosen.

    The folder gets a row for each pair, with `prompt` (or `chosen_prompt` and `rejected_prompt`), `chosen`, `rejected`,
    `chosen_score` and `rejected_score` by the first scorer, `score_scales` (what the scores mean, which losses read),
    and the other columns of the data set. With several scorers, `chosen_scores` and `rejected_scores` list the scores
    of all scorers. Images in files stay where they are. `scores.json` describes the scorers.

    Args:
        dataset (`datasets.Dataset` or `list[dict]`): Pairs in any format that training reads. See [`load_pairs`].
        scorers (`Sequence[Scorer]`): Scorers, for example from [`load_scorer`].
        output_dir (`str` or `Path`): A new folder, or one that it has written before.
        dataset_format (`str`, *optional*): Format of the columns. By default, they determine it.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Device for scorers on the CPU. As many at
            once move there as take half of its free memory.

    Returns:
        `list[str]`: Lines of a report: which pairs were left out and why, and how often each scorer prefers the chosen
            image.

    Raises:
        `ValueError`: If there is no scorer, one is a judge or two share a name, the data are a stream or a mixture, the
            folder has other files, or no pair has scores.

    Example:

    ```python
    from trl_diffusion_sdpo import load_pairs, load_scorer, score_pairs

    print("\\n".join(score_pairs(load_pairs("path/to/preferences"), [load_scorer("pickscore")], "scored")))
    ```
    """
    names = [scorer.name for scorer in scorers]
    if not names or len(set(names)) < len(names) or any(isinstance(scorer, VLMServerJudge) for scorer in scorers):
        raise UserError(
            "Pairs need one or more scorers of single images with different names, such as `pickscore`, got "
            f"{names or 'none'}. A judge such as `vlm_judge` cannot score a single image."
        )
    folder = Path(output_dir)
    if folder.exists() and not (folder / SUMMARY_FILE).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(
            f"The output must be a new folder, or one that `pairs score` has written, got {folder}. Choose another."
        )
    if isinstance(dataset, PairMixture | datasets.IterableDataset):
        raise UserError(f"Pairs to score must be one data set and no stream, got a {type(dataset).__name__}.")

    # Read the pairs as training does, and score their images.
    reading = PairOptions(PairTransform(512), dataset_format=dataset_format, verify_images="none", use_scores=False)
    pairs = prepare_dataset(dataset, reading, name="pairs")
    assert isinstance(pairs, PreferenceDataset)
    source, origins = pairs.source, pairs.positions
    if source.single_images:
        raise UserError(
            "`pairs score` scores both images of pairs, and these data have single images, liked or disliked. Pass the "
            "images without the column `label` or `score` to a scorer of `load_scorer`, and write its numbers into a "
            "column `score`."
        )
    described = {"scorers": [describe_scorer(scorer) for scorer in scorers]}
    write_description(folder / SUMMARY_FILE, described)
    places, numbers = np.unique(origins.reshape(-1, 2), axis=0, return_inverse=True)
    images = [tuple(place) for place in places.tolist()]
    numbers = numbers.reshape(-1, 2)  # of the images of each pair
    saved = [_SavedScores(folder / SCORES_FOLDER, scorer) for scorer in scorers]
    for group in fitting(scorers, device):
        with contextlib.ExitStack() as stack:
            for number in group:
                stack.enter_context(on_device(scorers[number], device))
            keys, unreadable = _score_images(source, images, pairs.reader, [saved[number] for number in group])
    values = np.array([[each.scores.get(keys.get(image, ""), np.nan) for each in saved] for image in images])  # (N, K)
    scores = values[numbers]  # (P, 2, K)

    # Keep the pairs that have all scores, and report the others.
    is_readable = np.array([image in keys for image in images])[numbers].all(1)
    is_scored = np.isfinite(scores).all((1, 2))
    lines = [str(pairs.report)]
    lines += [f"  row {row}: image {image} {reason}" for (row, image), reason in list(unreadable.items())[:5]]
    lines.append(
        f"  {len(images)} images, {len(set(keys.values()))} different; {int((~is_readable).sum())} pairs left out "
        f"because an image cannot be read, {int((is_readable & ~is_scored).sum())} because an image has no score"
    )
    if not is_scored.any():
        raise UserError("None of the pairs has scores for both images.\n" + "\n".join(lines))
    scores = scores[is_scored]
    scales = [_with_range(scale_of(scorer), values[:, index]) for index, scorer in enumerate(scorers)]
    for index, scale in enumerate(scales):
        chosen, rejected = scores[:, :, index].T
        wins = int((chosen > rejected).sum())
        ties = int((chosen == rejected).sum())
        lines.append(
            f"  {scale.scorer} prefers the chosen image in {wins / len(scores):.0%} of {len(scores)} pairs; {ties} ties"
        )
        if scale.low is None:
            lines.append(f"  {scale.scorer} gave all images the same score, so its scores are useless")

    # Write the data set.
    rows = _rows(source, origins[is_scored], scores, [asdict(scale) for scale in scales])
    features = _features(source, len(scorers))
    write_atomically(folder / SCORED_FILE, lambda file: _write_parquet(file, rows, features))
    summary = {**described, "pairs": len(scores), "scales": [asdict(scale) for scale in scales], "report": lines}
    write_description(folder / SUMMARY_FILE, summary)
    write_atomically(folder / CARD_FILE, _card(folder.absolute().name, summary).encode())
    return lines


class _SavedScores:
    """The scores of one scorer by image, and the file that gets a line for each new score."""

    def __init__(self, folder: Path, scorer: Scorer):
        self._scorer = scorer
        base = saved_scores(folder, scorer)
        self._file = base.with_name(f"{base.name}.jsonl")
        self._file.touch()
        content = self._file.read_bytes()
        complete = content.rfind(b"\n") + 1  # a process that was killed may have left a part of a line
        os.truncate(self._file, complete)
        rows = read_json_lines(self._file, content[:complete])
        self.scores = {str(row.get("image")): float(row.get("score", np.nan)) for row in rows}

    def add(self, keys: Sequence[str], images: Sequence[Image.Image], prompts: Sequence[str]) -> None:
        """Score the images without a score, and save their scores. NaN is not saved, so that the next call asks
        again."""
        new = {key: number for number, key in enumerate(keys) if key not in self.scores}
        if not new:
            return
        # Copies, because other scorers get these images too, and a user's function may change them.
        scored = self._scorer([images[i].copy() for i in new.values()], [prompts[i] for i in new.values()])
        found = {key: score for key, score in zip(new, scored.tolist(), strict=True) if np.isfinite(score)}
        with open(self._file, "ab") as file:
            file.write(json_lines({"image": key, "score": score} for key, score in found.items()))
        self.scores.update(found)


def _score_images(
    source: PairSource, images: Sequence[tuple[int, int]], reader: ImageReader, saved: Sequence[_SavedScores]
) -> tuple[dict[tuple[int, int], str], dict[tuple[int, int], str]]:
    """Score images, each decoded once for all scorers. Return a hash of pixels and prompt for each readable one, and a
    reason for each other one. A row and a number within it identify an image."""
    keys = {}
    unreadable = {}
    with ThreadPoolExecutor(usable_cores()) as pool, tqdm(total=len(images), desc="Scoring images") as progress:
        for start in range(0, len(images), _AT_ONCE):
            places = images[start : start + _AT_ONCE]
            stored = source.images(places)
            good = []
            for place, image, decoded in zip(places, stored, pool.map(partial(_decoded, reader), stored), strict=True):
                if isinstance(decoded, UndecodableImageError):
                    unreadable[place] = str(decoded)
                    continue
                digest = hashlib.sha256(f"{decoded.size} {image.prompt}\0".encode() + decoded.tobytes())
                keys[place] = digest.hexdigest()[:32]
                good.append((keys[place], decoded, image.prompt))
            progress.update(len(places))
            if not good:
                continue
            for each in saved:
                each.add(*zip(*good, strict=True))
    return keys, unreadable


def _decoded(reader: ImageReader, image: StoredImage) -> Image.Image | UndecodableImageError:
    try:
        return image.decode(reader)
    except UndecodableImageError as error:
        return error


def _with_range(scale: ScoreScale, scores: np.ndarray) -> ScoreScale:
    """Return the scale with the range of these scores, if the scorer has no usual range of its own."""
    finite = scores[np.isfinite(scores)]
    if scale.low is not None or np.ptp(finite) == 0:
        return scale
    return replace(scale, low=float(finite.min()), high=float(finite.max()))


# ---- The data set ---------------------------------------------------------------------------------------------------


def _columns(source: PairSource) -> tuple[PreferenceFormat, tuple[str, ...], tuple[str, ...], list[str]]:
    """Return the format of the rows, the names of prompt and mask columns to write, and the columns to copy."""
    row_format = source.tables[0].format
    rows = source.tables[0].dataset
    prompts = BRANCH_PROMPTS if row_format.prompt_of_each_image else ("prompt",)
    masks = tuple(f"{side}_mask" for side in SIDES) if len(row_format.mask_columns) == 2 else ()
    read = {*row_format.image_columns, *row_format.prompt_columns, *(row_format.mask_columns if masks else ())}
    written = {*prompts, *SIDES, *masks, *(f"{side}_score" for side in SIDES), *SCORER_COLUMNS, SCALE_COLUMN}
    # A group's two images are in two rows, whose other columns would not fit into one.
    is_copied = row_format.group_column is None
    return row_format, prompts, masks, [name for name in rows.column_names if is_copied and name not in read | written]


def _features(source: PairSource, scorers: int) -> datasets.Features:
    _, prompts, masks, copied = _columns(source)
    number = datasets.Value("float64")
    lists = dict.fromkeys(SCORER_COLUMNS, datasets.List(number)) if scorers > 1 else {}
    return datasets.Features(
        {
            **dict.fromkeys(prompts, datasets.Value("string")),
            **dict.fromkeys((*SIDES, *masks), datasets.Image()),
            **{f"{side}_score": number for side in SIDES},
            **lists,
            SCALE_COLUMN: datasets.List(_SCALE),
            **{name: source.tables[0].dataset.features[name] for name in copied},
        }
    )


def _rows(
    source: PairSource, origins: np.ndarray, scores: np.ndarray, scales: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each pair, from the positions of its images `(P, 4)` and its scores `(P, 2, K)`."""
    row_format, prompts, masks, copied = _columns(source)
    others = source.tables[0].dataset.with_format("arrow").select_columns(copied) if copied else None
    for places, values in zip(origins.tolist(), scores.tolist(), strict=True):
        images = source.images([places[:2], places[2:]])
        row: dict[str, Any] = dict(zip(prompts, (image.prompt for image in images), strict=False))
        for side, image, by_scorer in zip(SIDES, images, values, strict=True):
            row[side] = _lasting(stored_image(images_of_row(image.row, row_format)[image.number]))
            row[f"{side}_score"] = by_scorer[0]
            row[f"{side}_scores"] = by_scorer
            if masks:
                row[f"{side}_mask"] = _lasting(stored_image(image.mask))
        yield {**row, SCALE_COLUMN: scales, **(others[places[0]].to_pylist()[0] if others is not None else {})}


def _lasting(image: dict[str, Any]) -> dict[str, Any]:
    """Return a stored image whose path, if any, holds in every working directory."""
    path = image["path"]
    is_file = image["bytes"] is None and path is not None and "://" not in path
    return {**image, "path": os.path.abspath(path)} if is_file else image


def _write_parquet(file: BinaryIO, rows: Iterator[dict[str, Any]], features: datasets.Features) -> None:
    schema = features.arrow_schema
    with pq.ParquetWriter(file, schema) as writer:
        while batch := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(batch, schema))


def _card(name: str, summary: Mapping[str, Any]) -> str:
    scorers = "\n".join(f"- {scale['scorer']}, from {scale['low']} to {scale['high']}" for scale in summary["scales"])
    return (
        f"# {name}\n\n{summary['pairs']} pairs with scores, written by `trl-diffusion-sdpo pairs score` {__version__}. "
        f"The column `{SCALE_COLUMN}` says what the scores mean. Scorers and the usual range of their scores:\n\n"
        f"{scorers}\n"
    )

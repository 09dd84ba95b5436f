"""Write a folder of pairs with its dataset card, and upload it to the Hub."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import DatasetCard
from PIL import ExifTags, Image

from ...data import load_pairs
from ...data.images import FILE_FORMATS
from ...saving.publishing import explained_hub_errors
from ...utils.errors import UserError
from ...utils.files import json_lines, write_atomically
from ...utils.identity import hub_commit, short_hash
from ..evaluation import Candidate
from .picks import IMAGES_FILE, PAIRS_FILE, PICKS_FILE, SHARES, THUMBS, PickLog

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
_MARK = re.compile(r"\n<!-- generated: ([0-9a-f]{16}) -->\n\Z")  # end of a card, with the hash of the text before it
IMAGE_COLUMNS = ("chosen", "rejected", "image", "mask")
_PRIVATE = {"exif", "xmp", "XML:com.adobe.xmp", "photoshop", "comment"}  # Pillow's names of metadata
_JPEG_METADATA = (0xE1, 0xED, 0xFE)  # markers of EXIF and XMP, IPTC, and comments in a JPEG file
_JPEG_PIXELS = b"\xff\xda"
_JPEG_END = b"\xff\xd9"
_JPEG_FILL = b"\xff\xff"
PICKED = "Pairs of images of equal prompts, of which a person picked the better one."
JUDGED = "Images of which a person liked or disliked each by itself, with their prompts."

# Training advice for the cards, with numbers from the table of five kinds of pairs in benchmarks/studies/README.md.
ALIGNED_ADVICE = (
    "The chosen and the rejected image of these pairs share most of their content. Train on them with the default "
    "safeguard, `safeguard: parameter` with `safeguard_mu: 0.8`, and never without one: on a small test model, plain "
    "Diffusion-DPO raised the denoising error on chosen images tenfold to sixtyfold, and the tuned model's images "
    "were worse than the base model's. If the accuracy on held-out pairs stays near 0.5, raise the learning rate "
    "before you lower `safeguard_mu`."
)
NEGATIVES_ADVICE = (
    "Training on these pairs moves the model towards its own guided images, so that it needs less classifier-free "
    "guidance. Training with `swap_labels: true` gives a negative model for preference guidance, which generates what "
    "to avoid. No person or scorer has judged these pairs, so compare the tuned model with the base model."
)


def write_dataset(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    purpose: str,
    model: Candidate | None,
    facts: Mapping[str, object],
    advice: str = "",
) -> None:
    """Write `pairs.jsonl` and the dataset card, which the Hub shows as a page. A card that you edited is kept. Its
    metadata tell `load_dataset` that the pairs are in `pairs.jsonl`."""
    write_atomically(folder / PAIRS_FILE, json_lines(rows))
    named = {} if model is None else {"Model": _public_name(model)}
    _write_card(folder, purpose, {**named, **facts, "Pairs": len(rows)}, advice)


def _write_card(
    folder: Path, purpose: str, facts: Mapping[str, object], advice: str = "", *, table: str = PAIRS_FILE
) -> None:
    """Write the card of a folder, unless a person has written or edited one."""
    path = folder / CARD_FILE
    listed = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    front = f"---\nconfigs:\n- config_name: default\n  data_files: {table}\ntags:\n- preference\n---\n"
    command = f"trl-diffusion-sdpo train --dataset_name {folder.name} --model_name_or_path MODEL --use_peft"
    command += " --loss_type tgo" if table == IMAGES_FILE else ""
    parts = [f"# {folder.name}", purpose, listed, advice, f"Train with `{command}`."]
    text = front + "".join(f"\n{part}\n" for part in parts if part)
    if path.is_file() and not _is_generated(path):
        logger.info(
            "%s was edited or is of an earlier version, so it is kept. Delete it to get one with today's numbers.",
            path,
        )
        return
    write_atomically(path, f"{text}\n<!-- generated: {short_hash(text)} -->\n".encode())


def _is_generated(card: Path) -> bool:
    """Return whether a card is as `_write_card` wrote it."""
    text = card.read_text(encoding="utf-8", errors="replace")
    mark = _MARK.search(text)
    return mark is not None and short_hash(text[: mark.start()]) == mark[1]


def _public_name(model: Candidate) -> str:
    """Return a model's Hub id with its commit, or the last part of its path: a card must not show folders."""
    if not isinstance(model.model, str):
        return type(model.model).__name__
    names = [Path(name).name if Path(name).exists() else name for name in (model.model, model.lora) if name]
    commit = None if Path(model.model).exists() else hub_commit(model.model)
    return " with the LoRA ".join(names) + ("" if commit is None else f" (commit {commit})")


def push_pairs(folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> int:
    """Upload a folder's pairs, or its liked and disliked images, as a data set on the Hub, with the folder's card as
    its page. Metadata that tell of a photograph's place, time or owner (EXIF, XMP, IPTC) are not uploaded.

    Args:
        folder (`str` or `Path`): Output folder of `pairs pick` or `pairs generate`.
        repo_id (`str`): Hub id of the new data set, such as `me/my-taste`.
        private (`bool`, *optional*, defaults to `False`): Whether the data set is private, if this call creates it.
        token (`str`, *optional*): Hub token, by default that of `hf auth login`.

    Returns:
        `int`: Number of pairs, or of single images.

    Raises:
        `ValueError`: If the folder is missing or has no pairs.
        `PublishingError`: If the Hub refuses the upload or cannot be reached.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Pass the output folder of `pairs pick` or `pairs generate`.")
    pairs = load_pairs(folder)
    assert isinstance(pairs, datasets.Dataset)
    columns = [column for column in IMAGE_COLUMNS if column in pairs.column_names]
    for column in columns:
        pairs = pairs.cast_column(column, datasets.Image(decode=False))
    pairs = pairs.map(
        _without_metadata,
        input_columns=columns,
        fn_kwargs={"columns": columns},
        load_from_cache_file=False,  # the cache of `datasets` would not notice a changed file
        desc="Reading images",
    )
    for column in columns:
        pairs = pairs.cast_column(column, datasets.Image())
    if (folder / PICKS_FILE).is_file() and (log := PickLog(folder, read_only=True)).picks:
        is_single = "image" in pairs.column_names
        purpose, table, verdicts = (JUDGED, IMAGES_FILE, THUMBS) if is_single else (PICKED, PAIRS_FILE, SHARES)
        counts = {f"Picks: {verdict.replace('_', ' ')}": log.verdicts.get(verdict, 0) for verdict in verdicts}
        _write_card(folder, purpose, {**counts, "Images" if is_single else "Pairs": len(pairs)}, table=table)
    with explained_hub_errors(f"Uploading the pairs to {repo_id}"):
        pairs.push_to_hub(repo_id, private=private, token=token)
        card = DatasetCard.load(repo_id, token=token, ignore_metadata_errors=True)
        if (folder / CARD_FILE).is_file():
            text = DatasetCard.load(folder / CARD_FILE).text
            card.text = re.sub(r"(?m)^- (Pairs|Images): \d+$", rf"- \1: {len(pairs)}", text)
        card.data["tags"] = sorted({*(card.data.get("tags") or []), "preference", "trl-diffusion-sdpo"})
        card.push_to_hub(repo_id, token=token)
    return len(pairs)


def _without_metadata(*files: Mapping[str, Any], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return undecoded images with their files' contents, without metadata of photographs."""
    images = {}
    for name, file in zip(columns, files, strict=True):
        content = file["bytes"] or Path(file["path"]).read_bytes()
        try:
            images[name] = {"bytes": _stripped(content), "path": None}
        except Exception as error:  # decoders raise errors of any type
            raise UserError(
                f"Pairs can be uploaded only if all images can be read, and {file['path']} cannot: {error}. Remove its "
                "pairs."
            ) from error
    return images


def _stripped(content: bytes) -> bytes:
    """Return an image file without EXIF, XMP and IPTC, but with orientation, colour profile and the same pixels;
    unchanged if it has no such metadata."""
    with Image.open(io.BytesIO(content), formats=FILE_FORMATS) as image:
        exif = image.getexif()
        if not exif.keys() - {ExifTags.Base.Orientation} and not image.info.keys() & _PRIVATE:
            return content
        kept = Image.Exif()
        kept[ExifTags.Base.Orientation] = exif.get(ExifTags.Base.Orientation, 1)
        if image.format == "JPEG":
            return _jpeg_without_metadata(content, kept.tobytes())
        kind = "WEBP" if image.format == "WEBP" else "PNG"
        buffer = io.BytesIO()
        # PNG ignores `lossless`.
        image.save(buffer, kind, exif=kept, icc_profile=image.info.get("icc_profile"), lossless=True)
        return buffer.getvalue()


def _jpeg_without_metadata(content: bytes, exif: bytes) -> bytes:
    """Return a JPEG file with this EXIF in place of its metadata, without what some cameras append, such as a video
    with its place, and with the pixels not encoded anew."""
    kept = [content[:2], b"\xff\xe1", (len(exif) + 2).to_bytes(2, "big"), exif]
    start = 2
    while content[start : start + 2] != _JPEG_PIXELS:
        if content[start : start + 2] == _JPEG_FILL:
            start += 1
            continue
        end = start + 2 + int.from_bytes(content[start + 2 : start + 4], "big")
        if content[start + 1] not in _JPEG_METADATA:
            kept.append(content[start:end])
        start = end
    return b"".join([*kept, *content[start:].partition(_JPEG_END)[:2]])

"""Publish a folder of pairs on the Hub, with its card."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, Image
from huggingface_hub import DatasetCard

from ..data import load_pairs
from ..saving.publishing import explained_hub_errors
from .generate import CARD_FILE

IMAGE_COLUMNS = ("chosen", "rejected", "mask")


def push_pairs(folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> int:
    """Upload the pairs of a folder as a data set, images included, with the folder's card as its page.

    Args:
        folder (`str` or `Path`): Folder of `pairs pick` or `pairs generate`.
        repo_id (`str`): Name on the Hub, such as `me/my-taste`.
        private (`bool`, *optional*, defaults to `False`): Whether a new data set is private.
        token (`str`, *optional*): Token of the Hub; that of the login if unset.

    Returns:
        `int`: Number of pairs.

    Raises:
        `ValueError`: If the folder has no pairs.
        `PublishingError`: If the Hub refuses, or cannot be reached.
    """
    pairs = load_pairs(folder)
    assert isinstance(pairs, Dataset)
    for column in IMAGE_COLUMNS:
        if column in pairs.column_names:
            pairs = pairs.cast_column(column, Image())
    with explained_hub_errors(f"Uploading the pairs to {repo_id}"):
        pairs.push_to_hub(repo_id, private=private, token=token)
        card = DatasetCard.load(repo_id, token=token, ignore_metadata_errors=True)
        own = Path(folder) / CARD_FILE
        if own.is_file():
            card.text = DatasetCard.load(own).text
        card.data["tags"] = sorted({*(card.data.get("tags") or []), "preference", "trl-diffusion-sdpo"})
        card.push_to_hub(repo_id, token=token)
    return len(pairs)

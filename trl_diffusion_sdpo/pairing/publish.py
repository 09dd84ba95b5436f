"""Write a folder of pairs with its dataset card, and upload the folder to the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Image
from huggingface_hub import DatasetCard

from ..data import load_pairs
from ..evaluation import Candidate
from ..saving.publishing import explained_hub_errors
from ..utils.files import json_lines, write_atomically
from .picks import PAIRS_FILE

CARD_FILE = "README.md"
IMAGE_COLUMNS = ("chosen", "rejected", "mask")

# Training advice for the cards. Its numbers come from the section "Aligned pairs" of docs/measurements.md.
ALIGNED_ADVICE = (
    "The chosen and the rejected image of these pairs share most of their content. Train on these pairs with a strict "
    "safeguard: `safeguard: output` with `safeguard_mu: 0.9`, or `safeguard: parameter` with `safeguard_mu: 0.8`. Do "
    "not train on these pairs without a safeguard: on a small test model, plain Diffusion-DPO raised the denoising "
    "error on chosen images tenfold to fiftyfold, and the tuned model's images were worse than the base model's. If "
    "the accuracy on held-out pairs stays near 0.5, raise the learning rate before you lower `safeguard_mu`."
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
    model: Candidate,
    facts: Mapping[str, object],
    advice: str = "",
) -> None:
    """Write `pairs.jsonl` and, if the folder has no dataset card, the card. The Hub shows the card as a page.
    `load_dataset` reads from the card's metadata that the pairs are in `pairs.jsonl`."""
    write_atomically(folder / PAIRS_FILE, json_lines(rows))
    path = folder / CARD_FILE
    if path.exists():
        return
    name = model.model if isinstance(model.model, str) else type(model.model).__name__
    listed = "\n".join(f"- {key}: {value}" for key, value in {"Model": name, **facts, "Pairs": len(rows)}.items())
    front = f"---\nconfigs:\n- config_name: default\n  data_files: {PAIRS_FILE}\ntags:\n- preference\n---\n"
    command = f"trl-diffusion-sdpo train --dataset_name {folder.name} --model_name_or_path MODEL --use_peft"
    parts = [f"# {folder.name}", purpose, listed, advice, f"Train with `{command}`."]
    text = front + "".join(f"\n{part}\n" for part in parts if part)
    write_atomically(path, text.encode())


def push_pairs(folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> int:
    """Upload the pairs of a folder and their images as a data set on the Hub. The folder's card becomes the page of the
    data set.

    Args:
        folder (`str` or `Path`): Output folder of the command `pairs pick` or `pairs generate`.
        repo_id (`str`): Hub id of the new data set, such as `me/my-taste`.
        private (`bool`, *optional*, defaults to `False`): Whether a data set that this call creates is private.
        token (`str`, *optional*): Hub token. If unset, the token of `hf auth login` is used.

    Returns:
        `int`: Number of pairs.

    Raises:
        `ValueError`: If the folder has no pairs.
        `PublishingError`: If the Hub refuses the upload or cannot be reached.
    """
    pairs = load_pairs(folder)
    assert isinstance(pairs, Dataset)
    for column in IMAGE_COLUMNS:
        if column in pairs.column_names:
            pairs = pairs.cast_column(column, Image())
    with explained_hub_errors(f"Uploading the pairs to {repo_id}"):
        pairs.push_to_hub(repo_id, private=private, token=token)
        card = DatasetCard.load(repo_id, token=token, ignore_metadata_errors=True)
        local_card = Path(folder) / CARD_FILE
        if local_card.is_file():
            card.text = DatasetCard.load(local_card).text
        card.data["tags"] = sorted({*(card.data.get("tags") or []), "preference", "trl-diffusion-sdpo"})
        card.push_to_hub(repo_id, token=token)
    return len(pairs)

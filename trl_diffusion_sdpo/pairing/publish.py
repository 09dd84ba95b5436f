"""The card of a folder of pairs, and its publication on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset, Image
from huggingface_hub import DatasetCard

from ..data import load_pairs
from ..evaluation import Candidate
from ..saving.publishing import explained_hub_errors
from ..utils.files import write_atomically
from .picks import PAIRS_FILE

CARD_FILE = "README.md"
IMAGE_COLUMNS = ("chosen", "rejected", "mask")

# Training advice for the cards. The numbers are those of the section "Aligned pairs" in docs/measurements.md.
ALIGNED_ADVICE = (
    "Winner and loser of these pairs share most of their content. Train them with a strict safeguard: "
    "`safeguard: output` with `safeguard_mu: 0.9`, or `safeguard: parameter` with `safeguard_mu: 0.8`. Do not train "
    "them without a safeguard: plain Diffusion-DPO raised the error on the winners tenfold to fiftyfold in a small "
    "world, and its images became worse than the base model's. If the accuracy on held-out pairs stays near 0.5, raise "
    "the learning rate before you lower mu."
)
NEGATIVES_ADVICE = (
    "Trained as they are, these pairs move the model towards its own guided images, so that it needs less guidance. "
    "Trained with `swap_labels: true`, they give a model of what not to draw: the negative model of preference "
    "guidance. They hold no judgement of a person or a scorer, so compare the result with the base model."
)


def write_card(
    folder: Path, purpose: str, model: Candidate, facts: Mapping[str, object], pairs: int, advice: str = ""
) -> None:
    """Write the card of a folder's pairs, unless there is one. The Hub shows it, and `load_dataset` reads the files
    that it names."""
    path = folder / CARD_FILE
    if path.exists():
        return
    name = model.model if isinstance(model.model, str) else type(model.model).__name__
    listed = "\n".join(f"- {key}: {value}" for key, value in {"Model": name, **facts, "Pairs": pairs}.items())
    front = f"---\nconfigs:\n- config_name: default\n  data_files: {PAIRS_FILE}\ntags:\n- preference\n---\n"
    command = f"trl-diffusion-sdpo train --dataset_name {folder.name} --model_name_or_path MODEL --use_peft"
    parts = [f"# {folder.name}", purpose, listed, advice, f"Train with `{command}`."]
    text = front + "".join(f"\n{part}\n" for part in parts if part)
    write_atomically(path, text.encode())


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
        local_card = Path(folder) / CARD_FILE
        if local_card.is_file():
            card.text = DatasetCard.load(local_card).text
        card.data["tags"] = sorted({*(card.data.get("tags") or []), "preference", "trl-diffusion-sdpo"})
        card.push_to_hub(repo_id, token=token)
    return len(pairs)

"""Stacks B prepared pairs into one batch of 2B rows, winners first."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class PreferenceCollator:
    """Collates items of `PreferenceDataset` and `PreferenceIterableDataset`.

    Returns a `dict` with

    - `rows` (`torch.LongTensor` of shape `(B,)`): the first entry, by which accelerate and transformers find the batch
      size, here the number of pairs;
    - `pixel_values` (`torch.Tensor` of shape `(2B, 3, H, W)`, uint8): winners, then losers. The trainer converts them
      to floats in `[-1, 1]` on the device, one micro-batch at a time; another collator may return such floats;
    - `prompts` (`list[str]` of length B);
    - `original_sizes`, `crop_top_lefts` (`torch.LongTensor` of shape `(2B, 2)`): `(height, width)` and `(top, left)`;
    - `seeds` (`list[int]` of length B): on the host, where generators are seeded;
    - `scores` (`torch.FloatTensor` of shape `(2B,)`), where the data set has score columns.

    Raises:
        ValueError: If there are no items, or only some of them have scores.
    """

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        if not items:
            raise ValueError("A batch needs at least one pair, got none.")
        batch = {
            "rows": torch.tensor([item["row"] for item in items], dtype=torch.long),
            "pixel_values": torch.cat(torch.stack([item["pixel_values"] for item in items], dim=1).unbind()),
            "prompts": [item["prompt"] for item in items],
            "original_sizes": torch.tensor(_winners_first(items, "original_sizes"), dtype=torch.long),
            "crop_top_lefts": torch.tensor(_winners_first(items, "crop_top_lefts"), dtype=torch.long),
            "seeds": [item["seed"] for item in items],
        }
        scored = sum("scores" in item for item in items)
        if scored not in (0, len(items)):
            raise ValueError(f"Either all pairs of a batch have scores or none has, got {scored} of {len(items)}.")
        if scored:
            batch["scores"] = torch.tensor(_winners_first(items, "scores"), dtype=torch.float32)
        return batch


def _winners_first(items: list[dict[str, Any]], key: str) -> list[Any]:
    return [item[key][side] for side in (0, 1) for item in items]

"""The collator puts winners first and keeps every list in pair order."""

import torch

from trl_diffusion_sdpo.data.dataset import PreferenceCollator


def item(row, **extra):
    """A pair whose winner is filled with `row` and whose loser with `-row`."""
    pixels = torch.stack([torch.full((3, 4, 6), float(row)), torch.full((3, 4, 6), -float(row))])
    sizes, corners = ((row, 1), (row, 2)), ((row, 3), (row, 4))
    base = {"pixel_values": pixels, "prompt": f"prompt {row}", "original_sizes": sizes, "crop_top_lefts": corners}
    return base | {"seed": 2**63 - row, "row": row} | extra


def test_winners_come_first_then_losers():
    batch = PreferenceCollator()([item(1), item(2), item(3)])
    assert batch["pixel_values"].shape == (6, 3, 4, 6)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1, 2, 3, -1, -2, -3]
    assert batch["original_sizes"].tolist() == [[1, 1], [2, 1], [3, 1], [1, 2], [2, 2], [3, 2]]
    assert batch["crop_top_lefts"].tolist() == [[1, 3], [2, 3], [3, 3], [1, 4], [2, 4], [3, 4]]
    assert batch["original_sizes"].dtype == batch["crop_top_lefts"].dtype == torch.int64
    assert batch["prompts"] == ["prompt 1", "prompt 2", "prompt 3"]
    assert batch["rows"].tolist() == [1, 2, 3]
    assert next(iter(batch)) == "rows"  # counts B pairs, not 2B images
    assert batch["seeds"] == [2**63 - 1, 2**63 - 2, 2**63 - 3]
    assert "scores" not in batch

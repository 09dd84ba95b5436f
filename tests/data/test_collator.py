"""The collator puts winners first and keeps every list in pair order."""

import pytest
import torch

from trl_diffusion_sdpo.data.dataset import PreferenceCollator, padded


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


@pytest.mark.parametrize("first", [0, 1])
def test_items_with_different_entries_are_refused_in_any_order(first):
    """An entry that only some items have would be dropped, or miss from the others."""
    cached = {"moments": torch.zeros(2, 4), "target_size": (8, 8)}
    one, two = ({f"source_{i}": torch.zeros(1) for i in range(count)} for count in (1, 2))
    items = [item(1, conditioning=one, **cached), item(2, conditioning=two, **cached)]
    with pytest.raises(ValueError, match=r"conditioning\.source_1"):
        PreferenceCollator()([items[first], items[1 - first]])
    with pytest.raises(ValueError, match="masks"):
        PreferenceCollator()([item(1), item(2, masks=torch.ones(2, 1, 4, 6))][:: 1 - 2 * first])


def test_encodings_that_differ_in_more_than_their_length_are_refused():
    with pytest.raises(ValueError, match=r"\[4, 3, 2\]"):
        padded([torch.zeros(4, 2, 3), torch.zeros(4, 3, 2)])

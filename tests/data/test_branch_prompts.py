"""A prompt for each image: read from every style of data, dropped together, held out by the winner's."""

import pytest
import torch
from tiny_pairs import prepare
from torch.utils.data import DataLoader

from trl_diffusion_sdpo.data import PairMixture, PreferenceCollator


def two_prompts(pairs):
    """The pairs with the prompts "w 0" and "l 0" and so on."""
    count = len(pairs)
    pairs = pairs.remove_columns("prompt").add_column("chosen_prompt", [f"w {i}" for i in range(count)])
    return pairs.add_column("rejected_prompt", [f"l {i}" for i in range(count)])


@pytest.fixture
def pairs(make_pairs):
    return two_prompts(make_pairs(6))


def in_style(pairs, style):
    return {"table": pairs, "list": pairs.to_list(), "stream": pairs.to_iterable_dataset()}[style]


@pytest.mark.parametrize("style", ["table", "list", "stream"])
@pytest.mark.parametrize("swap", [False, True])
def test_each_image_has_its_own_prompt(pairs, make_pairs, style, swap):
    prepared = prepare(in_style(pairs, style), swap_labels=swap)
    plain = prepare(make_pairs(6), swap_labels=swap)
    items = list(prepared) if style == "stream" else [prepared[index] for index in range(6)]
    assert prepared.has_loser_prompts and len(items) == 6
    for index, item in enumerate(items):
        expected = (f"l {index}", f"w {index}") if swap else (f"w {index}", f"l {index}")
        assert (item["prompt"], item["loser_prompt"]) == expected
        assert torch.equal(item["pixel_values"], plain[index]["pixel_values"])
        assert item["seed"] == plain[index]["seed"]


def test_a_batch_has_the_prompts_of_the_winners_first(pairs):
    prepared = prepare(pairs)
    batch = PreferenceCollator()([prepared[0], prepared[1]])
    assert batch["prompts"] == ["w 0", "w 1", "l 0", "l 1"]


@pytest.mark.parametrize("style", ["table", "stream"])
def test_both_prompts_of_a_pair_are_dropped_or_none(pairs, make_pairs, style):
    """The same pairs drop theirs as with one prompt a pair."""
    dropped = set()
    plain = prepare(in_style(make_pairs(6), style), prompt_dropout=0.5)
    prepared = prepare(in_style(pairs, style), prompt_dropout=0.5)
    for epoch in range(4):
        plain.set_epoch(epoch)
        prepared.set_epoch(epoch)
        ours, theirs = (
            list(data) if style == "stream" else [data[index] for index in range(6)] for data in (prepared, plain)
        )
        for item, other in zip(ours, theirs, strict=True):
            dropped.add(item["prompt"] == "")
            assert (item["prompt"] == "") == (item["loser_prompt"] == "") == (other["prompt"] == "")
    assert dropped == {True, False}
    assert all(item["prompt"] and item["loser_prompt"] for item in iter(prepared.for_evaluation()))


@pytest.mark.parametrize("style", ["table", "stream"])
def test_in_a_mixture_all_losers_have_a_prompt(pairs, make_pairs, style):
    parts = [in_style(pairs, style), in_style(make_pairs(2), style)]
    prepared = prepare(PairMixture(parts))
    loaded = DataLoader(prepared, batch_size=None)
    both = {(item["prompt"], item["loser_prompt"]) for item in loaded}
    assert both == {*((f"w {i}", f"l {i}") for i in range(6)), ("prompt 0",) * 2, ("prompt 1",) * 2}
    if style == "table":
        assert prepared.prompts() == {text for texts in both for text in texts}

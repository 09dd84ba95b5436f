"""Columns that a setting needs are checked before any image is read, for tables and streams."""

import datasets
import pytest
from tiny_pairs import png, prepare

from trl_diffusion_sdpo.data import PairMixture
from trl_diffusion_sdpo.data.images import ImageReader

SCORES = {"chosen_score": 1.0, "rejected_score": 0.0}
STYLES = {"table": lambda rows: rows, "stream": datasets.Dataset.to_iterable_dataset}


def pairs(**columns):
    rows = [{"prompt": f"p{i}", "chosen": png(i), "rejected": png(9 + i), **columns} for i in range(3)]
    return datasets.Dataset.from_list(rows)


@pytest.fixture
def read(monkeypatch):
    """Images that were opened."""
    opened = []
    monkeypatch.setattr(ImageReader, "decode", lambda _, value: opened.append(value))
    monkeypatch.setattr(ImageReader, "size", lambda _, value: opened.append(value))
    return opened


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("need", "setting"), [("needs_scores", "pair_weights"), ("needs_masks", "mask_anchor=3.0")])
def test_missing_columns_are_refused_with_the_setting_that_needs_them(style, need, setting, read):
    with pytest.raises(ValueError, match=setting):
        prepare(STYLES[style](pairs()), verify_images="all", **{need: setting})
    assert not read


@pytest.mark.parametrize("style", STYLES)
def test_scores_that_are_needed_and_there_are_read(style):
    prepared = prepare(STYLES[style](pairs(**SCORES)), needs_scores="`pair_weights`")
    assert next(iter(prepared))["scores"] == (1.0, 0.0)


def test_permuted_losers_have_no_scores(read):
    with pytest.raises(ValueError, match="`pair_weights`"):
        prepare(pairs(**SCORES), needs_scores="`pair_weights`", losers="permute")
    assert not read


@pytest.mark.parametrize("style", STYLES)
def test_scores_in_only_some_data_sets_are_refused_with_the_name_of_the_others(style):
    parts = {"scored": STYLES[style](pairs(**SCORES)), "plain": STYLES[style](pairs())}
    with pytest.raises(ValueError, match="plain"):
        prepare(PairMixture(parts))


def test_a_stream_is_refused_for_a_setting_that_reads_all_rows_first(read):
    stream = pairs().to_iterable_dataset()
    with pytest.raises(ValueError, match="`precompute_latents`.*train data are a stream"):
        prepare(stream, needs_all_rows=["`precompute_latents`"])
    assert len(prepare(pairs(), needs_all_rows=["`precompute_latents`"], verify_images="none")) == 3
    assert not read

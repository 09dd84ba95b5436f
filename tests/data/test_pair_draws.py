"""An item depends on seed, epoch and row alone, and epochs and shards reach DataLoader workers."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pairs import STYLES, bad_rows, canonical, in_style, items_of, prepare, same
from torch.utils.data import DataLoader


def scene(seed, size=(40, 24)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def oblong(count=6):
    return [{"prompt": f"p{i}", "chosen": scene(i), "rejected": scene(100 + i, (30, 50))} for i in range(count)]


@pytest.mark.parametrize("style", STYLES)
def test_an_item_depends_on_seed_epoch_and_row_only(style):
    options = {"center_crop": False, "random_flip": True, "prompt_dropout": 0.5}
    first, second = (prepare(in_style(oblong(), style), **options, seed=7) for _ in range(2))
    torch.manual_seed(0)
    expected = items_of(first)
    torch.manual_seed(99)
    np.random.seed(5)
    second.set_epoch(3)
    later = items_of(second)
    second.set_epoch(0)
    assert all(same(a, b) for a, b in zip(expected, items_of(second), strict=True))
    assert all(a["seed"] != b["seed"] for a, b in zip(expected, later, strict=True))
    other = items_of(prepare(in_style(oblong(), style), **options, seed=8))
    assert all(a["seed"] != b["seed"] for a, b in zip(expected, other, strict=True))


def test_random_settings_do_not_disturb_each_other():
    plain = items_of(prepare(oblong(), center_crop=False))
    flipped = items_of(prepare(oblong(), center_crop=False, random_flip=True, prompt_dropout=0.5))
    assert [item["crop_top_lefts"] for item in plain] == [item["crop_top_lefts"] for item in flipped]
    assert [item["seed"] for item in plain] == [item["seed"] for item in flipped]


def test_prompt_dropout_empties_about_its_share_of_prompts():
    rows = canonical(1) * 400
    share = np.mean(
        [item["prompt"] == "" for item in items_of(prepare(rows, prompt_dropout=0.2, verify_images="none"))]
    )
    assert abs(share - 0.2) < 0.08  # four standard errors
    assert all(item["prompt"] == "" for item in items_of(prepare(canonical(3), prompt_dropout=1.0)))


@pytest.mark.parametrize("style", ["arrow", "stream"])
def test_evaluation_center_crops_and_ignores_the_epoch(style):
    prepared = prepare(
        in_style(oblong(), style), center_crop=False, random_flip=True, prompt_dropout=1.0, training=False
    )
    before = items_of(prepared)
    assert before[0]["crop_top_lefts"] == ((5, 0), (0, 5))  # 40x24 -> 26x16, 30x50 -> 16x26; five of ten to each side
    assert before[0]["original_sizes"] == ((40, 24), (30, 50))
    assert [item["prompt"] for item in before] == [f"p{i}" for i in range(6)]
    prepared.set_epoch(5)
    assert all(same(a, b) for a, b in zip(before, items_of(prepared), strict=True))


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.matrix)])
def test_the_epoch_reaches_persistent_workers(context):
    prepared = prepare(datasets.Dataset.from_list(canonical(4)))
    expected = []
    for epoch in range(2):
        prepared.set_epoch(epoch)
        expected.append([prepared[i]["seed"] for i in range(4)])
    prepared.set_epoch(0)
    workers = 2 if context == "fork" else 1
    loader = DataLoader(
        prepared, batch_size=None, num_workers=workers, persistent_workers=True, multiprocessing_context=context
    )
    for epoch in (0, 1, 0):
        prepared.set_epoch(epoch)
        assert [item["seed"] for item in loader] == expected[epoch]


def test_workers_of_a_stream_divide_its_shards_and_have_different_row_numbers():
    stream = datasets.Dataset.from_list(bad_rows() * 2).to_iterable_dataset(num_shards=2)
    prepared = prepare(stream)
    for _ in range(2):
        items = list(DataLoader(prepared, batch_size=None, num_workers=2))
        assert sorted(item["prompt"] for item in items) == ["fine", "fine", "good", "good"]
        assert len({item["row"] for item in items}) == 4
        report = prepared.report
        assert (report.rows, report.pairs, report.undecodable, report.bad_prompts) == (14, 4, 8, 2)

"""The order of a curriculum, and the random numbers of pairs that it takes again."""

import pickle
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from trl_diffusion_sdpo.data import PairDraws, PairTransform, prepare_dataset
from trl_diffusion_sdpo.data.buckets import TakenAgain
from trl_diffusion_sdpo.data.curriculum import CURRICULUM, STAGES, CurriculumSampler


def order_of(gaps, epochs, epoch, seed=5):
    return list(CurriculumSampler(np.array(gaps, dtype=float), epochs, seed=seed, epoch=lambda: epoch))


def shuffled(pairs, stage, epoch, seed=5):
    """Endless rounds over pairs, as an independent reading of the rule."""
    generator = np.random.default_rng([seed, epoch, stage, CURRICULUM])
    while True:
        yield from (pairs[place] for place in generator.permutation(len(pairs)))


def test_pairs_enter_in_stages_from_the_largest_gap():
    """Four pairs in four stages over two epochs, two indices a stage: of the largest gap alone, of two pairs, and in
    the second epoch of three and of four."""
    gaps = [1.0, 4.0, 3.0, 2.0]  # they enter as 1, 2, 3, 0
    expected = {}
    for epoch, stages in ((0, (0, 1)), (1, (2, 3))):
        rounds = [shuffled([1, 2, 3, 0][: stage + 1], stage, epoch) for stage in stages]
        expected[epoch] = [next(pairs) for pairs in rounds for _ in range(2)]
        assert order_of(gaps, 2, epoch) == expected[epoch]
    assert expected[0][:2] == [1, 1] and set(expected[0][2:]) == {1, 2}
    assert set(expected[1][:2]) < {1, 2, 3}
    assert sorted(order_of(gaps, 2, 2)) == [0, 1, 2, 3]


def test_an_epoch_keeps_its_length_and_after_the_curriculum_each_pair_comes_once():
    gaps = np.random.default_rng(0).random(37)
    for epochs in (0.05, 0.3, 1, 2.5):
        for epoch in range(5):
            order = order_of(gaps, epochs, epoch)
            assert len(order) == 37
            if epoch >= epochs:
                assert sorted(order) == list(range(37)) and {type(pair) for pair in order} == {int}


@pytest.mark.parametrize("epochs", [0.5, 1, 3])
def test_no_pair_comes_before_its_stage(epochs):
    pairs = 40
    gaps = np.random.default_rng(1).permutation(pairs).astype(float)
    for epoch in range(4):
        for place, pair in enumerate(order_of(gaps, epochs, epoch)):
            stage = min(STAGES - 1, int((epoch * pairs + place) / (epochs * pairs) * STAGES))
            rank = int((gaps > gaps[pair]).sum())
            assert rank < pairs * (stage + 1) / STAGES


def test_within_a_stage_all_pairs_come_before_one_comes_again():
    """Of 20 pairs over 3 epochs, each stage has 6 indices: 3 rounds of 2 pairs first."""
    order = order_of(np.arange(20.0), 3, 0)
    for start in (0, 2, 4):
        assert set(order[start : start + 2]) == {18, 19}
    assert Counter(order[6:10]) == Counter([16, 17, 18, 19])


def test_a_pair_knows_how_often_its_epoch_has_taken_it():
    order = order_of([2.0, 1.0], 4, 0)  # one stage of four indices: the epoch's two are of pair 0
    assert order == [0, 0]
    assert type(order[0]) is int and isinstance(order[1], TakenAgain) and order[1].times == 1
    sent = pickle.loads(pickle.dumps(order[1]))
    assert (sent, sent.times) == (0, 1) and isinstance(sent, TakenAgain)
    times = Counter()
    for pair in order_of(np.arange(30.0), 2, 0):
        assert (pair.times if isinstance(pair, TakenAgain) else 0) == times[int(pair)]
        times[int(pair)] += 1


def test_equal_gaps_enter_in_the_order_of_the_data():
    assert order_of([1.0, 3.0, 3.0], 3, 0)[0] == 1


def test_seeds_and_epochs_have_orders_of_their_own_and_the_same_again():
    gaps = np.arange(30.0)
    orders = [order_of(gaps, 0.1, epoch, seed) for epoch, seed in ((1, 5), (2, 5), (1, 6))]
    assert orders[0] == order_of(gaps, 0.1, 1)
    assert orders[0] != orders[1] and orders[0] != orders[2]


# ---- Items --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs():
    generator = np.random.default_rng(0)
    image = lambda: Image.fromarray(generator.integers(0, 256, (24, 20, 3), dtype=np.uint8))  # noqa: E731
    rows = [{"prompt": f"p{i}", "chosen": image(), "rejected": image()} for i in range(6)]
    transform = PairTransform(16, center_crop=False, random_flip=True)
    return prepare_dataset(datasets.Dataset.from_list(rows), transform=transform, seed=9)


def test_a_pair_that_is_taken_again_has_draws_of_its_own():
    draws = [PairDraws.from_key(9, 2, 4, times) for times in range(4)]
    assert len({each.seed for each in draws}) == 4 and len({each.flip for each in draws}) == 4
    others = {PairDraws.from_key(9, epoch, row).seed for epoch in range(8) for row in range(8)}
    assert not others & {each.seed for each in draws[1:]}


def test_the_draws_of_a_pair_that_is_taken_once_are_those_of_a_run_without_a_curriculum(pairs):
    """`numpy`'s generator of the key of before."""
    generator = np.random.default_rng([9, 0, 3])
    top, left, flip, dropout = generator.random(4)
    assert PairDraws.from_key(9, 0, 3) == PairDraws(top, left, flip, dropout, int(generator.integers(0, 2**63)))
    assert pairs[3]["seed"] == PairDraws.from_key(9, 0, 3).seed


def test_items_of_a_pair_that_is_taken_again_differ_in_noise_and_crop(pairs):
    first, again = pairs[3], pairs[TakenAgain(3, 1)]
    assert first["row"] == again["row"] == 3 and first["prompt"] == again["prompt"]
    assert again["seed"] == PairDraws.from_key(9, 0, 3, 1).seed != first["seed"]
    crops = {pairs[TakenAgain(3, times) if times else 3]["crop_top_lefts"] for times in range(12)}
    assert len(crops) > 1
    assert pairs[3]["seed"] == first["seed"]  # nothing stays behind


def test_workers_make_the_items_of_this_process(pairs):
    order = [0, TakenAgain(0, 1), 5, TakenAgain(0, 2)]
    here, there = (
        list(DataLoader(pairs, sampler=order, batch_size=2, collate_fn=list, num_workers=workers))
        for workers in (0, 1)
    )
    items = [[item for batch in batches for item in batch] for batches in (here, there)]
    assert [item["seed"] for item in items[0]] == [item["seed"] for item in items[1]]
    assert len({item["seed"] for item in items[0]}) == 4
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(*items, strict=True))

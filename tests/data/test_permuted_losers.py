"""Losers from other rows: of another prompt, each once in an epoch, the same in every process."""

import pickle

import datasets
import pytest
from tiny_pairs import JUNK, png

from trl_diffusion_sdpo.data import PairOptions, PairTransform, prepare_dataset
from trl_diffusion_sdpo.data.data_report import PERMUTED

PROMPTS = ["a", "b", "a", "c", "a", "b", "a", "d"]  # half of them are "a"


def captions(prompts=PROMPTS, bad=(), **columns):
    """Row i has an image of the grey level i + 1."""
    return [{"text": text, "image": JUNK if i in bad else png(i + 1), **columns} for i, text in enumerate(prompts)]


def prepare(rows, losers="permute", random_flip=False, center_crop=True, **options):
    transform = PairTransform(16, center_crop=center_crop, random_flip=random_flip)
    rows = datasets.Dataset.from_list(rows) if isinstance(rows, list) and isinstance(rows[0], dict) else rows
    return prepare_dataset(rows, PairOptions(transform, losers=losers, **options))


def levels(prepared):
    """(prompt, winner's grey level, loser's) of every item."""
    items = [prepared[index] for index in range(len(prepared))]
    return [(item["prompt"], *item["pixel_values"][:, 0, 0, 0].tolist()) for item in items]


def check(triples, prompts=PROMPTS):
    """Every image once as winner of its own prompt and once as loser of another."""
    assert [(prompt, winner) for prompt, winner, _ in triples] == [(p, i + 1) for i, p in enumerate(prompts)]
    assert sorted(loser for *_, loser in triples) == list(range(1, len(prompts) + 1))
    assert all(prompts[loser - 1] != prompt for prompt, _, loser in triples)


@pytest.mark.parametrize("style", ["table", "list"])
def test_captions_are_pairs_with_losers_of_other_prompts_drawn_in_every_epoch(style):
    prepared = prepare(captions() if style == "table" else tuple(captions()))
    drawn = []
    for epoch in range(20):
        prepared.set_epoch(epoch)
        triples = levels(prepared)
        check(triples)
        drawn.append(tuple(loser for *_, loser in triples))
    assert len(set(drawn)) > 15  # of 4! 4! = 576
    prepared.set_epoch(3)
    assert tuple(loser for *_, loser in levels(prepared)) == drawn[3]
    assert PERMUTED in str(prepared.report) and prepared.report.format == "captioned"


def test_the_seed_decides_and_a_copy_in_another_process_agrees():
    first, other, same = (prepare(captions([str(i) for i in range(30)]), seed=seed) for seed in (1, 2, 1))
    assert levels(first) != levels(other) and levels(first) == levels(same)
    first.set_epoch(4)
    same.set_epoch(4)
    assert levels(first) == levels(pickle.loads(pickle.dumps(first))) == levels(same)


def test_an_evaluation_has_the_losers_of_the_first_epoch():
    prepared = prepare(captions())
    expected = levels(prepared)
    prepared.set_epoch(7)
    assert levels(prepared) != expected
    assert levels(prepared.for_evaluation()) == expected == levels(prepare(captions(), training=False))


def test_of_pairs_the_winners_alone_are_read():
    """The labels choose the winner; the published losers cannot even be decoded."""
    rows = [
        {"caption": "a", "jpg_0": png(1), "jpg_1": JUNK, "label_0": 1.0, "label_1": 0.0},
        {"caption": "b", "jpg_0": JUNK, "jpg_1": png(2), "label_0": 0.0, "label_1": 1.0},
        {"caption": "c", "jpg_0": png(3), "jpg_1": JUNK, "label_0": 1.0, "label_1": 0.0},
    ]
    for verify in ("sample", "all", "none"):
        prepared = prepare(rows, verify_images=verify)
        check(levels(prepared), ["a", "b", "c"])
        assert prepared.report.undecodable == 0
    assert not prepared.has_scores


@pytest.mark.parametrize("verify", ["none", "sample"])
def test_an_image_that_cannot_be_decoded_is_replaced_alike_whoever_reads_first(verify):
    """Row 1 is bad. Pair 1 is replaced by pair 2; whose loser it would be gets the next image of another prompt."""
    prompts = [str(number) for number in range(6)]
    expected = None
    for order in (range(6), reversed(range(6)), [4, 1, 0, 5, 2, 3]):
        prepared = prepare(captions(prompts, bad={1}), verify_images=verify)
        read = {index: prepared[index] for index in order}
        triples = [(item["row"], *item["pixel_values"][:, 0, 0, 0].tolist()) for _, item in sorted(read.items())]
        assert expected in (None, triples)
        expected = triples
    good = prepare(captions(prompts), verify_images="none")
    for row, _, loser in expected:
        own = levels(good)[row][2]
        following = [(own - 1 + step) % 6 + 1 for step in range(6)]
        assert loser == next(level for level in following if level != 2 and level != row + 1)
    assert [row for row, *_ in expected] == [0, 2, 2, 3, 4, 5]
    assert prepared.report.undecodable == 1 and prepared.undecodable.tolist() == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(("prompts", "said"), [("aaab", "'a' has 3 of 4"), ("b", "'b' has 1 of 1")])
def test_more_than_half_of_one_prompt_is_refused_with_its_share(prompts, said):
    with pytest.raises(ValueError, match=said):
        prepare(captions(list(prompts)))


def test_captions_need_permuted_losers():
    for rows in (captions(), datasets.Dataset.from_list(captions()).to_iterable_dataset()):
        with pytest.raises(ValueError, match="`losers='permute'`"):
            prepare(rows, losers="data")


def test_what_cannot_be_permuted_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="a stream"):
        prepare(datasets.Dataset.from_list(captions()).to_iterable_dataset())

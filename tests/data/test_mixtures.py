"""Several data sets at once: each in its own format, in the shares of their weights, map-style and as streams."""

import math
from collections import Counter
from itertools import islice

import datasets
import pytest
from tiny_pairs import png, prepare

from trl_diffusion_sdpo.data.mixtures import PairMixture


def picks(count=6, **changed):
    """Pick-a-Pic's columns; row 1 is a tie."""
    rows = [
        {"caption": f"pick {i}", "jpg_0": png(i), "jpg_1": png(100 + i), "label_0": 0.5 if i == 1 else 1.0, **changed}
        for i in range(count)
    ]
    return datasets.Dataset.from_list(rows)


def rankings(prompts=2, images=3):
    """ImageRewardDB's columns: the pairs of three images each."""
    rows = [
        {"prompt_id": str(i // images), "prompt": f"rank {i // images}", "image": png(i), "rank": i % images}
        for i in range(prompts * images)
    ]
    return datasets.Dataset.from_list(rows)


def canonical(count=2, **changed):
    rows = [{"prompt": f"own {i}", "chosen": png(i), "rejected": png(200 + i), **changed} for i in range(count)]
    return datasets.Dataset.from_list(rows)


def kinds(items):
    return Counter(item["prompt"].split()[0] for item in items)


def outline(item):
    return item["prompt"], item["row"], item["seed"]


def test_a_list_of_data_sets_is_one_set_with_every_pair_once():
    parts = [picks(), rankings(), canonical()]
    mixed = prepare(PairMixture(parts))
    alone = [pixels for part in parts for pixels in items_of(prepare(part))]
    assert [prompt for prompt, _ in items_of(mixed)] == [prompt for prompt, _ in alone]
    assert all((one[1] == other[1]).all() for one, other in zip(items_of(mixed), alone, strict=True))
    assert [item["row"] for item in mixed] == list(range(len(mixed))) and len(mixed) == 5 + 6 + 2
    assert mixed.report.rows == 6 + 6 + 2 and mixed.report.ties == 1
    assert mixed.report.format == "pickapic+imagerewarddb+canonical"
    assert mixed.report.examples["ties"] == [(1, "images judged equal (train (set 0), row 1)")]
    assert mixed.prompts() == {item["prompt"] for item in mixed}


def items_of(prepared):
    return [(item["prompt"], item["pixel_values"].numpy()) for item in prepared]


@pytest.mark.parametrize("weights", [(3, 1), (0.1, 0.7)])
def test_weights_are_the_shares_of_an_epoch_which_has_every_pair(weights):
    mixed = prepare(PairMixture({"a": picks(), "own": canonical(4)}, weights), verify_images="none")
    counts, share = kinds(mixed), weights[0] / sum(weights)
    assert abs(counts["pick"] - share * len(mixed)) <= 1
    assert len({item["prompt"] for item in mixed}) == 5 + 4
    each = Counter(item["prompt"] for item in mixed)
    for start in ("pick", "own"):
        times = [count for prompt, count in each.items() if prompt.startswith(start)]
        assert max(times) - min(times) <= 1
    assert 5 in counts.values() or 4 in counts.values(), "one of the sets is not repeated"


def test_a_repeated_pair_has_random_numbers_of_its_own():
    mixed = prepare(PairMixture([picks(), canonical(1)], (1, 1)))
    own = [item for item in mixed if item["prompt"] == "own 0"]
    assert len(own) == 5 and len({item["seed"] for item in own}) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "needs at least one data set, got none"),
        (([picks(2)], (1, 2)), "`weights` must have one entry for each of the 1 data sets"),
        (([picks(2), picks(2)], (1, -1)), "`weights` must be above 0"),
        (([picks(2), picks(2)], (1, math.nan)), "`weights` must be above 0"),
        (([picks(2)], None, ["canonical", None]), "`formats` must have one entry for each"),
        (([picks(2), picks(2).to_iterable_dataset()],), "streams or only map-style data sets, got both"),
        (([picks(2), picks(2, label_0=0.5)],), "set 1"),
        (([picks(2), picks(2).select([])],), r"The train \(set 1\) data set is empty"),
        (([picks(2), canonical()], None, [None, "hpdv3"]), "`dataset_format='hpdv3'` needs hpdv3"),
        (
            ([canonical(), canonical(chosen_score=1.0, rejected_score=0.0)],),
            r"\['train \(set 0\)'\]",
        ),
    ],
)
def test_bad_mixtures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(PairMixture(*arguments))


# ---- Streams --------------------------------------------------------------------------------------------------------


def stream(weights=(3, 1), shards=1, repeat=True):
    parts = {"a": picks(9), "b": rankings(3), "c": canonical(5)}
    streams = {name: part.to_iterable_dataset(num_shards=shards) for name, part in parts.items()}
    return prepare(PairMixture(streams, (*weights, 1)), repeat=repeat, training=repeat)


def test_streams_are_mixed_by_weight_with_every_format_read_in_its_own_way():
    counts = kinds(islice(iter(stream((6, 1))), 600))
    # A group of rankings has three pairs.
    assert counts["pick"] / 600 == pytest.approx(6 * 8 / 9 / (6 * 8 / 9 + 3 + 1), abs=0.07)
    assert counts["rank"] / 600 == pytest.approx(3 / (6 * 8 / 9 + 3 + 1), abs=0.07)


def test_an_evaluation_has_every_pair_of_the_streams_once():
    items = list(stream(repeat=False))
    assert Counter(kinds(items)) == {"pick": 8, "rank": 9, "own": 5}
    assert len({(item["prompt"], item["pixel_values"].sum().item()) for item in items}) == 22


def test_the_mixture_depends_on_seed_and_epoch_and_on_nothing_else():
    first = [outline(item) for item in islice(iter(stream()), 60)]
    assert [outline(item) for item in islice(iter(stream()), 60)] == first
    other = prepare(PairMixture([picks(9).to_iterable_dataset(), canonical(5).to_iterable_dataset()]), repeat=True)
    again = prepare(
        PairMixture([picks(9).to_iterable_dataset(), canonical(5).to_iterable_dataset()]), repeat=True, seed=7
    )
    assert [item["prompt"] for item in islice(iter(other), 30)] != [item["prompt"] for item in islice(iter(again), 30)]


def test_weights_that_repeat_pairs_too_often_are_refused():
    with pytest.raises(ValueError, match="weights"):
        prepare(PairMixture([picks(), picks()], [1e-20, 1]))

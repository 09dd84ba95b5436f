"""Sizes of aspect-ratio buckets, the bucket of each pair and the order of pairs, against values by hand and published
lists."""

import numpy as np
import pytest
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN

from trl_diffusion_sdpo.data.buckets import AspectRatioBuckets, BucketSampler, PairSizes

AT_1024 = [
    *[(704, 1408), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024)],
    *[(1088, 960), (1152, 896), (1216, 832), (1344, 768), (1408, 704)],
]


def assigned(buckets, winner, loser):
    """The size of a pair whose images have these `(height, width)`."""
    return buckets.sizes[int(buckets.assign(np.array([[*winner, *loser]]))[0])]


def test_the_sizes_at_1024_are_among_those_of_sdxl():
    """diffusers' list at 1024 pixels is SDXL's, without those that differ little from another."""
    assert list(AspectRatioBuckets((1024, 1024)).sizes) == AT_1024
    assert set(AT_1024) <= {(int(height), int(width)) for height, width in ASPECT_RATIO_1024_BIN.values()}


def test_the_sizes_at_512_are_worked_out_by_hand():
    """Sides of 64: 448 * 585 is the area, so 576; 384 * 682, so 640; 320 may have 640 only, four fifths of it."""
    assert AspectRatioBuckets((512, 512)).sizes == ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))
    ratios = [float(ratio) for ratio in ASPECT_RATIO_512_BIN]
    assert min(ratios) < 384 / 640 and max(ratios) > 640 / 384


def test_what_leaves_one_size_or_cuts_the_resolution_is_refused():
    with pytest.raises(ValueError, match="step=512"):
        AspectRatioBuckets((512, 512), step=512)
    with pytest.raises(ValueError, match=r"aspect ratio of `resolution`, 2\.67"):
        AspectRatioBuckets((384, 1024), max_aspect_ratio=2.0)


@pytest.mark.parametrize(
    ("winner", "loser", "expected"),
    [
        ((1024, 1024), (1024, 1024), (1024, 1024)),
        ((832, 1216), (416, 608), (832, 1216)),  # one ratio at two sizes
        ((3000, 4000), (768, 1024), (896, 1152)),  # 3:4 is 0.75; 896/1152 is 0.778, 832/1216 is 0.684
        # A wide and a high image, mirrored: the mean is the square, and both lose equally.
        ((512, 1024), (1024, 512), (1024, 1024)),
        # 1:1 and 9:16: the mean ratio is 0.75.
        ((512, 512), (1080, 1920), (896, 1152)),
        # Both beyond the list: its end.
        ((100, 900), (100, 1000), (704, 1408)),
        ((900, 100), (1000, 100), (1408, 704)),
        # Exactly halfway between two buckets: the squarer one, upright and lying.
        ((1024, 1024), (960, 1088), (1024, 1024)),
        ((1024, 1024), (1088, 960), (1024, 1024)),
        ((896, 1152), (960, 1088), (960, 1088)),
        ((1152, 896), (1088, 960), (1088, 960)),
    ],
)
def test_a_pair_gets_the_bucket_nearest_to_the_mean_of_its_ratios(winner, loser, expected):
    buckets = AspectRatioBuckets((1024, 1024))
    assert assigned(buckets, winner, loser) == assigned(buckets, loser, winner) == expected


def sampler(numbers, group, *, epoch=0, **options):
    sizes = tuple((16 + 2 * i, 16) for i in range(4))
    return BucketSampler(PairSizes(sizes, np.array(numbers, dtype=np.uint16)), group, seed=3, epoch=epoch, **options)


def pairs_of(keys):
    return [key.pair for key in keys]


def test_groups_come_where_their_first_pair_is_and_are_filled_from_the_bucket():
    """In order: pairs 0 and 2, then 1 and 3, then 4 alone (bucket 0, filled with 0), then 5 alone with itself."""
    keys = list(sampler([0, 1, 0, 1, 0, 3], 2, epoch=None))
    assert pairs_of(keys) == [0, 2, 1, 3, 4, 0, 5, 5]
    assert [key.is_repeated for key in keys] == [False] * 5 + [True, False, True]
    assert pairs_of(sampler([0, 1, 0, 1, 0, 3], 2, epoch=None, drop_last=True)) == [0, 2, 1, 3]


def test_every_group_has_one_size_and_every_pair_comes_once():
    numbers = np.random.default_rng(1).choice(4, 501, p=[0.6, 0.3, 0.09, 0.01])
    for group in (1, 4, 7):
        sampled = sampler(numbers, group, epoch=lambda: 5)
        order = pairs_of(sampled)
        assert len(order) == len(sampled) and len(order) % group == 0
        assert all(len(set(numbers[order[start : start + group]])) == 1 for start in range(0, len(order), group))
        real = [key.pair for key in sampled if not key.is_repeated]
        assert sorted(real) == list(range(501))
        dropping = sampler(numbers, group, epoch=lambda: 5, drop_last=True)
        complete = pairs_of(dropping)
        assert len(complete) == len(dropping) == sum(count // group * group for count in np.bincount(numbers))
        assert [pair for pair in real if pair in set(complete)] == complete


def test_the_order_depends_on_seed_and_epoch_and_mixes_the_buckets():
    numbers = [0, 1] * 200
    first = pairs_of(sampler(numbers, 4, epoch=lambda: 0))
    assert first == pairs_of(sampler(numbers, 4, epoch=lambda: 0)) != pairs_of(sampler(numbers, 4, epoch=lambda: 1))
    buckets = np.array(numbers)[first[::4]]
    assert 20 < np.count_nonzero(np.diff(buckets)) < 80  # of 99 neighbours; half of them at random


def test_an_order_without_a_batch_is_refused():
    with pytest.raises(ValueError, match="a step needs 4 pairs"):
        sampler([0, 0, 0, 1], 4, drop_last=True)

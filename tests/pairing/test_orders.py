"""The choice of the next pair to compare."""

import itertools

from trl_diffusion_sdpo.pairing.orders import Group


def test_unseen_images_come_first_then_close_ratings():
    group = Group("abcd")
    compared = []
    seen = []
    while group.offers:
        _, first, second = group.offers[0]
        seen.append({first, second})
        compared.append((first, second, float(first < second)))  # a is the best
        group = Group(group.names, compared)
    assert seen[0] | seen[1] == set("abcd")
    names, _, uncertain = zip(*group.ranking(), strict=True)
    assert names == tuple("abcd") and not any(uncertain)
    assert len(seen) < 6 and {"a", "d"} not in seen  # the best and the worst are clear from other picks


def test_the_order_of_many_images_takes_fewer_picks_than_pairs():
    group = Group(range(12))
    compared = []
    while group.offers:
        _, first, second = group.offers[0]
        compared.append((first, second, float(first > second)))
        group = Group(group.names, compared)
    assert [name for name, _, _ in group.ranking()] == list(range(12))[::-1]
    assert len(compared) < 0.7 * len(list(itertools.combinations(range(12), 2)))


def test_skipped_pairs_are_not_asked_again_and_say_nothing():
    group = Group("ab", [("a", "b", None)])
    assert not group.offers and (group.ratings == 0).all()

"""Preference pairs: ranked by the oracle, reproducible, held out, in the canonical columns."""

import numpy as np
import pytest

from trl_diffusion_sdpo.tools.demo.oracle import oracle_score
from trl_diffusion_sdpo.tools.demo.pairs import eval_pairs, off_policy_pairs

COLUMNS = ["prompt", "chosen", "rejected", "chosen_score", "rejected_score"]


@pytest.fixture(scope="module")
def pairs():
    return off_policy_pairs(seed=0, per_prompt=3)


def test_the_chosen_image_beats_the_rejected_one_by_more_than_the_margin():
    pairs = off_policy_pairs(seed=1, per_prompt=3, margin=0.2)
    difference = np.array(pairs["chosen_score"]) - np.array(pairs["rejected_score"])
    assert 0 < len(pairs) < 3 * 72
    assert np.all(difference > 0.2 - 1e-6)


def test_scores_in_the_table_are_those_of_the_stored_images(pairs):
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(
            oracle_score(list(pairs[side]), list(pairs["prompt"])), pairs[f"{side}_score"], atol=1e-6
        )


def test_equal_seeds_give_equal_pairs_and_other_seeds_others(pairs):
    def images(dataset):
        return [np.asarray(image).tobytes() for image in dataset["chosen"]]

    assert images(off_policy_pairs(seed=0, per_prompt=3)) == images(pairs)
    assert images(off_policy_pairs(seed=1, per_prompt=3)) != images(pairs)


def test_held_out_pairs_share_no_image_with_training_pairs(pairs):
    held_out = eval_pairs(seed=0)
    seen = {np.asarray(image).tobytes() for side in ("chosen", "rejected") for image in pairs[side]}
    fresh = {np.asarray(image).tobytes() for side in ("chosen", "rejected") for image in held_out[side]}
    assert len(held_out) > 72
    assert not seen & fresh

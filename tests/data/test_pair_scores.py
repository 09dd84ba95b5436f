"""Weights and calibrated scores of data sets: what they are computed from, what is refused, counted and reported."""

import math

import datasets
import numpy as np
import pytest
from tiny_pairs import png

from trl_diffusion_sdpo.data import PairOptions, PairTransform, PreferenceCollator, prepare_dataset
from trl_diffusion_sdpo.data.pair_scores import ScoreSettings


def row(number, chosen=1.0, rejected=0.0, prompt=None, **columns):
    """A pair of two images that no other number has."""
    images = {"chosen": png(2 * number), "rejected": png(2 * number + 1)}
    scores = {"chosen_score": chosen, "rejected_score": rejected}
    return {"prompt": f"number {number}" if prompt is None else prompt, **images, **scores, **columns}


def rows(gaps, **columns):
    return [
        row(i, float(gap), 0.0, **{name: values[i] for name, values in columns.items()}) for i, gap in enumerate(gaps)
    ]


def prepared(data, settings, style="list", **options):
    if style == "arrow":
        data = datasets.Dataset.from_list(data)
    options = PairOptions(
        PairTransform(16),
        use_scores=settings.needs_scores,
        number_columns=settings.number_columns,
        **options,
    )
    made = prepare_dataset(data, options)
    settings.apply_to(made)
    return made


def weights_of(made):
    return [item["pair_weight"] for item in (made[i] for i in range(len(made)))]


@pytest.mark.parametrize("style", ["list", "arrow"])
def test_the_weights_of_a_column_have_the_mean_one(style):
    made = prepared(rows([1, 2, 3], quality=[1.0, 3.0, 0.0]), ScoreSettings("quality"), style)
    assert weights_of(made) == pytest.approx([0.75, 2.25, 0])
    assert "scores" not in made[0]
    batch = PreferenceCollator()([made[1], made[0]])
    assert batch["pair_weights"].tolist() == pytest.approx([2.25, 0.75]) and batch["pair_weights"].dim() == 1


@pytest.mark.parametrize("style", ["list", "arrow"])
def test_the_weights_of_a_function_follow_the_score_columns(style):
    made = prepared(rows([1, 2, 0, 5]), ScoreSettings("gap"), style)
    assert weights_of(made) == [0.5, 1, 0, 2.5]


def test_rare_scores_weigh_more_and_leave_labels_against_the_scores_as_they_are():
    """Two of the scores are 0.5, four 0, one 1 and one 2: the products of counts are 2 * 4, 2 * 4, 1 * 4 and 1 * 4, and
    their inverse roots 1 : sqrt(2), with the mean (1 + sqrt(2)) / 2."""
    data = [row(0, 0.5), row(1, 0.5), row(2, 1.0), row(3, 0.0, 2.0)]
    made = prepared(data, ScoreSettings("rarity"))
    common = 2 / (1 + math.sqrt(2))
    assert weights_of(made) == pytest.approx([common, common, common * math.sqrt(2), common * math.sqrt(2)])
    assert "in 1 of 4 pairs" in str(made.report) and "gap" not in str(made.report)


def test_pairs_without_a_number_are_left_out_counted_and_not_part_of_the_mean():
    values = [2.0, None, float("nan"), 6.0, float("inf"), float("-inf")]
    made = prepared(rows([1] * 6, quality=values), ScoreSettings("quality"))
    assert weights_of(made) == [0.5, 1.5] and [made[i]["prompt"] for i in (0, 1)] == ["number 0", "number 3"]
    assert made.report.bad_labels == 4 and made.report.pairs == 2
    assert "row 2: `quality` must be finite, got nan" in str(made.report)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, -0.5, -2.0], "2 of 3 pairs of the train data, down to -2"),
        ([0.0, 0.0, 0.0], "none of the 3 pairs"),
        (["a", "b", "c"], "No pair is left"),
        ([[1.0, 2.0]] * 3, "rows have 2"),
    ],
)
def test_columns_that_are_no_weights_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        prepared(rows([1, 2, 3], quality=values), ScoreSettings("quality"))


def test_several_scorers_weigh_by_their_agreement():
    """As in tests/losses/test_pair_weights.py: 4/5 and 4/9, with the mean 28/45."""
    scorers = {"chosen_scores": [[2.0, 5.0], [3.0, 0.0]], "rejected_scores": [[1.0, 4.0], [0.0, 1.0]]}
    made = prepared(rows([1, 1], **scorers), ScoreSettings("agreement"))
    assert weights_of(made) == pytest.approx([36 / 28, 20 / 28])


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ([[1.0], [2.0]], [[0.0], [0.0]], "at least 2"),
        ([[1.0, 2.0], [2.0, 1.0]], [[0.0, 1.0, 2.0]] * 2, "has 2 numbers in a row and `rejected_scores` has 3"),
        ([[1.0, 2.0], [2.0, 5.0]], [[0.0, 2.0], [0.0, 5.0]], "other scores"),
    ],
)
def test_scorers_that_cannot_be_compared_are_refused(chosen, rejected, message):
    with pytest.raises(ValueError, match=message):
        prepared(rows([1, 1], chosen_scores=chosen, rejected_scores=rejected), ScoreSettings("agreement"))


def test_other_weights_are_other_data_for_a_run_that_resumes_and_the_same_for_a_cache():
    data = rows([1, 2, 3], quality=[1.0, 2, 3])
    one, other = (prepared(data, ScoreSettings(name)) for name in ("gap", "inverse_gap"))
    assert one.fingerprint() != other.fingerprint()
    assert one.fingerprint(thorough=True) == other.fingerprint(thorough=True)


# ---- Calibrated scores --------------------------------------------------------------------------------------------

LOG3 = np.log(3.0)


def calibrated(data, **options):
    settings = ScoreSettings(calibrated=True, sorts_by_scores=True)
    made = prepared(data, settings, **options)
    return np.array([made[i]["scores"] for i in range(len(made))])


def test_images_of_a_prompt_are_compared_with_all_others_of_it():
    """(log 3, 0) and (0, 0) of one prompt are four images, and (log 3, 0) of another prompt two: 3/4 against each, and
    (1/4 + 1/2 + 1/2) / 3."""
    data = [row(0, LOG3, 0, "a"), row(1, LOG3, 0, "b"), row(2, 0, 0, "a")]
    rest = 1.25 / 3
    np.testing.assert_allclose(calibrated(data), [[0.75, rest], [0.75, 0.25], [rest, rest]])


def test_an_image_that_is_in_two_pairs_of_a_prompt_counts_once():
    """(log 3, 0) and (log 3, 0) with the same winner: three images. With another winner of that score: four."""
    data = [row(0, LOG3, 0, "a"), row(1, LOG3, 0, "a")]
    same = [data[0], {**data[1], "chosen": data[0]["chosen"]}]
    rest = (0.25 + 0.5) / 2
    np.testing.assert_allclose(calibrated(same), [[0.75, rest], [0.75, rest]])
    best, rest = (0.5 + 0.75 + 0.75) / 3, (0.25 + 0.25 + 0.5) / 3
    np.testing.assert_allclose(calibrated(data), [[best, rest], [best, rest]])


def test_an_image_is_known_by_its_content_in_whatever_file_it_is(tmp_path):
    data = [row(0, LOG3, 0, "a"), row(1, LOG3, 0, "a")]
    for number, content in enumerate([data[0]["chosen"], data[0]["chosen"], data[1]["chosen"]]):
        (tmp_path / f"{number}.png").write_bytes(content)
    for number, third in ((1, 0.375), (2, 1 / 3)):
        named = [
            {**data[0], "chosen": str(tmp_path / "0.png")},
            {**data[1], "chosen": str(tmp_path / f"{number}.png")},
        ]
        np.testing.assert_allclose(calibrated(named)[:, 1], third)


def test_large_and_small_groups_are_an_independent_loop():
    generator = np.random.default_rng(3)
    data = [row(i, *generator.normal(size=2), prompt=f"p{min(i % 7, 4)}") for i in range(40)]
    scores = calibrated(data)
    for number, pair in enumerate(data):
        others = [s for r in data if r["prompt"] == pair["prompt"] for s in (r["chosen_score"], r["rejected_score"])]
        for side, name in enumerate(("chosen_score", "rejected_score")):
            wins = [1 / (1 + np.exp(other - pair[name])) for other in others]
            assert scores[number, side] == pytest.approx((sum(wins) - 0.5) / (len(others) - 1), rel=1e-12)

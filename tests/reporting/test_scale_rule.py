"""The recommended scale: the rule of docs/cli.md, on numbers whose outcome is found by hand."""

import math

import pytest

from trl_diffusion_sdpo.losses import standard_error
from trl_diffusion_sdpo.reporting.recommended_scale import best_scale, recommend
from trl_diffusion_sdpo.reporting.scale_sweep import sweep_row, word_of


def row(scale, change, *, stderr=0.001, margin=None, pairs=100, worst=0.0):
    """The row of a scale at which the winners' error changes by a share."""
    return {
        "scale": scale,
        "margin": scale if margin is None else margin,
        "winner_change_relative": change,
        "winner_change_relative_stderr": stderr,
        "winner_change_relative_at": {"0": change, "1": worst},
        "winner_change_relative_stderr_at": {"0": stderr, "1": stderr},
        "pairs": pairs,
    }


KEPT_TO_2 = [row(0.0, 0.0), row(0.5, -0.02), row(1.0, 0.0), row(2.0, 0.005), row(3.0, 0.05)]


def scored(**means):
    """Eight scores a scale around each mean, with the same pattern: the drop between two scales has no error."""
    pattern = [-0.1, 0.1, -0.2, 0.2, -0.3, 0.3, 0.0, 0.0]
    return {
        float(scale.removeprefix("at_").replace("_", ".")): [mean + p for p in pattern]
        for scale, mean in means.items()
    }


def test_a_standard_error_by_hand():
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)  # deviations of 1: sqrt(2 / 1) / sqrt(2)
    assert standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(5 / 3) / 2)


def test_the_word_of_a_row_is_the_verdicts():
    assert [word_of(found) for found in KEPT_TO_2] == ["unchanged", "better", "unchanged", "unchanged", "worse"]
    assert word_of(row(1.0, 0.03, stderr=0.02)) == "unchanged"  # within two standard errors
    assert word_of(row(1.0, 0.0, worst=1.5)) == "worse"  # a noise bin has more than doubled
    assert word_of(row(1.0, 0.0, pairs=29)) == "unknown"
    assert word_of(row(1.0, math.nan)) == "ruined"


def test_a_row_has_the_errors_of_an_evaluation():
    metrics = {"errors/winner": 1.1, "errors/winner_change": 0.1, "errors/loser_change": 0.2, "errors/pairs": 40.0}
    metrics |= {"rewards/margins": 3.0, "rewards/accuracies": 0.6, "errors/winner_change_relative_stderr": 0.02}
    metrics |= {"errors/winner_change_relative@2": 0.3, "errors/winner_change_relative_stderr@2": 0.04}
    found = sweep_row(1.0, {f"eval_{name}": value for name, value in metrics.items()})
    assert found["winner_change_relative"] == pytest.approx(0.1)
    assert (found["winner_change_relative_stderr"], found["pairs"]) == (0.02, 40.0)
    assert (found["winner_change_relative_at"], found["winner_change_relative_stderr_at"]) == ({"2": 0.3}, {"2": 0.04})


def test_without_a_scorer_the_weights_have_the_largest_margin_up_to_1_and_guidance_has_1():
    found = recommend(KEPT_TO_2)
    assert (found.weights, found.prediction) == (1.0, 1.0)
    assert "1, that of the largest margin" in found.sentence and "nothing scored" in found.sentence
    ruined_at_1 = [row(0.0, 0.0), row(0.5, 0.0), row(1.0, 3.0), row(2.0, 0.0)]
    assert recommend(ruined_at_1).weights == 0.5
    turning = [row(0.0, 0.0), row(0.5, 0.0, margin=9.0), row(1.0, 0.0, margin=8.0)]
    assert recommend(turning).weights == 0.5


def test_with_a_scorer_each_form_has_the_best_score_and_the_weights_only_where_winners_are_kept():
    rising = scored(at_0=0.4, at_0_5=0.45, at_1=0.5, at_2=0.6, at_3=0.7)
    found = recommend(KEPT_TO_2, {"weights": rising, "prediction": rising}, scorer="mine:score", guidance_scale=5.0)
    assert (found.weights, found.prediction, found.scorer) == (2.0, 3.0, "mine:score")
    assert "error +0.50% ± 0.10%" in found.sentence and "mean score 0.7, against 0.5 at scale 1" in found.sentence
    assert "`mine:score` on images of guidance_scale 5" in found.sentence


def test_of_scales_within_a_standard_error_of_the_best_the_smallest_is_recommended():
    best = [1.0] * 8
    two_worse = [*best[:6], 0.2, 0.2]  # mean drop 0.2; deviations sum to 0.96: an error of 0.131
    assert best_scale({1.0: two_worse, 2.0: best}) == 2.0
    uneven = [*best[:6], 0.0, 1.9]  # mean drop 0.0125 with an error of 0.18
    assert best_scale({1.0: uneven, 2.0: best}) == 1.0
    assert best_scale({1.0: [0.1] * 8, 3.0: best, 2.0: best}) == 2.0  # of equal ones


def test_a_scale_of_0_says_that_the_base_is_as_good():
    falling = scored(at_0=0.5, at_1=0.5, at_2=0.4)
    found = recommend(KEPT_TO_2, {"weights": falling, "prediction": falling}, scorer="mine:score")
    assert (found.weights, found.prediction) == (0.0, 0.0)
    assert found.sentence.count("the base, which no scale") == 2


@pytest.mark.parametrize(("change", "word"), [(0.05, "worse"), (3.0, "ruined")])
def test_no_guidance_goes_beyond_a_model_whose_winners_are_worse(change, word):
    rising = scored(at_0=0.4, at_1=0.5, at_2=0.6)
    lost = [row(0.0, 0.0), row(0.5, 0.0), row(1.0, change), row(2.0, 2 * change)]
    found = recommend(lost, {"weights": rising, "prediction": rising}, scorer="mine:score")
    assert found.prediction == 1.0 and f"None above 1 is, as the tuned model's held-out winners are {word}." in (
        found.sentence
    )
    beyond = {"weights": scored(at_2=0.6), "prediction": scored(at_2=0.6)}
    assert recommend(lost, beyond, scorer="mine:score").prediction is None


def test_few_images_and_few_pairs_recommend_nothing_by_them():
    scores = {
        form: {scale: values[:7] for scale, values in scored(at_0=0.1, at_1=0.2, at_2=0.9).items()}
        for form in ("weights", "prediction")
    }
    found = recommend(KEPT_TO_2, scores, scorer="mine:score")
    assert (found.weights, found.prediction, found.scorer) == (1.0, 1.0, None)
    assert "fewer than 8 images do not count" in found.sentence
    found = recommend([row(0.0, 0.0, pairs=6), row(1.0, 0.0, pairs=6), row(0.5, 0.4)])
    assert found.weights is None and "unknown at 1, worse at 0.5" in found.sentence


def test_of_a_negative_model_no_scale_of_guidance_is_recommended():
    rising = scored(at_0=0.4, at_1=0.5, at_2=0.6)
    found = recommend(KEPT_TO_2, {"weights": rising, "prediction": rising}, scorer="mine:score", is_negative=True)
    assert (found.weights, found.prediction) == (2.0, None) and "negative model" in found.sentence

"""The recommended scale: the rule of docs/cli.md, on numbers whose outcome is found by hand."""

import math

import pytest

from trl_diffusion_sdpo.losses import standard_error
from trl_diffusion_sdpo.reporting.recommended_scale import best_scale, recommend, sweep_row, sweep_table
from trl_diffusion_sdpo.reporting.verdict import RunFacts


def row(scale, winners="unchanged", *, margin=None, preference="learned"):
    """The row of a scale with the verdict's word on the winners."""
    margin = scale if margin is None else margin
    return {"scale": scale, "winners": winners, "preference": preference, "margin": margin}


KEPT_TO_2 = [row(0.0), row(0.5, "better"), row(1.0), row(2.0), row(3.0, "worse")]


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


def test_a_row_has_the_errors_of_an_evaluation_and_the_verdict_on_them():
    metrics = {"errors/winner": 1.1, "errors/winner_change": 0.1, "errors/pairs": 40.0, "rewards/margins": 3.0}
    metrics |= {"errors/winner_change_relative_stderr": 0.02, "errors/winner_change_relative@2": 0.3}
    metrics |= {"errors/accuracy": 0.7, "errors/accuracy_stderr": 0.05}
    run = RunFacts(True, False, False, True, "output", True, 4, "_ema")
    found = sweep_row(1.0, {f"eval_{name}": value for name, value in metrics.items()}, run)
    expected = {
        "winner_change": pytest.approx(0.1),
        "winner_change_stderr": 0.02,
        "worst_bin_change": 0.3,
        "pairs": 40.0,
    }
    expected |= {
        "word": "worse",
        "winners": "worse",
        "preference": "learned",
        "accuracy": 0.7,
        "margin_relative": None,
    }
    assert {name: found[name] for name in expected} == expected
    assert "70.0% ± 5.0%" in sweep_table([found]) and "+10.0% ± 2.0%" in sweep_table([found])


def test_without_a_scorer_the_weights_have_the_largest_margin_up_to_1_and_guidance_has_1():
    found = recommend(KEPT_TO_2)
    assert (found["weights"], found["prediction"]) == (1.0, 1.0)
    assert recommend([row(0.0), row(0.5), row(1.0, "ruined"), row(2.0)])["weights"] == 0.5
    assert recommend([row(0.0), row(0.5, margin=9.0), row(1.0, margin=8.0)])["weights"] == 0.5
    assert recommend([row(0.0), row(0.5), row(1.0, preference="reversed")])["weights"] == 0.5
    assert recommend([row(0.0), row(1.0, "unknown")])["weights"] is None


def test_with_a_scorer_each_form_has_the_best_score_and_the_weights_only_if_winners_are_kept():
    rising = scored(at_0=0.4, at_0_5=0.45, at_1=0.5, at_2=0.6, at_3=0.7)
    found = recommend(KEPT_TO_2, {"weights": rising, "prediction": rising}, scorer="mine:score", guidance_scale=5.0)
    assert (found["weights"], found["prediction"], found["scorer"]) == (2.0, 3.0, "mine:score")
    assert found["guidance_scale"] == 5.0 and "mean score 0.7, against 0.5 at scale 1" in found["sentence"]


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
    assert (found["weights"], found["prediction"]) == (0.0, 0.0)


@pytest.mark.parametrize("word", ["worse", "ruined"])
def test_no_guidance_goes_beyond_a_model_whose_winners_are_worse(word):
    rising = scored(at_0=0.4, at_1=0.5, at_2=0.6)
    lost = [row(0.0), row(0.5), row(1.0, word), row(2.0, word)]
    found = recommend(lost, {"weights": rising, "prediction": rising}, scorer="mine:score")
    assert found["prediction"] == 1.0 and f"winners are {word}" in found["sentence"]
    beyond = {"weights": scored(at_0=0.4, at_2=0.6), "prediction": scored(at_2=0.6)}
    assert recommend(lost, beyond, scorer="mine:score")["prediction"] is None


def test_scores_of_few_images_do_not_count():
    scores = {
        form: {scale: values[:7] for scale, values in scored(at_0=0.1, at_1=0.2, at_2=0.9).items()}
        for form in ("weights", "prediction")
    }
    found = recommend(KEPT_TO_2, scores, scorer="mine:score")
    assert (found["weights"], found["prediction"], found["scorer"]) == (1.0, 1.0, None)


def test_of_a_negative_model_no_scale_of_guidance_is_recommended():
    rising = scored(at_0=0.4, at_1=0.5, at_2=0.6)
    found = recommend(KEPT_TO_2, {"weights": rising, "prediction": rising}, scorer="mine:score", is_negative=True)
    assert (found["weights"], found["prediction"]) == (2.0, None)

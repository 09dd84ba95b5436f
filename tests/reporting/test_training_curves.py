"""The curves of a run: which points they have, by hand."""

import pytest
from PIL import Image

from trl_diffusion_sdpo.reporting.training_curves import curves_of, has_curves, plot_curves

HISTORY = [
    {"step": 0, "eval_loss": 0.5, "eval_errors/winner": 2.0, "eval_errors/winner_change": 0.0},
    {
        **{"step": 10, "loss": 0.25, "rewards/accuracies": 0.75, "safeguard/scale": 0.5},
        **{"errors/winner": 1.5, "errors/winner_change": 0.5, "errors/loser": 3.0, "errors/loser_change": -1.0},
    },
    {"step": 20, "loss": 0.125, "errors/winner": 0.5, "errors/winner_change": 0.5},  # the reference's error is 0
    {"step": 20, "eval_loss": 0.25, "eval_errors/winner": 2.5, "eval_errors/winner_change": 0.5},
    {"step": 20, "train_loss": 0.2, "train_runtime": 1.0},
]


SCORED = [*HISTORY, {"step": 10, "samples/pickscore_win_rate": 0.5}, {"step": 20, "samples/pickscore_win_rate": 0.75}]


def test_points_are_those_of_the_log_and_changes_are_in_per_cent_of_the_reference():
    assert curves_of(HISTORY) == {
        "loss": {"loss": [(10, 0.25), (20, 0.125)], "loss, eval": [(0, 0.5), (20, 0.25)]},
        "change of the error, % of the reference's": {
            "winners": [(10, 50.0)],
            "losers": [(10, -25.0)],
            "winners, eval": [(0, 0.0), (20, 25.0)],
        },
        "accuracy": {"accuracy": [(10, 0.75)]},
        "lambda": {"lambda": [(10, 0.5)]},
    }
    assert has_curves(HISTORY) and not has_curves(HISTORY[:2])


@pytest.mark.parametrize(
    "history", [HISTORY, [{"step": step, "loss": 1.0, "eval_$_$_loss": 1.0} for step in (1, 2)], SCORED]
)
def test_a_picture_has_a_panel_for_each_of_them(history, tmp_path, drawn):
    plot_curves(history, tmp_path / "curves.png")
    panels = [axes for axes in drawn[0].axes if axes.lines]
    expected = curves_of(history)
    assert [axes.get_title() for axes in panels] == list(expected)
    for axes, curves in zip(panels, expected.values(), strict=True):
        lines = [line for line in axes.lines if not line.get_label().startswith("_")]
        drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in lines}
        assert drawn == curves and axes.get_xlabel() == "optimizer step"
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 500

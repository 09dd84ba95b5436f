"""Curves and noise bins of a run: the points in the plots, by hand."""

import pytest
from PIL import Image

from trl_diffusion_sdpo.reporting.plots import (
    changes_by_noise_bin,
    curves_of,
    has_curves,
    noise_bin_file,
    plot_curves,
    plot_noise_bins,
)

HISTORY = [
    {"step": 0, "eval_loss": 0.5, "eval_errors/winner": 2.0, "eval_errors/winner_change": 0.0},
    {
        "step": 10,
        "loss": 0.25,
        "rewards/accuracies": 0.75,
        "safeguard/scale": 0.5,
        "errors/winner": 1.5,
        "errors/winner_change": 0.5,
        "errors/loser": 3.0,
        "errors/loser_change": -1.0,
    },
    {"step": 20, "loss": 0.125, "errors/winner": 0.5, "errors/winner_change": 0.5},  # the reference's error is 0
    {"step": 20, "eval_loss": 0.25, "eval_errors/winner": 2.5, "eval_errors/winner_change": 0.5},
    {"step": 20, "train_loss": 0.2, "train_runtime": 1.0},
]
SCORED = [*HISTORY, {"step": 10, "samples/pickscore_win_rate": 0.5}, {"step": 20, "samples/pickscore_win_rate": 0.75}]
EVALUATIONS = [
    {"step": 0, "eval_errors/winner_change_relative@0": 0.0},
    {"step": 1, "loss": 0.5, "errors/winner_change": 0.1},
    {
        "step": 10,
        "eval_errors/winner_change@2": 0.2,
        "eval_errors/winner_change_relative@11": 0.25,
        "eval_errors/winner_change_relative@2": -0.5,
        "eval_errors/loser_change_relative@2": 1.5,
        "eval_ema_errors/winner_change_relative@2": -0.125,
    },
]


def test_points_are_logged_values_and_changes_are_in_per_cent_of_the_reference():
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
def test_the_plot_of_curves_has_a_panel_for_each_metric(history, tmp_path, drawn):
    plot_curves(history, tmp_path / "curves.png")
    panels = [axes for axes in drawn[0].axes if axes.lines]
    expected = curves_of(history)
    assert [axes.get_title() for axes in panels] == list(expected)
    for axes, curves in zip(panels, expected.values(), strict=True):
        lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
        assert lines == curves
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 500


def test_changes_are_grouped_by_prefix_and_noise_bin():
    assert changes_by_noise_bin(EVALUATIONS) == {
        "eval": {"step": 10, "winner": {2: -0.5, 11: 0.25}, "loser": {2: 1.5}},
        "eval_ema": {"step": 10, "winner": {2: -0.125}, "loser": {}},
    }
    assert changes_by_noise_bin([]) == changes_by_noise_bin(EVALUATIONS[1:2]) == {}


def test_the_plot_of_noise_bins_has_a_point_at_the_middle_of_each_bin(drawn, tmp_path):
    record = {"step": 9, "winner": {3: 0.125, 1: 0.0}, "loser": {3: 0.5, 1: 2.0}}
    plot_noise_bins(record, tmp_path / "levels.png")
    winners, losers = (axes.lines[0] for axes in drawn[0].axes)
    assert (list(winners.get_xdata()), list(winners.get_ydata())) == ([0.1875, 0.4375], [0.0, 12.5])
    assert (list(losers.get_xdata()), list(losers.get_ydata())) == ([0.1875, 0.4375], [200.0, 50.0])


def test_file_names_of_plots_are_allowed_on_windows():
    assert noise_bin_file("eval_C:\\own/it?") == "noise_bins_C__own_it_.png"


def test_a_run_plots_the_noise_bins_of_its_weights_and_of_their_average(make_trainer, make_pairs, tmp_path):
    trainer = make_trainer(
        train=make_pairs(4),
        eval_dataset=make_pairs(4, seed=5),
        eval_strategy="steps",
        eval_steps=1,
        ema_decay=0.5,
    )
    trainer.train()
    for name in ("noise_bins.png", "noise_bins_ema.png"):
        with Image.open(tmp_path / "run" / name) as image:
            assert image.format == "PNG"
    changes = changes_by_noise_bin(trainer.state.log_history)
    assert list(changes) == ["eval", "eval_ema"] and changes["eval"]["step"] == 2

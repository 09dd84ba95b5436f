"""The picture of an evaluation's changes by noise level, and the numbers in it."""

import pytest
from PIL import Image

from trl_diffusion_sdpo.reporting.noise_bin_plot import changes_by_noise_bin, noise_bin_file, plot_noise_bins

HISTORY = [
    {"step": 0, "eval_loss": 0.69, "eval_errors/winner_change_relative@0": 0.0},
    {"step": 1, "loss": 0.5, "errors/winner_change": 0.1},
    {
        "step": 10,
        "eval_loss": 0.6,
        "eval_errors/winner_change": 0.3,
        "eval_errors/winner_change@2": 0.2,
        "eval_errors/winner_change_relative@11": 0.25,
        "eval_errors/winner_change_relative@2": -0.5,
        "eval_errors/loser_change_relative@2": 1.5,
        "eval_ema_errors/winner_change_relative@2": -0.125,
        "eval_test_errors/loser_change_relative@0": 0.0625,
    },
    {"step": 20, "eval_errors/winner_change_relative@2": 0.75},
]


def points_of(axes):
    """What is drawn in an axis but the line at 0: levels and heights, the newest first."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines[:-1]]


def test_changes_are_found_by_prefix_and_level_in_order():
    assert changes_by_noise_bin(HISTORY) == {
        "eval": [
            {"step": 0, "winner": {0: 0.0}, "loser": {}},
            {"step": 10, "winner": {2: -0.5, 11: 0.25}, "loser": {2: 1.5}},
            {"step": 20, "winner": {2: 0.75}, "loser": {}},
        ],
        "eval_ema": [{"step": 10, "winner": {2: -0.125}, "loser": {}}],
        "eval_test": [{"step": 10, "winner": {}, "loser": {0: 0.0625}}],
    }
    assert changes_by_noise_bin([]) == changes_by_noise_bin(HISTORY[1:2]) == {}


def test_a_picture_has_a_point_at_the_middle_of_each_level_in_per_cent(drawn, tmp_path):
    records = [
        {"step": 5, "winner": {0: 0.5, 3: -0.25}, "loser": {0: 1.0, 3: 0.0}},
        {"step": 9, "winner": {3: 0.125, 1: 0.0}, "loser": {3: 0.5, 1: 2.0}},
    ]
    plot_noise_bins(records, 4, tmp_path / "levels.png")
    winners, losers = drawn[0].axes
    assert points_of(winners) == [([0.375, 0.875], [0.0, 12.5]), ([0.125, 0.875], [50.0, -25.0])]
    assert points_of(losers) == [([0.375, 0.875], [200.0, 50.0]), ([0.125, 0.875], [100.0, 0.0])]
    assert [text.get_text() for text in winners.get_legend().get_texts()] == ["step 9"]
    with Image.open(tmp_path / "levels.png") as image:
        assert image.width > 500


def test_names_of_plots_are_names_on_windows_too():
    assert noise_bin_file("eval_C:\\own/it?") == "noise_bins_C__own_it_.png"


@pytest.fixture
def evaluated(make_trainer, make_pairs):
    """`evaluated()`: a trainer that has trained for two steps and was evaluated after each, with its average."""

    def run(**settings):
        trainer = make_trainer(
            train=make_pairs(4),
            eval_dataset=make_pairs(4, seed=5),
            eval_strategy="steps",
            eval_steps=1,
            num_noise_bins=4,
            ema_decay=0.5,
            **settings,
        )
        trainer.train()
        return trainer

    return run


def test_a_run_leaves_a_picture_of_the_weights_and_one_of_their_average(evaluated, drawn, tmp_path):
    trainer = evaluated()
    for name in ("noise_bins.png", "noise_bins_ema.png"):
        with Image.open(tmp_path / "run" / name) as image:
            assert image.format == "PNG"
    changes = changes_by_noise_bin(trainer.state.log_history)
    assert list(changes) == ["eval", "eval_ema"] and [record["step"] for record in changes["eval"]] == [1, 2]
    for prefix, figure in zip(changes, drawn[-2:], strict=True):
        logged = next(entry for entry in reversed(trainer.state.log_history) if f"{prefix}_loss" in entry)
        for axes, side in zip(figure.axes, ("winner", "loser"), strict=True):
            name = f"{prefix}_errors/{side}_change_relative@"
            expected = {int(key[-1]): 100 * value for key, value in logged.items() if key.startswith(name)}
            middles, heights = points_of(axes)[0]
            assert dict(zip([int(4 * middle) for middle in middles], heights, strict=True)) == pytest.approx(expected)
            assert len(points_of(axes)) == 2
    assert points_of(drawn[-2].axes[0]) != points_of(drawn[-1].axes[0])

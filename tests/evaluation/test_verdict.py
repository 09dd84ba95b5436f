"""The verdict on a training: the rule by hand, what it is measured by, and where it is said."""

import logging
import math

import pytest
from peft import LoraConfig

from trl_diffusion_sdpo.evaluation.verdict import RunFacts, judge, verdict_of
from trl_diffusion_sdpo.losses import loss_spec


@pytest.mark.parametrize(
    "change, level, word",
    [
        (-0.2, None, "better"),
        (-0.01, 0.0, "better"),
        (-0.009, 0.0, "kept"),
        (0.0, None, "kept"),
        (0.05, 1.0, "kept"),
        (0.051, 0.0, "worse"),
        (-0.2, 1.01, "worse"),
        (1.0, None, "worse"),
        (1.01, None, "ruined"),
        (6.3, 60.0, "ruined"),
        (math.inf, None, "ruined"),
        (math.nan, None, "ruined"),
        (0.0, math.nan, "worse"),
    ],
)
def test_the_rule(change, level, word):
    assert judge(change, level) == word


def verdict_on(history, *, moves=False, given=False, best=None, safeguard="output", loss="sigmoid"):
    """The verdict on a training with such logs."""
    uses_loser = loss_spec(loss).uses_loser
    return verdict_of(history, RunFacts(moves, given, uses_loser, safeguard != "none", "_ema"), best)


def evaluated(step, winner, change=None, prefix="eval", **levels) -> dict:
    entry = {"step": step, f"{prefix}_errors/winner": winner}
    if change is not None:
        entry[f"{prefix}_errors/winner_change"] = change
    return entry | {f"{prefix}_errors/winner_change_relative@{level[1:]}": value for level, value in levels.items()}


def test_a_model_whose_held_out_error_is_seven_times_as_large_is_ruined():
    verdict = verdict_on([evaluated(40, 0.053, 0.003), evaluated(240, 0.365, 0.315, _0=0.4, _7=60.0)])
    assert verdict.word == "ruined"
    assert verdict.finding == (
        "Verdict: ruined. The error on the preferred images of the evaluation pairs is 630.0% above that before "
        "training (0.365 against 0.05) at step 240; the noise bin with the largest increase is 7, +6000.0%."
    )
    assert "Do not use these weights" in verdict.advice and "lowest at step 40 (+6.0%)" in verdict.advice


def test_a_kept_model_needs_no_advice():
    verdict = verdict_on([evaluated(10, 0.101, 0.001, _0=0.02)])
    assert (verdict.word, verdict.advice) == ("kept", "")
    assert "1.0% above that before training" in str(verdict)


def test_advice_goes_by_what_is_set():
    worse = [evaluated(10, 0.12, 0.02)]
    assert "a `safeguard` or a `winner_budget`" in verdict_on(worse, safeguard="none").advice
    assert "a larger `safeguard_mu`" in verdict_on(worse).advice
    assert "safeguard" not in verdict_on(worse, loss="sft", safeguard="none").advice


def test_an_evaluation_before_the_first_step_is_what_counts():
    """Against the reference, which is another model here, the error has fallen; since the start it has doubled."""
    history = [evaluated(0, 0.1, -0.4), evaluated(5, 0.21, -0.29)]
    assert verdict_on(history, given=True).word == "ruined"
    assert "58.0% below that of the reference" in verdict_on(history[1:], given=True).finding


def test_a_reference_that_moves_is_no_measure_and_the_first_evaluation_is():
    history = [evaluated(10, 0.1, 0.0), evaluated(20, 0.11, 0.0)]
    assert "10.0% above that at step 10" in verdict_on(history, moves=True).finding
    assert verdict_on(history[:1], moves=True) is None
    assert verdict_on([evaluated(10, 0.1)]) is None  # nor is there one without a reference


def test_of_several_sets_the_worst_counts_and_averages_are_told_beside():
    history = [
        evaluated(5, 0.1, 0.0, "eval_a") | evaluated(5, 0.2, 0.1, "eval_b") | evaluated(5, 0.102, 0.002, "eval_b_ema")
    ]
    verdict = verdict_on(history)
    assert verdict.word == "worse" and "100.0% above" in verdict.finding
    assert "That of the averaged weights is 2.0% above that before training." in verdict.finding


def test_the_best_checkpoint_is_judged_where_it_was_loaded():
    history = [evaluated(10, 0.09, -0.01), evaluated(20, 0.9, 0.8)]
    assert verdict_on(history, best=10).word == "better"


def test_without_evaluation_the_last_ten_logs_of_training_count():
    def log(step, winner, change):
        return {"step": step, "loss": 0.5, "errors/winner": winner, "errors/winner_change": change}

    history = [log(1, 0.9, 0.8), *[log(step, 0.13, 0.03) for step in range(2, 12)], {"step": 11, "train_runtime": 1.0}]
    verdict = verdict_on(history)
    assert verdict.word == "worse" and "training pairs is 30.0% above" in verdict.finding
    assert "nothing is known of other pairs" in verdict.finding
    assert verdict_on([]) is None


def test_an_error_that_is_no_number_is_ruined():
    assert verdict_on([evaluated(3, math.nan, math.nan)]).word == "ruined"
    assert verdict_on([evaluated(0, 0.1), evaluated(3, math.inf)]).word == "ruined"


# ---- Said ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ruined(make_trainer, make_pairs):
    """A trainer that will ruin its model, with evaluations."""

    def build(**more):
        settings = {"learning_rate": 0.3, "safeguard": "none", "beta": 1.0, "max_steps": 6, "loss_type": "linear"}
        return make_trainer(**{**settings, **more})

    return build


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "being ruined" in record.getMessage()]


def test_a_model_being_ruined_is_told_once_and_again_at_the_end_and_in_the_card(ruined, make_pairs, caplog, tmp_path):
    trainer = ruined(eval_dataset=make_pairs(4, seed=1), eval_strategy="steps", eval_steps=2)
    trainer.train()
    (warning,) = warnings_of(caplog)
    assert "at step 2 " in warning and "Do not use these weights" in warning
    said = [record for record in caplog.records if record.getMessage().startswith("Verdict: ruined.")]
    assert len(said) == 1 and said[0].levelno == logging.WARNING and "at step 6" in said[0].getMessage()
    trainer.create_model_card()
    assert "Verdict: ruined. The error on the preferred images" in (tmp_path / "run" / "README.md").read_text()


def test_without_evaluation_the_warning_comes_from_three_logs_of_training(ruined, caplog):
    ruined().train()
    (warning,) = warnings_of(caplog)
    assert "at step 3 " in warning


def test_a_training_that_keeps_the_winners_ends_without_a_warning(make_trainer, make_pairs, caplog):
    caplog.set_level(logging.INFO, logger="trl_diffusion_sdpo")
    settings = {"eval_dataset": make_pairs(4, seed=1), "eval_strategy": "steps", "eval_steps": 1}
    make_trainer(learning_rate=1e-6, peft_config=LoraConfig(r=2), **settings).train()
    assert not warnings_of(caplog)
    said = [record for record in caplog.records if record.getMessage().startswith("Verdict: kept.")]
    assert len(said) == 1 and said[0].levelno == logging.INFO

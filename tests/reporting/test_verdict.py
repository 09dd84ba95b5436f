"""The verdict on a training: its rule by hand, its measurements, and its texts and file."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig
from PIL import Image, PngImagePlugin
from transformers import TrainerControl, TrainerState

from trl_diffusion_sdpo.losses import loss_spec
from trl_diffusion_sdpo.reporting.interrupts import CheckpointOnInterrupt
from trl_diffusion_sdpo.reporting.run_callbacks import VerdictCallback
from trl_diffusion_sdpo.reporting.sample_images import SampleImagesCallback, final_step
from trl_diffusion_sdpo.reporting.verdict import (
    RunFacts,
    judge_preference,
    judge_winners,
    verdict_of,
    worst_of,
    write_verdict,
)

DEMO = json.loads((Path(__file__).parent / "demo_runs.json").read_text(encoding="utf-8"))
DEMO_WORDS = {"sft": "unchanged", "dpo": "ruined", "sdpo": "worse", "sdpo_recipe": "unchanged"}


@pytest.mark.parametrize(
    "change, stderr, level, word",
    [
        # Without a standard error, a change of 5% does not count, and nothing is shown to be better.
        (-0.2, None, None, "unchanged"),
        (-0.05, None, None, "unchanged"),
        (0.05, None, 1.0, "unchanged"),
        (0.051, None, 0.0, "worse"),
        # Two standard errors, and at least 1%.
        (0.03, 0.016, None, "unchanged"),
        (0.03, 0.014, None, "worse"),
        (-0.03, 0.014, None, "better"),
        (0.009, 0.0001, None, "unchanged"),
        (0.011, 0.0001, None, "worse"),
        (0.0, 0.0, 0.0, "unchanged"),
        # An uncertainty of more than 20% hides too much.
        (0.1, 0.09, None, "unchanged"),
        (0.1, 0.11, None, "unknown"),
        (-0.1, 0.11, None, "unknown"),
        (0.9, 0.11, None, "worse"),
        # One noise bin that has doubled.
        (-0.2, 0.01, 1.01, "worse"),
        (0.0, None, math.nan, "worse"),
        # The error has doubled.
        (1.0, None, None, "worse"),
        (1.01, 5.0, None, "ruined"),
        (6.3, 0.5, 60.0, "ruined"),
        (math.inf, None, None, "ruined"),
        (math.nan, 0.1, None, "ruined"),
    ],
)
def test_the_rule(change, stderr, level, word):
    assert judge_winners(change, stderr, level) == word


def test_a_noise_bin_counts_beyond_three_of_its_standard_errors():
    assert judge_winners(0.0, 0.01, 1.5, 0.49) == "worse"
    assert judge_winners(0.0, 0.01, 1.5, 0.51) == "unchanged"


def test_few_pairs_are_judged_with_less_certainty():
    assert judge_winners(0.5, 0.01, pairs=3) == "unknown" and judge_winners(1.01, 0.01, pairs=2) == "ruined"
    assert judge_winners(0.5, 0.01, pairs=4) == judge_winners(0.5, 0.01, pairs=30) == "worse"
    (few, enough) = (worst_of([judged(10, 0.2, 0.01, pairs=pairs)], run_facts()) for pairs in (8, 30))
    assert few.word == enough.word == "worse" and "8 pairs" in str(few)
    assert enough.rises and not few.rises
    assert worst_of([judged(10, 1.2, 0.01, pairs=8)], run_facts()).rises


@pytest.mark.parametrize(
    ("accuracy", "stderr", "word"),
    [
        (0.61, 0.05, "learned"),
        (0.59, 0.05, "not learned"),
        (0.39, 0.05, "reversed"),
        (0.5, 0.01, "not learned"),  # no step: every pair is a tie
        (0.9, None, "unknown"),  # a single pair has no standard error
        (None, None, "unknown"),
    ],
)
def test_the_rule_of_the_preference(accuracy, stderr, word):
    assert judge_preference(accuracy, stderr) == word


def test_better_needs_kept_winners_and_a_learned_preference():
    """If the winners' error falls and the losers' error falls more, the preference is not learned."""
    verdict = verdict_on([judged(10, -0.05, 0.01, accuracy=(0.5, 0.08))])
    assert (verdict.word, verdict.measured.winners) == ("not learned", "better")
    assert verdict_on([judged(10, 0.0, 0.01, accuracy=(0.98, 0.03))]).word == "better"
    assert verdict_on([judged(10, 0.4, 0.01, accuracy=(0.98, 0.03))]).word == "worse"
    assert verdict_on([judged(10, 0.0, 0.01, accuracy=(0.3, 0.05))]).word == "reversed"
    assert verdict_on([judged(10, 0.0, 0.01, accuracy=(0.5, 0.08))], loss="sft").word == "unchanged"


def judged(step, change, stderr, pairs=40, **preference) -> dict:
    """Return the log of an evaluation with standard errors. `preference` has values with their standard errors."""
    entry = with_stderr(evaluated(step, 0.1 * (1 + change), 0.1 * change), stderr) | {
        "eval_errors/pairs": float(pairs)
    }
    for name, (value, error) in preference.items():
        entry |= {f"eval_errors/{name}": value, f"eval_errors/{name}_stderr": error}
    return entry


def run_facts(*, moves=False, given=False, loss="sigmoid") -> RunFacts:
    return RunFacts(moves, given, loss_spec(loss).uses_loser, average_suffix="_ema")


def verdict_on(history, *, best=None, **facts):
    """Return the verdict on a training with these logs."""
    return verdict_of(history, run_facts(**facts), best)


def evaluated(step, winner, change=None, prefix="eval", **levels) -> dict:
    entry = {"step": step, f"{prefix}_errors/winner": winner}
    if change is not None:
        entry[f"{prefix}_errors/winner_change"] = change
    return entry | {f"{prefix}_errors/winner_change_relative@{level[1:]}": value for level, value in levels.items()}


def with_stderr(entry: dict, stderr: float) -> dict:
    return entry | {"eval_errors/winner_change_relative_stderr": stderr}


def test_changes_relative_to_another_reference_are_not_those_since_the_start():
    """Bins and standard errors relative to a user's reference do not describe the change since step 0."""
    history = [evaluated(0, 0.1, -0.4), with_stderr(evaluated(5, 0.104, -0.396, _0=3.0), 0.001)]
    history[-1]["eval_errors/winner_change_relative_stderr@0"] = 0.1
    assert verdict_on(history, given=True).word == "unchanged"
    assert verdict_on(history[1:], given=True).word == "worse"  # relative to the reference, a bin has doubled
    assert verdict_on(history, moves=True).word == "unchanged"


def test_a_bin_of_one_pair_does_not_count_where_the_others_are_known():
    entry = with_stderr(evaluated(10, 0.1, 0.0, _0=0.2, _7=5.0), 0.001)
    entry["eval_errors/winner_change_relative_stderr@0"] = 0.02
    assert verdict_on([entry]).word == "unchanged"


@pytest.mark.parametrize("method", DEMO["methods"])
def test_the_verdicts_on_the_runs_of_the_demo(method):
    """The last evaluations of the demo's runs were recorded."""
    recorded = DEMO["methods"][method]
    facts = run_facts(loss=recorded["loss_type"])
    verdict = verdict_of(recorded["evaluations"], facts)
    assert verdict.word == recorded["word"] == DEMO_WORDS[method]


def test_an_evaluation_before_the_first_step_is_what_counts():
    """The error is below the reference's, another model's, and has doubled since the start."""
    history = [evaluated(0, 0.1, -0.4), evaluated(5, 0.21, -0.29)]
    assert verdict_on(history, given=True).word == "ruined"
    assert "58.0% below that of the reference" in str(verdict_on(history[1:], given=True))


def test_without_a_reference_that_stays_only_an_evaluation_before_training_compares():
    history = [evaluated(0, 0.1, 0.0), evaluated(20, 0.11, 0.0)]
    assert "10.0% above that before training" in str(verdict_on(history, moves=True))
    assert verdict_on(history[1:], moves=True).measured is None
    assert verdict_on([evaluated(10, 0.1)], loss="sft").measured is None


def test_the_worst_of_several_sets_counts_and_averages_are_not_judged():
    loud = evaluated(5, 0.11, 0.01, "eval_loud") | {"eval_loud_errors/winner_change_relative_stderr": 0.09}
    sure = evaluated(5, 0.103, 0.003, "eval_sure") | {"eval_sure_errors/winner_change_relative_stderr": 0.01}
    verdict = verdict_on([loud, sure, evaluated(5, 0.3, 0.2, "eval_sure_ema")])
    assert verdict.word == "worse" and "of `sure` is 3.0% above" in str(verdict)


def trained(step, winner, change):
    return {"step": step, "errors/winner": winner, "errors/winner_change": change}


def test_without_held_out_pairs_the_verdict_is_unknown_and_asks_for_them(tmp_path):
    for history in ([], [trained(step, 0.13, 0.03) for step in range(1, 11)]):
        verdict = verdict_on(history)
        assert verdict.word == "unknown" and not verdict.training
        write_verdict(tmp_path, verdict, [])
        written = json.loads((tmp_path / "verdict.json").read_text())
        assert written["word"] == "unknown" and "eval_dataset" in written["advice"]


def test_a_doubled_error_in_the_last_ten_training_logs_is_said_beside_an_unknown_verdict():
    """Over logs 2 to 11, the mean error is .21, and that before training .1."""
    history = [trained(1, 0.1, 0.0), *[trained(step, 0.21, 0.11) for step in range(2, 12)]]
    verdict = verdict_on([*history, {"step": 11, "train_runtime": 1.0}])
    assert verdict.word == "unknown" and "0.21" in verdict.sentence and "0.1." in verdict.sentence
    assert "learning_rate" in verdict.advice
    assert not verdict_on([*history[:-2], *[trained(step, 0.1, 0.0) for step in (10, 11)]]).training
    assert "nan" in verdict_on([trained(1, math.nan, math.nan)]).training
    assert not verdict_on([*history, evaluated(11, 0.1, 0.0)]).training  # held-out pairs say more
    assert not verdict_on(history, moves=True).training


def test_few_held_out_pairs_are_asked_for_more_and_not_for_more_training():
    few, many = (verdict_on([judged(10, 0.0, 0.01, pairs=pairs, accuracy=(0.6, 0.1))]) for pairs in (5, 30))
    assert (few.word, many.word) == ("unknown", "not learned")
    assert "5 pairs" in str(few) and "30" in few.measured.advice and "learning_rate" not in few.measured.advice
    sure = verdict_on([judged(10, 0.0, 0.01, pairs=5, accuracy=(0.9, 0.1))])
    assert sure.word == "better" and "5 pairs" in str(sure) and sure.measured.advice == few.measured.advice
    assert "learning_rate" in verdict_on([judged(10, 1.5, 0.01, pairs=5)]).measured.advice  # ruined


def test_an_error_that_is_no_number_is_ruined():
    assert verdict_on([evaluated(3, math.nan, math.nan)]).word == "ruined"
    assert verdict_on([evaluated(0, 0.1), evaluated(3, math.inf)]).word == "ruined"
    verdict = verdict_on([evaluated(3, math.nan, math.nan, _0=math.nan, _1=0.5)])
    assert "no number" in str(verdict)
    assert verdict_on([evaluated(3, 0.1, -math.inf)]).measured is None, "nothing to compare with"
    assert judge_winners(0.05, math.nan) == "unknown"


# ---- At the end ----------------------------------------------------------------------------------------------------


@pytest.fixture
def ending(make_args, tmp_path):
    """`ending(history, step=, ...)`: ends a training of 9 steps after one of them, and returns the number of
    evaluations at its end."""

    def run(history, *, step=9, samples=None, **settings):
        asked = []
        args = make_args(eval_strategy="steps", eval_steps=3, **settings)
        callback = VerdictCallback(run_facts(), lambda: asked.append(1), CheckpointOnInterrupt(), samples)
        callback.on_train_end(args, TrainerState(global_step=step, max_steps=9, log_history=history), TrainerControl())
        return len(asked)

    return run


def test_weights_are_evaluated_once_at_the_end_if_the_last_evaluation_is_older(ending):
    assert ending([evaluated(6, 0.1, 0.0)]) == ending([]) == 1
    assert ending([evaluated(9, 0.1, 0.0)]) == 0
    assert ending([evaluated(9, 0.1, 0.0, "eval_held out")]) == 0
    assert ending([evaluated(3, 0.1, 0.0)], step=5) == 1, "another callback stopped it"


def test_the_step_that_is_judged_is_that_of_the_checkpoint_that_was_loaded(make_args):
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2, "eval_steps": 1}
    args = make_args(eval_strategy="steps", **best)
    assert final_step(args, TrainerState(best_global_step=3)) is None
    loaded = TrainerState(best_global_step=3, best_model_checkpoint="run-1/checkpoint-2")
    assert final_step(args, loaded) == 2 and final_step(make_args(), loaded) is None


def test_images_of_another_prompt_or_seed_are_not_shown(make_args, sd_pipeline, tmp_path):
    def draw(step, number, prompt, seed):
        note = PngImagePlugin.PngInfo()
        note.add_itxt("prompt", prompt)
        note.add_itxt("seed", str(seed))
        Image.new("RGB", (4, 4)).save(tmp_path / f"run/samples/step-{step:06d}-{number}.png", pnginfo=note)

    (tmp_path / "run" / "samples").mkdir(parents=True)
    for step in (0, 9):
        draw(step, 0, "a", 7)
        draw(step, 1, "b" if step else "another", 8)
        draw(step, 2, "c", 9 if step else 8)
        draw(step, 3, "another", 10)
    options = {"every_n_steps": None, "seed": 7}
    samples = SampleImagesCallback(sd_pipeline, ["a", "b", "c", "d", "e"], **options)
    callback = VerdictCallback(run_facts(), lambda: None, CheckpointOnInterrupt(), samples)
    callback.on_train_end(make_args(), TrainerState(global_step=9, max_steps=9), TrainerControl())
    written = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert [(image["prompt"], image["seed"]) for image in written["images"]] == [("a", 7)]


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


def test_a_model_being_ruined_is_reported_once_and_at_the_end_and_on_the_card(ruined, make_pairs, caplog, tmp_path):
    trainer = ruined(eval_dataset=make_pairs(4, seed=1), eval_strategy="steps", eval_steps=2)
    trainer.train()
    (warning,) = warnings_of(caplog)
    assert "At step 2," in warning
    said = [record for record in caplog.records if record.getMessage().startswith("Verdict: ruined.")]
    assert len(said) == 1 and said[0].levelno == logging.WARNING and "At step 6," in said[0].getMessage()
    trainer.create_model_card()
    assert "Verdict: ruined." in (tmp_path / "run" / "README.md").read_text()


def test_a_model_being_ruined_is_reported_once_without_an_evaluation(ruined, caplog):
    ruined(logging_steps=1).train()
    assert len(warnings_of(caplog)) == 1 and "training pairs" in warnings_of(caplog)[0]


def test_a_training_that_keeps_the_winners_ends_without_a_warning(make_trainer, make_pairs, caplog):
    caplog.set_level(logging.INFO, logger="trl_diffusion_sdpo")
    evaluates = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 15}
    settings = {"eval_dataset": make_pairs(30, seed=1), **evaluates}
    make_trainer(learning_rate=1e-6, peft_config=LoraConfig(r=2), **settings).train()
    assert not warnings_of(caplog)
    said = [record for record in caplog.records if record.getMessage().startswith("Verdict: not learned.")]
    assert len(said) == 1 and said[0].levelno == logging.INFO


def test_a_rise_stops_the_training_with_a_checkpoint_that_resumes(ruined, make_pairs, caplog, tmp_path):
    evaluates = {"eval_dataset": make_pairs(4, seed=1), "eval_strategy": "steps", "eval_steps": 2}
    trainer = ruined(**evaluates, on_winner_rise="stop")
    trainer.train()
    assert trainer.state.global_step == 2 and (tmp_path / "run" / "checkpoint-2").is_dir()
    (warning,) = warnings_of(caplog)
    assert "checkpoint-2" in warning
    written = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert (written["word"], written["step"]) == ("ruined", 2)
    resumed = ruined(**evaluates, on_winner_rise="ignore")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6 and len(warnings_of(caplog)) == 1


@pytest.mark.matrix
def test_a_rise_stops_where_the_best_weights_are_saved_and_loaded(ruined, make_pairs, tmp_path):
    """`save_strategy="best"` cancels saves of weights that are not the best."""
    best = {"save_strategy": "best", "load_best_model_at_end": True, "metric_for_best_model": "errors/winner_change"}
    evaluates = {"eval_dataset": make_pairs(4, seed=1), "eval_strategy": "steps", "eval_steps": 2}
    trainer = ruined(**best, **evaluates, greater_is_better=False, eval_on_start=True, on_winner_rise="stop")
    trainer.train()
    assert trainer.state.global_step == 2 and (tmp_path / "run" / "checkpoint-2").is_dir()


# ---- Measured --------------------------------------------------------------------------------------------------------


def evaluations_of(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "eval_errors/winner" in entry]


def test_few_pairs_are_evaluated_at_several_draws_of_noise(several_draws, make_trainer, make_pairs):
    """Six pairs get eight draws each. The last batch is not full."""
    seen: list[np.ndarray] = []
    settings = {"eval_dataset": make_pairs(6, seed=1), "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(**settings, compute_metrics=lambda evaluated: seen.append(evaluated.predictions) or {})
    trainer.train()
    last = evaluations_of(trainer)[-1]
    assert last["eval_errors/pairs"] == 6 and seen[-1].shape == (6, 2)
    assert last["eval_rewards/margins"] == pytest.approx(float(np.diff(-seen[-1]).mean()), rel=1e-4)
    assert 0 <= last["eval_errors/accuracy"] <= 1 and last["eval_errors/accuracy"] * 48 == pytest.approx(
        round(last["eval_errors/accuracy"] * 48)
    )
    measured = [level for level in range(8) if f"eval_errors/winner_change_relative_stderr@{level}" in last]
    assert len(measured) >= 6  # few draws fall into the bins of low noise
    encoded = []
    trainer.family.pipeline.text_encoder.register_forward_hook(lambda *call: encoded.append(len(call[1][0])))
    trainer.evaluate()
    assert encoded == [4, 2]  # each pair once


# ---- Written ---------------------------------------------------------------------------------------------------------


def test_the_file_has_the_numbers_and_the_images_of_equal_seeds(make_trainer, make_pairs, tmp_path):
    samples = {"sample_prompts": ["a red circle", "a blue square"], "sample_kwargs": {"num_inference_steps": 1}}
    evaluates = {"eval_dataset": make_pairs(6, seed=1), "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(**samples, **evaluates, max_steps=3)
    trainer.train()
    assert [entry["step"] for entry in evaluations_of(trainer)] == [2, 3]  # the weights that are saved
    written = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert written["step"] == 3
    change = 100 * (written["winner_error"] / written["winner_error_before"] - 1)
    assert written["winner_change_percent"] == pytest.approx(change) and 0 <= written["reward_accuracy"] <= 1
    assert [image["prompt"] for image in written["images"]] == samples["sample_prompts"]
    for image in written["images"]:
        before, after = (Image.open(tmp_path / "run" / image[when]) for when in ("before", "after"))
        assert before.info["seed"] == after.info["seed"] == str(image["seed"])


def test_unknown_values_and_values_that_are_no_number_are_null(tmp_path):
    write_verdict(tmp_path, verdict_on([]), [])
    assert json.loads((tmp_path / "verdict.json").read_text())["word"] == "unknown"
    write_verdict(tmp_path, verdict_on([evaluated(3, math.nan, math.nan)]), [])
    written = json.loads((tmp_path / "verdict.json").read_text())
    assert [written[name] for name in ("winner_error", "winner_error_before", "winner_change_percent")] == [None] * 3

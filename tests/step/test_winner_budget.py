"""The budget for the winners: its file, its probe against the model's own predictions, and its training."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig
from step.walks import ALPHAS, levels_of, trained_weights, walked, without_losers

from trl_diffusion_sdpo.step.winner_budget import BUDGET_FILE

SHUT = math.log(0.005)  # half of the lowest scale that is not 0


# ---- The probe -----------------------------------------------------------------------------------------------------


def probe_of(trainer):
    return trainer.winner_budget.make_probe(trainer._load_probe())


def begin(trainer):
    """Measure the probe for the first time, as the start of a training does."""
    trainer.winner_budget.begin(trainer.model_wrapped, trainer._load_probe())


def by_hand(unet, probe, parts):
    """Mean error of the winners at each level, from the model's own predictions in float64."""
    unet = copy.deepcopy(unet).double().eval()
    errors = [[] for _ in range(parts)]
    for batch in (winners.batch for winners in probe):
        with torch.no_grad():
            text = batch.conditioning["prompt_embeds"].double()
            predicted = unet(batch.noisy.double(), batch.timesteps, encoder_hidden_states=text).sample
        for row, level in enumerate(levels_of(batch.timesteps).tolist()):
            errors[int(level * parts)].append(float((predicted[row] - batch.target[row]).square().mean()))
    return errors


def test_the_probe_is_of_winners_at_every_level_and_its_errors_are_the_models(make_trainer, make_pairs):
    trainer = make_trainer(
        train=make_pairs(4),
        eval_dataset=make_pairs(9, seed=6),
        winner_budget=0.1,
        winner_budget_kwargs={"pairs": 3},
        per_device_train_batch_size=1,
    )
    begin(trainer)
    probe = probe_of(trainer)
    errors = by_hand(trainer.denoiser, probe, 8)
    assert [len(level) for level in errors] == [3] * 8
    expected = [sum(level) / 3 for level in errors]
    assert trainer.winner_budget.controller.initial_errors.tolist() == pytest.approx(expected, rel=1e-5)
    # The latents under the noise are those of the winners, of every third pair of the evaluation data.
    items = [trainer.eval_dataset.for_evaluation()[row] for row in (0, 3, 6)]
    latents, conditioning = trainer.pair_forward.encode(trainer.data_collator(items))
    for level in range(8):
        rows = [winners.batch for winners in probe if winners.noise_bins[0] == level]
        noisy = torch.cat([row.noisy for row in rows])
        noise = torch.cat([row.target for row in rows])
        timesteps = torch.cat([row.timesteps for row in rows])
        a = ALPHAS[timesteps].view(-1, 1, 1, 1)
        clean = (noisy - (1 - a).sqrt() * noise) / a.sqrt()
        torch.testing.assert_close(clean.float(), latents.chunk(2)[0], rtol=0, atol=1e-3)
        text = torch.cat([row.conditioning["prompt_embeds"] for row in rows])
        assert torch.equal(text, conditioning["prompt_embeds"].chunk(2)[0])


# ---- A training with one -------------------------------------------------------------------------------------------


@pytest.fixture
def build(make_trainer, make_pairs):
    """`build(**settings)`: a trainer with a small probe, measured after every step."""

    def trainer_of(**settings):
        given = {
            "train": make_pairs(8),
            "beta": 50.0,
            "winner_budget": 0.05,
            "winner_budget_kwargs": {"pairs": 2, "steps": 1},
            "lr_scheduler_type": "constant",
        }
        return make_trainer(**{**given, **settings})

    return trainer_of


def test_the_budget_is_measured_after_the_steps_that_are_asked_for(build):
    trainer = build(safeguard="parameter", max_steps=5, winner_budget_kwargs={"pairs": 2, "steps": 2})
    _, logs = walked(trainer)
    assert ["budget/winner_change" in log for log in logs] == [False, True, False, True, False]
    assert all("safeguard/loser_weight" in log for log in logs)


def test_the_logged_change_is_that_of_the_trained_model(build):
    trainer = build(max_steps=1, learning_rate=1e-3)
    _, logs = walked(trainer)
    initial = trainer.winner_budget.controller.initial_errors.tolist()
    now = [sum(level) / len(level) for level in by_hand(trainer.denoiser, probe_of(trainer), 8)]
    changes = [error / before - 1 for error, before in zip(now, initial, strict=True)]
    assert logs[0]["budget/winner_change"] == pytest.approx(max(changes), rel=1e-3, abs=1e-6)


def test_a_budget_that_is_never_reached_changes_no_bit_of_the_training(build):
    with_it, logs = walked(build(winner_budget=1e6, max_steps=3))
    without, _ = walked(build(winner_budget=None, max_steps=3))
    assert torch.equal(with_it, without)
    assert [log["budget/scale"] for log in logs] == [1, 1, 1]
    assert [log["budget/over"] for log in logs] == [0, 0, 0]


def test_levels_that_are_shut_train_their_winners_alone_to_the_bit(build):
    settings = {"safeguard": "output", "peft_config": LoraConfig(r=4), "learning_rate": 1e-2}
    shut = build(**settings, winner_budget_kwargs={"pairs": 2, "steps": 100})
    shut.winner_budget.controller.log_scale.fill_(SHUT)
    weights, logs = walked(shut)
    expected, _ = walked(without_losers(build(**settings, winner_budget=None)))
    assert torch.equal(weights, expected)
    assert [log["safeguard/loser_weight"] for log in logs] == [0, 0]


def test_scales_are_those_of_the_pairs_levels_and_multiply_the_range(build):
    trainer = build(loser_noise_range=[0.3, 1.0])
    trainer.winner_budget.controller.log_scale = (
        torch.tensor([0.5, 0.25, 0.125, SHUT]).repeat_interleave(2).clamp(min=0.005).log()
    )
    levels = torch.tensor([0.1, 0.29, 0.31, 0.6, 0.8])
    assert trainer.pair_forward.loser_weights(levels).tolist() == pytest.approx([0, 0, 0.25, 0.125, 0])


def test_a_budget_that_cannot_be_met_shuts_the_losers_training_goes_on(build):
    trainer = build(winner_budget=1e-9, learning_rate=0.05, optim="adamw_torch", max_steps=8, beta=500.0)
    _, logs = walked(trainer)
    assert len(logs) == 8 and all(math.isfinite(log["loss"]) for log in logs)
    assert logs[-1]["budget/unmet"] > 0 and logs[-1]["budget/over"] > 0
    assert logs[-1]["budget/winner_change"] > 1e-9
    assert (trainer.winner_budget.controller.scale == 0).any()
    assert logs[-1]["safeguard/loser_weight"] < logs[0]["safeguard/loser_weight"] == 1


def test_a_resumed_run_steers_on_as_if_undisturbed_to_the_bit(build, tmp_path):
    def make(folder, **more):
        where = {"output_dir": str(tmp_path / folder), "peft_config": LoraConfig(r=4)}
        return build(**where, winner_budget=1.0, max_steps=4, random_crop=True, **more)

    whole = make("whole", save_strategy="steps", save_steps=2)
    start = torch.linspace(-4.0, -3.0, 8)  # opens by about a half a step
    whole.winner_budget.controller.log_scale = start
    weights, logs = walked(whole)
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    state = json.loads((tmp_path / "whole" / "checkpoint-2" / BUDGET_FILE).read_text())
    scales = start.tolist(), state["log_scale"], whole.winner_budget.controller.log_scale.tolist()
    assert all(first < second < third < 0 for first, second, third in zip(*scales, strict=True))
    assert torch.equal(resumed.winner_budget.controller.log_scale, whole.winner_budget.controller.log_scale)
    assert torch.equal(resumed.winner_budget.controller.initial_errors, whole.winner_budget.controller.initial_errors)
    assert torch.equal(trained_weights(resumed), weights)
    later = [entry for entry in resumed.state.log_history if "loss" in entry][2:]
    for name in ("loss", "budget/winner_change", "budget/scale", "safeguard/loser_weight"):
        assert [entry[name] for entry in later] == [entry[name] for entry in logs[2:]], name


def test_the_probe_keeps_to_the_timesteps_that_training_draws(build):
    trainer = build(timestep_range=[0, 300])
    assert max(int(winners.batch.timesteps.max()) for winners in probe_of(trainer)) < 300
    trainer = build(timesteps=[999, 50])
    visited = {int(t) for winners in probe_of(trainer) for t in winners.batch.timesteps}
    assert visited == {999, 50}


def test_the_probes_winners_are_whom_the_scores_prefer(make_trainer, make_pairs):
    pairs = make_pairs(2)

    def scored_probe(chosen, rejected):
        scored = pairs.remove_columns(["chosen_score", "rejected_score"])
        scored = scored.add_column("chosen_score", chosen).add_column("rejected_score", rejected)
        trainer = make_trainer(train=scored, loss_type="smpo", winner_budget=0.1, winner_budget_kwargs={"pairs": 2})
        return trainer, probe_of(trainer)

    trainer, agreeing = scored_probe([2.0, 2.0], [1.0, 1.0])
    _, reversed_first = scored_probe([1.0, 2.0], [2.0, 1.0])
    inputs = trainer.data_collator(trainer.train_dataset.for_evaluation().sample(2))
    winners, losers = trainer.pair_forward.encode(inputs)[0].chunk(2)
    for mine, plain in ((mine.batch, plain.batch) for mine, plain in zip(reversed_first, agreeing, strict=True)):
        a = ALPHAS[mine.timesteps].view(-1, 1, 1, 1)
        moved = (mine.noisy - plain.noisy) / a.sqrt()
        expected = torch.stack([losers[0] - winners[0], torch.zeros_like(winners[1])])
        torch.testing.assert_close(moved.float(), expected, rtol=0, atol=1e-3)

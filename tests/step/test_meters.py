"""Losers within a range of noise levels, down to the last bit, and what evaluation says of each level."""

from dataclasses import replace

import pytest
import torch
from step.walks import levels_of, moved, walked, without_losers


def set_range(trainer, span):
    forward = trainer.pair_forward
    forward.loss_settings = replace(forward.loss_settings, loser_noise_range=span)


@pytest.fixture
def build(make_trainer, sd_folder):
    """`build(safeguard, **settings)`: a trainer of a policy that is not its reference."""

    def trainer_of(safeguard, **settings):
        settings = {"safeguard_mu": 0.5, "beta": 50.0, "max_steps": 2, "learning_rate": 1e-3, **settings}
        return make_trainer(moved(sd_folder), sd_folder, safeguard=safeguard, **settings)

    return trainer_of


# Levels that no pair is drawn at: next to the clean image.
NEVER = [0.0, 1e-6]


def assert_same_walk(first, second):
    assert torch.equal(first[0], second[0])
    for name in ("loss", "grad_norm", "rewards/margins", "errors/winner", "errors/loser_change"):
        assert [entry[name] for entry in first[1]] == [entry[name] for entry in second[1]], name


def loser_weights(walk):
    return [entry["safeguard/loser_weight"] for entry in walk[1]]


def test_an_empty_range_trains_the_winners_alone_to_the_bit(build):
    nowhere = build("parameter")
    set_range(nowhere, NEVER)  # a user's would be refused at set-up
    never, winners = walked(nowhere), walked(without_losers(build("parameter")))
    assert_same_walk(never, winners)
    assert loser_weights(never) == [0, 0] and "safeguard/loser_weight" not in winners[1][0]


def test_outside_a_range_a_pair_trains_its_winner_only(build):
    """Half a range: the levels of the drawn timesteps say, pair by pair, whose loser's branch is cut off."""
    safeguard = "parameter"
    ranged = walked(build(safeguard, loser_noise_range=[0.3, 0.7]))
    cut = without_losers(build(safeguard), lambda level: (level >= 0.3) & (level <= 0.7))
    assert_same_walk(ranged, walked(cut))
    assert any(0 < weight < 1 for weight in loser_weights(ranged))


def test_lambda_within_a_range_is_that_of_its_pairs(build):
    """Lambda of the first batch by hand: losers within the range against the winners of the same pairs."""
    trainer = build("output", loser_noise_range=[0.3, 0.7], max_steps=1)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        predictions = trainer.pair_forward.predict_pairs(trainer.model, inputs)
    batch, prediction = predictions.batch, predictions.policy
    levels = levels_of(batch.timesteps.chunk(2)[0])
    within = (levels >= 0.3) & (levels <= 0.7)
    assert within.any() and not within.all()
    winner, loser = ((prediction - batch.target).double().chunk(2)[half][within] for half in (0, 1))
    scale = min(1.0, 0.5 * float(winner.square().sum() / (winner * loser).sum()))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["safeguard/scale"] == pytest.approx(scale, rel=1e-4) and scale < 1
    assert log["safeguard/loser_weight"] == pytest.approx(float(within.double().mean()))


def test_each_noise_bin_has_its_own_lambda(build):
    trainer = build(
        "output", safeguard_kwargs={"granularity": "noise_bin"}, max_steps=1, per_device_train_batch_size=8
    )
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        predictions = trainer.pair_forward.predict_pairs(trainer.model, inputs)
    batch, prediction = predictions.batch, predictions.policy
    bins = (levels_of(batch.timesteps.chunk(2)[0]) * 8).long()
    assert 1 < len(bins.unique()) < len(bins)  # some bins have several pairs
    winner, loser = (prediction - batch.target).double().chunk(2)
    scales = torch.zeros(len(bins), dtype=torch.float64)
    for part in (bins == noise_bin for noise_bin in bins.unique()):
        dot = (winner * loser)[part].sum()
        scales[part] = (0.5 * winner[part].square().sum() / dot).clamp(0, 1) if dot > 0 else 1.0
    outputs = trainer.pair_forward.loss(replace(predictions, reference=prediction))
    assert outputs.scale.tolist() == pytest.approx(scales.tolist(), rel=1e-4)
    trainer.train()
    assert trainer.state.log_history[0]["safeguard/scale"] == pytest.approx(float(scales.mean()), rel=1e-4)


def test_a_batch_in_which_no_pair_of_any_process_counts_leaves_the_loss_of_kto_alone(build):
    """Such as the last one of a stream whose last pair cannot be decoded in any process."""
    trainer = build("none", loss_type="kto")
    trainer.pair_forward._average = torch.clone  # all processes have the same
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    measured = []
    for counts in ([4], [4, 0]):
        with torch.no_grad():
            predictions = trainer.pair_forward.predict_pairs(trainer.model, inputs)
            trainer._evaluation.begin(trainer.train_dataset, "eval", before_training=False)
            for real in counts:
                trainer._evaluation.add([predictions], real)
        measured.append(trainer._evaluation.drain(trainer.accelerator)["loss"])
    assert measured[0] == measured[1]


@pytest.mark.parametrize("real", [0, 3, 4])
def test_kto_is_evaluated_against_the_pairs_of_all_processes_that_count(build, real):
    """Another process has 2 pairs, with a mean gain of 0.5. Each process asks the others once a batch."""
    trainer = build("none", loss_type="kto", beta=4.0)
    calls = []

    def average(of_this_process):
        calls.append(of_this_process)
        return (of_this_process + torch.tensor([2 * 0.5, 2.0])) / 2

    forward = trainer.pair_forward
    forward._average = average
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        predictions = forward.predict_pairs(trainer.model, inputs)
        trainer._evaluation.begin(trainer.train_dataset, "eval", before_training=False)
        trainer._evaluation.add([predictions], real)
    target = predictions.batch.target
    policy, reference = (
        (prediction - target).double().square().flatten(1).mean(1)
        for prediction in (predictions.policy, predictions.reference)
    )
    gains = (reference - policy).view(2, 4)
    z = max(0.0, float((gains[:, :real].sum() / 2 + 2 * 0.5) / (real + 2)))
    winner, loser = gains[:, : real or 4]
    expected = (1 - torch.sigmoid(2 * (winner - z)) + 1 - torch.sigmoid(-2 * (loser - z))).mean() / 2
    assert len(calls) == 1 and z > 0
    measured = trainer._evaluation.drain(trainer.accelerator)
    assert ("loss" in measured) == (real > 0)
    assert measured.get("loss", float(expected)) == pytest.approx(float(expected), rel=1e-5)


# ---- Evaluation by noise level -------------------------------------------------------------------------------------


def recording(trainer):
    """Record the noise levels `(B,)` and errors `(B, 4)` of every batch that is predicted, in float64."""
    kept, original = [], trainer.pair_forward.predict_pairs

    def predict(model, inputs, weights=None):
        predictions = original(model, inputs, weights)
        batch = predictions.batch
        halves = [
            (prediction - batch.target).double().square().flatten(1).mean(1).chunk(2)
            for prediction in (predictions.policy, predictions.reference)
        ]
        errors = torch.stack([halves[0][0], halves[0][1], halves[1][0], halves[1][1]], 1)
        kept.append((levels_of(batch.timesteps.chunk(2)[0]), errors))
        return predictions

    trainer.pair_forward.predict_pairs = predict
    return kept


def by_level(levels, errors, parts):
    """Metrics by hand, pair by pair."""
    found = {}
    for level in sorted({int(value * parts) for value in levels.tolist()}):
        rows = [errors[i].tolist() for i in range(len(levels)) if int(levels[i] * parts) == level]
        for name, ours, theirs in (("winner", 0, 2), ("loser", 1, 3)):
            change = sum(row[ours] - row[theirs] for row in rows)
            found[f"errors/{name}_change@{level}"] = change / len(rows)
            found[f"errors/{name}_change_relative@{level}"] = change / sum(row[theirs] for row in rows)
    return found


def of_levels(metrics):
    changes = {name: value for name, value in metrics.items() if "@" in name and "stderr" not in name}
    return {name.removeprefix("eval_"): value for name, value in changes.items()}


def test_an_evaluation_reports_the_change_in_each_noise_bin(make_trainer, make_pairs, sd_folder):
    trainer = make_trainer(moved(sd_folder), sd_folder, eval_dataset=make_pairs(10, seed=4))
    kept = recording(trainer)
    metrics = trainer.evaluate()
    levels, errors = (torch.cat([batch[place] for batch in kept]) for place in (0, 1))
    expected = by_level(levels, errors, 8)
    assert len(levels) == 10
    assert of_levels(metrics) == pytest.approx(expected, rel=1e-4, abs=5e-7)
    assert metrics["eval_errors/winner_change"] == pytest.approx(float((errors[:, 0] - errors[:, 2]).mean()), rel=1e-4)


def test_without_a_reference_the_change_is_that_since_the_evaluation_before_training(make_trainer, make_pairs):
    metrics = make_trainer(eval_dataset=make_pairs(4, seed=4), loss_type="mapo").evaluate()
    assert set(of_levels(metrics).values()) == {0.0} and "eval_errors/winner_change" not in metrics


def test_a_range_without_a_timestep_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"`loser_noise_range`.*0.028 to 0.936"):
        make_trainer(loser_noise_range=[0.95, 1.0])

"""The front's rules that the package lacks do what they are named after, and its rows are not mixed with those of
another measurement."""

import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from trl_diffusion_sdpo.step.branch_gradients import ANCHOR, LOSER, WINNER
from trl_diffusion_sdpo.step.noisy_batch import NoisyBatch, PairPredictions

BRANCHES = (WINNER, LOSER, ANCHOR)
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def front(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import front

    yield front
    for name in ("front", "front_plan", "front_report", "front_trainers"):
        sys.modules.pop(name)


@pytest.fixture
def front_plan(front):
    import front_plan

    return front_plan


@pytest.fixture
def front_report(front):
    import front_report

    return front_report


@pytest.fixture
def make_tried(front, sd_folder, make_args, make_pairs):
    """`make_tried(tried, **args)`: a trainer of the tried rules on tiny parts."""

    def build(tried, **args):
        common = {"resolution": 16, "random_flip": False, "beta": 100.0}
        return front.TriedTrainer(
            sd_folder, None, make_args(**common, **args), make_pairs(8), make_pairs(4, seed=1), **tried
        )

    return build


def test_the_terms_are_shares_of_the_references_error_up_to_a_noise_level(make_tried):
    trainer = make_tried({"winner_error": 2.0, "reference_pull": 3.0, "pull_below": 0.5})
    target = torch.zeros(4, 1, 1, 1)
    ref_pred = torch.full((4, 1, 1, 1), 2.0)  # error 4
    pred = torch.full((4, 1, 1, 1), 3.0).requires_grad_()  # winner's error 9, distance from the reference 1
    levels = torch.tensor([0.25, 0.75, 0.25, 0.75])
    batch = NoisyBatch(target, target, levels, {}, levels)
    predictions = PairPredictions(batch, pred, ref_pred, None)
    more = trainer.pair_forward.loss(predictions).loss
    trainer.rules.winner_error = trainer.rules.reference_pull = 0.0
    plain = trainer.pair_forward.loss(predictions).loss
    # (2 * 9 + 3 * 1) / 4 below the level, 2 * 9 / 4 above it
    assert (more - plain).item() == pytest.approx((5.25 + 4.5) / 2, rel=1e-5)


def test_relative_errors_weigh_as_one_over_the_references_in_units_of_their_mean(make_tried):
    trainer = make_tried({"relative": True}, safeguard="none")
    target = torch.zeros(4, 1, 1, 1)
    ref_pred = torch.tensor([1.0, 2.0, 1.0, 2.0]).view(4, 1, 1, 1)  # errors 1 and 4: weights 1.6 and 0.4
    pred = torch.tensor([0.5, 1.0, 2.0, 3.0]).view(4, 1, 1, 1).requires_grad_()
    levels = torch.full((4,), 0.5)
    batch = NoisyBatch(target, target, levels, {}, levels)
    rewards = trainer.pair_forward.loss(PairPredictions(batch, pred, ref_pred, None)).pair_rewards
    # beta / 2 = 50 times the weighted fall of the error: winners 1 - 1/4 and 4 - 1, losers 1 - 4 and 4 - 9
    expected = 50 * torch.tensor([[1.6 * 0.75, 1.6 * -3.0], [0.4 * 3.0, 0.4 * -5.0]])
    torch.testing.assert_close(rewards, expected)


def test_a_constant_lambda_scales_the_losers_gradient_and_nothing_else(make_tried):
    def gradient(share):
        trainer = make_tried({"loser_share": share}, safeguard="none")
        target = torch.zeros(2, 1, 1, 1)
        pred = torch.tensor([0.5, 0.7]).view(2, 1, 1, 1).requires_grad_()
        levels = torch.full((2,), 0.5)
        batch = NoisyBatch(target, target, levels, {}, levels)
        loss = trainer.pair_forward.loss(PairPredictions(batch, pred, target + 0.6, None)).loss
        loss.backward()
        return loss.item(), pred.grad.flatten()

    (whole, all_of_it), (scaled, part) = gradient(1.0), gradient(0.3)
    assert scaled == whole
    torch.testing.assert_close(part, all_of_it * torch.tensor([1.0, 0.3]))


@pytest.mark.parametrize(("largest", "cuts"), [(0.24, 2), (0.26, 0)])
def test_the_trust_region_cuts_the_rate_whenever_the_probe_is_over_it(make_tried, largest, cuts):
    settings = {"winner_budget": 1e6, "winner_budget_pairs": 2, "winner_budget_steps": 1, "num_noise_bins": 3}
    trainer = make_tried({"trust_region": largest}, **settings)
    # Two steps; a quarter up at one level after each, less at another, and one that the schedule does not visit.
    risen = torch.tensor([1.25, 2.2, float("nan")])
    start = torch.tensor([1.0, 2.0, float("nan")])
    trainer.winner_budget.measure = lambda: risen if trainer.state.global_step else start
    trainer.train()
    assert trainer.lr_scheduler.base_lrs[0] == pytest.approx(1e-3 * 0.7**cuts)


def test_the_fresh_anchor_is_the_error_gradient_of_the_winners_before(make_tried):
    settings = {"safeguard": "parameter", "safeguard_anchor": "error", "safeguard_mu": 0.6}
    trainer = make_tried({"fresh_anchor": True}, **settings)
    seen, met, set_up = [], [], trainer.set_up_safeguard

    def watched(combine):
        met.append(trainer.parameter_safeguard.met)
        before = met[-2] if len(met) > 1 else met[-1]  # the first batch has none before it
        weights = [weight for weight in trainer.denoiser.parameters() if weight.requires_grad]
        text = before.conditioning["prompt_embeds"]
        predicted = trainer.denoiser(before.noisy, before.timesteps, encoder_hidden_states=text).sample
        error = (predicted - before.target).square().mean()
        by_hand = flat(torch.autograd.grad(error, weights, allow_unused=True), weights)
        branches = trainer.parameter_safeguard.gradients.gradients
        winner, loser, anchor = (flat(branches[name], weights) for name in BRANCHES)
        torch.testing.assert_close(anchor, by_hand, rtol=1e-4, atol=1e-7)
        fall, rise = (by_hand @ part for part in (winner, loser))
        seen.append(float((0.4 * fall / rise).clamp(0, 1)) if rise > 0 and fall > 0 else float(fall > 0))
        combine()

    def set_up_watched():
        set_up()
        trainer.parameter_safeguard.step = partial(watched, trainer.parameter_safeguard.step)

    trainer.set_up_safeguard = set_up_watched
    trainer.train()
    logged = [entry["safeguard/scale"] for entry in trainer.state.log_history if "safeguard/scale" in entry]
    assert len(seen) == 2 and logged == pytest.approx(seen, rel=1e-3)


def flat(gradient, weights):
    parts = zip(gradient, weights, strict=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).detach().double().flatten() for g, w in parts])


def test_a_row_counts_as_made_only_with_the_same_settings_and_measurement(front, front_plan, tmp_path):
    (run,) = front_plan.planned({"output": (0.6,)}, range(1))
    row = {**asdict(run), "key": run.key, "how": front.HOW}
    assert run.is_made(row)
    assert not run.is_made(None)
    assert not run.is_made({**row, "how": {**front.HOW, "samples": 3}})
    assert not replace(run, settings={**run.settings, "safeguard_mu": 0.7}).is_made(row)
    file = tmp_path / "front.jsonl"
    file.write_text(front.json.dumps({**row, "how": None}) + "\n")
    with pytest.raises(SystemExit, match="must be measured alike; 1 in"):
        front.report(file, "final", tmp_path)


def test_a_failed_run_is_reported_and_the_others_are_made(front, front_plan, tmp_path, monkeypatch, capsys):
    """Without processes of their own, which would not see what is put in here."""
    bad, good = front_plan.planned({"DPO": (0.0,), "output": (0.6,)}, range(1))

    def made(run):
        if run == bad:
            raise FloatingPointError("the loss is not finite")
        return {"key": run.key, "measured": {"selection": {"raw": {"oracle": 0.5, "winner": 0.1}}}}

    class Pool:
        def __init__(self, workers, maxtasksperchild): ...
        def __enter__(self):
            return self

        def __exit__(self, *error): ...
        def imap_unordered(self, function, runs):
            return map(function, runs)

    monkeypatch.setattr(front, "make", made)
    monkeypatch.setattr(front.multiprocessing, "get_context", lambda kind: type("Context", (), {"Pool": Pool}))
    file = tmp_path / "front.jsonl"
    with pytest.raises(SystemExit, match="1 of 2 runs failed and have no row: DPO"):
        front.make_all([bad, good], file, 1)
    assert list(front.rows_of(file)) == [good.key]
    assert "FAILED: FloatingPointError: the loss is not finite" in capsys.readouterr().out


def test_over_sft_is_paired_by_seed_and_takes_the_worst_level(front_report):
    import numpy as np

    def point(seeds, levels):
        return front_report.Point("output", 0.6, seeds, np.zeros(len(seeds)), np.zeros(len(seeds)), np.array(levels))

    mine = point((0,), [[0.10, 0.30]])
    theirs = point((0, 1), [[0.05, 0.20], [0.50, 0.90]])
    assert mine.over(theirs) == "+10"  # seed 1 is not asked
    assert mine.over(point((2,), [[0.0, 0.0]])) == ""
    assert mine.over(None) == ""

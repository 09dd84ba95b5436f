"""The controller of the winner budget, by hand."""

import json
import math

import pytest
import torch

from trl_diffusion_sdpo.losses import BudgetController

NAN = float("nan")
SHUT = math.log(0.005)  # half of the lowest scale that is not 0


def loop(bins=3, budget=0.1, before=(1.0, 2.0, 4.0)):
    made = BudgetController(budget, bins, torch.device("cpu"))
    made.steer(torch.tensor(before))
    return made


def steer(made, *errors):
    return {name: float(value) for name, value in made.steer(torch.tensor(errors)).items()}


def test_a_scale_moves_by_half_its_distance_from_the_budget():
    made = BudgetController(0.25, 3, torch.device("cpu"))
    # The first errors are those before training.
    assert steer(made, 1.0, 2.0, 4.0) == {f"budget/{name}": 0 for name in ("winner_change", "over", "unmet")} | {
        "budget/scale": 1
    }
    # Changes of 3/8, 1/4 and -1/8 against 1/4: moves of half of -1/2, 0 and 3/2, the last one from the top.
    found = steer(made, 1.375, 2.5, 3.5)
    assert made.log_scale.tolist() == [-0.25, 0, 0]
    assert found["budget/winner_change"] == 0.375
    assert found["budget/scale"] == pytest.approx((math.exp(-0.25) + 2) / 3, rel=1e-6)
    assert found["budget/over"] == pytest.approx(1 / 3) and found["budget/unmet"] == 0
    # 1/8, 0 and -1: half of 1/2, 1 and 5.
    steer(made, 1.125, 2.0, 0.0)
    assert made.log_scale.tolist() == [0, 0, 0]


def test_one_measurement_moves_it_by_one_and_a_half_at_most():
    made = loop()
    steer(made, 100.0, 2.0, 4.0)
    assert made.log_scale.tolist() == pytest.approx([-1.5, 0, 0])
    made.log_scale[0] = -4.0
    steer(made, -100.0, 2.0, 4.0)  # as far as a measurement goes upwards
    assert made.log_scale.tolist() == pytest.approx([-2.5, 0, 0])


def test_below_a_hundredth_a_level_is_shut_and_only_then_the_budget_is_unmet():
    made = loop()
    scales, unmet = [], []
    for _ in range(5):
        unmet.append(steer(made, 9.0, 2.0, 4.0)["budget/unmet"])
        scales.append(float(made.scale[0]))
    assert scales == pytest.approx([math.exp(-1.5), math.exp(-3), math.exp(-4.5), 0, 0])  # e^-4.5 is 0.011
    assert unmet == pytest.approx([0, 0, 0, 0, 1 / 3])  # over it though shut when it was measured
    assert float(made.log_scale[0]) == pytest.approx(SHUT)
    # Unchanged winners are half a step upwards: e^0.5 * 0.005 = 0.0082 is still shut, e * 0.005 = 0.0136 is not.
    assert steer(made, 1.0, 2.0, 4.0)["budget/unmet"] == 0 and made.scale[0] == 0
    steer(made, 1.0, 2.0, 4.0)
    assert float(made.scale[0]) == pytest.approx(0.005 * math.e, rel=1e-5)


def test_while_a_shut_level_is_over_the_budget_the_others_are_scaled_down_as_fast():
    made = loop()
    made.log_scale = torch.tensor([SHUT, 0.0, -1.0])
    # Changes of 20, 5 and -10 per cent against 10: own moves of -0.5, 0.25 and 1; the first level is shut already.
    found = steer(made, 1.2, 2.1, 3.6)
    assert made.log_scale.tolist() == pytest.approx([SHUT, -0.5, -1.5], abs=1e-5)
    assert found["budget/unmet"] == pytest.approx(1 / 3)
    # A level that does worse still goes faster: 40 per cent there is -1.5.
    steer(made, 1.2, 2.8, 4.0)
    assert made.log_scale.tolist() == pytest.approx([SHUT, -2.0, -2.0], abs=1e-5)
    # Within the budget again: every level moves on its own, also one that is still shut.
    steer(made, 1.0, 2.0, 4.0)
    assert made.log_scale.tolist() == pytest.approx([SHUT + 0.5, -1.5, -1.5], abs=1e-5)


def test_levels_that_the_schedule_does_not_visit_count_for_nothing():
    made = loop(before=(NAN, 2.0, 4.0))
    found = steer(made, NAN, 2.4, 3.6)  # 20 and -10 per cent
    assert made.log_scale[1:].tolist() == pytest.approx([-0.5, 0], abs=1e-5)
    assert found["budget/winner_change"] == pytest.approx(0.2, rel=1e-4)
    assert found["budget/scale"] == pytest.approx((math.exp(-0.5) + 1) / 2, rel=1e-4)
    assert found["budget/over"] == pytest.approx(1 / 2) and found["budget/unmet"] == 0
    assert made.scale[0] == 1


def test_each_pair_gets_the_scale_of_its_level():
    made = loop(bins=4, before=(1.0,) * 4)
    made.log_scale = torch.tensor([0.0, math.log(0.5), math.log(0.25), SHUT])
    levels = torch.tensor([0.0, 0.249, 0.25, 0.5, 0.74, 0.75, 1.0])
    assert made.weights(levels).tolist() == pytest.approx([1, 1, 0.5, 0.25, 0.25, 0, 0])


def test_errors_that_are_no_numbers_shut_their_level_and_then_the_others():
    budget = loop(bins=2, before=(1.0, 1.0))
    scales = []
    for _ in range(8):
        metrics = budget.steer(torch.tensor([float("nan"), 1.0]))
        scales.append(budget.scale.tolist())
    assert scales[3] == [0.0, 1.0]  # e^-6
    assert scales[4] == pytest.approx([0.0, math.exp(-1.5)])
    assert scales[7] == [0.0, 0.0]
    assert metrics["budget/over"] == metrics["budget/unmet"] == 0.5


def test_its_state_is_read_as_it_was_written_to_the_bit():
    made = loop(before=(NAN, 2.0, 4.0))
    steer(made, NAN, 2.345678, 4.56789)
    other = BudgetController(0.1, 3, torch.device("cpu"))
    other.load_state(json.loads(json.dumps(made.state(), allow_nan=False)))
    assert torch.equal(other.log_scale, made.log_scale)
    assert torch.equal(other.initial_errors[1:], made.initial_errors[1:]) and other.initial_errors[0].isnan()
    other.load_state(BudgetController(0.1, 3, torch.device("cpu")).state())
    assert other.initial_errors.isnan().all() and other.scale.tolist() == [1, 1, 1]

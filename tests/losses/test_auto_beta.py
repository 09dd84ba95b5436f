"""The beta that follows the margins: its start, its rule and its bounds by hand, and its state to the bit."""

import json
import math

import pytest
import torch

from trl_diffusion_sdpo.losses import BetaController, diffusion_preference_loss


def controller(beta=500.0):
    return BetaController(beta, torch.device("cpu"))


def test_a_margin_of_average_size_has_the_factor_one_fifth():
    """Two hundred times 200 steps at one margin: the average is that margin, and sigma(-beta / 2 m) is 0.2."""
    steered, margin = controller(), torch.tensor(2e-3)
    for _ in range(4000):
        steered.steer(margin)
    assert steered.beta.item() == pytest.approx(2 * math.log(4) / 2e-3, rel=1e-4)  # 1386, 2.77 / m
    leaf = torch.tensor([0.5, 0.5 + 2e-3], dtype=torch.float64).sqrt().view(2, 1).requires_grad_()
    reference = torch.tensor([[0.5], [0.5]], dtype=torch.float64).sqrt()
    settings = {"safeguard": "none", "beta": steered.beta}
    diffusion_preference_loss(leaf, torch.zeros(2, 1), reference, **settings).loss.backward()
    # dL / d err_w = (beta / 2) sigma(-u), d err / d prediction = 2 prediction
    factor = leaf.grad[0].item() / (steered.beta.item() / 2 * 2 * leaf[0].item())
    assert factor == pytest.approx(0.2, rel=1e-3)


def test_one_step_is_the_average_by_hand():
    steered = controller(500.0)
    steered.steer(torch.tensor(0.01))
    start = 2 * math.log(4) / 500
    assert steered.beta.item() == pytest.approx(2 * math.log(4) / (0.99 * start + 0.01 * 0.01), rel=1e-6)
    steered.steer(torch.tensor(0.0))
    assert steered.beta.item() == pytest.approx(2 * math.log(4) / (0.99 * (0.99 * start + 1e-4)), rel=1e-6)


def test_margins_of_zero_move_it_by_a_hundredth_a_step_up_to_ten_times():
    steered = controller()
    steered.steer(torch.zeros(()))
    assert steered.beta.item() == pytest.approx(500 / 0.99, rel=1e-6)
    for _ in range(10_000):  # the average underflows
        steered.steer(torch.zeros(()))
    assert steered.beta.item() == 5000.0
    for _ in range(2000):
        steered.steer(torch.tensor(1e3))
    assert steered.beta.item() == 50.0


def test_the_sizes_of_margins_are_read_from_rewards_of_the_present_beta():
    steered = controller(500.0)
    # rewards are -(beta / 2) d: with d_w = -0.01, 0.02 and d_l = 0.03, 0.01 margins d_l - d_w are 0.04 and -0.01
    rewards = torch.tensor([[2.5, -7.5], [-5.0, -2.5]])
    assert steered.margins(rewards).tolist() == pytest.approx([0.04, 0.01])


def test_its_state_continues_to_the_bit():
    first, second = controller(), controller()
    for size in (1e-3, 0.1234567, 3e-5):
        first.steer(torch.tensor(size))
    second.load_state(json.loads(json.dumps(first.state())))
    assert torch.equal(first.beta, second.beta)
    for steered in (first, second):
        steered.steer(torch.tensor(7.654321e-3))
    assert torch.equal(first.beta, second.beta)

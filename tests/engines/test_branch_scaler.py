"""The two branches under fp16's loss scale. No CPU trains in fp16, so this is torch's scaler on a line, without a
trainer."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trl_diffusion_sdpo.engines.gradient_backends import ReplicatedBackend
from trl_diffusion_sdpo.step.branch_gradients import ANCHOR, LOSER, WINNER, BranchGradients

RATE = 0.5


def one_step(scaler, winner: list[float], loser: list[float], error: list[float] | None = None):
    """A step of SGD from (1, 2) on branches with these gradients; the weights after it and what `combine` said."""
    line = nn.Linear(2, 1, bias=False)
    line.weight.data = torch.tensor([[1.0, 2.0]])
    optimizer = torch.optim.SGD(line.parameters(), lr=RATE)
    accelerator = SimpleNamespace(scaler=scaler, num_processes=1, no_sync=lambda model: contextlib.nullcontext())
    branches = BranchGradients(
        ReplicatedBackend(line, accelerator), mu=0.5, anchor="branch" if error is None else "error"
    )
    branches.backward(WINNER, line(torch.tensor([winner])).sum())
    branches.backward(LOSER, line(torch.tensor([loser])).sum())
    if error is not None:
        branches.backward(ANCHOR, line(torch.tensor([error])).sum())
    metrics, finite = branches.combine()
    if scaler is None:
        optimizer.step()
    else:
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return line.weight.detach().flatten(), metrics, finite


@pytest.mark.parametrize("scale", [None, 2.0**16])
def test_lambda_and_the_step_do_not_depend_on_the_loss_scale(scale):
    """W = (1, 0), L = (1, 1): W.W = 1, W.L = 1, so lambda = (1 - mu) = 0.5 and W - lambda L = (0.5, -0.5)."""
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    weights, metrics, finite = one_step(scaler, winner=[1.0, 0.0], loser=[1.0, 1.0])
    assert bool(finite) and float(metrics["safeguard/scale"]) == pytest.approx(0.5)
    assert weights.tolist() == pytest.approx([1 - RATE * 0.5, 2 + RATE * 0.5])


@pytest.mark.parametrize("overflowing", ["loser", "error"])
def test_a_branch_or_an_anchor_that_overflows_leaves_the_step_out_and_lowers_the_scale(overflowing):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    gradients = {"winner": [1.0, 0.0], "loser": [1.0, 1.0], "error": [1.0, 1.0], overflowing: [float("inf"), 1.0]}
    weights, metrics, finite = one_step(scaler, **gradients)
    assert not bool(finite) and float(metrics["safeguard/scale"]) == 0
    assert weights.tolist() == [1.0, 2.0]
    assert scaler.get_scale() == 512.0

"""The bound of lambda by AdamW's own step, against torch's AdamW itself and by hand."""

from types import SimpleNamespace

import pytest
import torch

from trl_diffusion_sdpo.engines.gradient_backends import ReplicatedBackend, split_adam_state
from trl_diffusion_sdpo.engines.gradients import inner_products
from trl_diffusion_sdpo.losses import adamw_scale
from trl_diffusion_sdpo.losses.adamw import AdamWState, adamw_products, clip_scale
from trl_diffusion_sdpo.step.branch_gradients import LOSER, WINNER, BranchGradients

SHAPES = [(3, 4), (5,), (2, 2)]
ONE_PROCESS = SimpleNamespace(scaler=None, num_processes=1)


def drawn(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


@pytest.mark.parametrize("steps_before", [0, 1, 5])
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_products_say_how_far_torchs_adamw_moves_along_the_anchor(steps_before, max_norm, scale):
    weights = [torch.nn.Parameter(part.float()) for part in drawn(0)]
    groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0, "lr": 5e-4}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.95), eps=1e-4)

    def step(gradient):
        for weight, part in zip(weights, gradient, strict=True):
            weight.grad = part.float().clone()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(weights, max_norm)
        optimizer.step()

    for number in range(steps_before):
        step(drawn(10 + number))
    winner, loser, anchor = drawn(1), drawn(2), drawn(3)
    gradients = [[part.float() for part in parts] for parts in (winner, loser, anchor)]
    states = ReplicatedBackend(torch.nn.ParameterList(weights), ONE_PROCESS).adam_states(optimizer)
    lam = torch.tensor(scale)
    clip = clip_scale(inner_products(gradients), lam, max_norm, 1.0)
    history, fresh, held = adamw_products(states, weights, gradients, 2, lam, clip)

    before = [weight.detach().clone() for weight in weights]
    step([w - scale * part for w, part in zip(winner, loser, strict=True)])
    moved = sum(
        ((now.detach() - then).double() * a).sum() for now, then, a in zip(weights, before, anchor, strict=True)
    )
    torch.testing.assert_close(-(history + fresh - scale * held), moved, rtol=1e-3, atol=1e-7)


def test_the_first_step_of_adamw_without_history_by_hand():
    # One weight 2, W = 3, L = 1, a = 5, lambda 1: g = 2. v = (1 - b2) 4, corrected 4, its root 2; m corrected: 2.
    state = AdamWState(None, None, 0.0, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.5})
    gradients = [[torch.tensor([value])] for value in (3.0, 1.0, 5.0)]
    clip = torch.tensor(1.0, dtype=torch.float64)
    sums = adamw_products([state], [torch.tensor([2.0])], gradients, 2, torch.tensor(1.0), clip)
    # a lr wd theta = 5 * 0.1 * 0.5 * 2; a lr W / 2 = 5 * 0.1 * 3 / 2; a lr L / 2.
    torch.testing.assert_close(sums, torch.tensor([0.5, 0.75, 0.25], dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("products", "mu", "expected"),
    [
        ((0.0, 1.0, 2.0), 0.0, 0.5),  # the plain form
        ((0.0, 1.0, 2.0), 0.5, 0.25),
        ((-0.5, 1.0, 2.0), 0.0, 0.25),  # momentum that goes the other way leaves less room
        ((-2.0, 1.0, 2.0), 0.0, 0.0),  # or none
        ((5.0, 1.0, 2.0), 0.0, 1.0),
        ((-5.0, 1.0, -2.0), 0.9, 1.0),  # the loser helps
        ((0.5, -0.4, 1.0), 0.5, 0.1),  # a winner's gradient that the preconditioner turns round: no rise is asked for
    ],
)
def test_the_bound_by_hand(products, mu, expected):
    assert adamw_scale(torch.tensor(products, dtype=torch.float64), mu) == pytest.approx(expected)


def test_the_gradient_is_clipped_as_the_trainer_clips_it():
    gradients = [[part] for part in (torch.tensor([3.0, 0.0]), torch.tensor([0.0, 8.0]))]
    products = inner_products(gradients)
    # W - 0.5 L = (3, -4), of norm 5; scaled up by 4 for fp16 it would be 1.25.
    assert clip_scale(products, torch.tensor(0.5), 1.0, 1.0) == pytest.approx(1 / 5, rel=1e-5)
    assert clip_scale(products, torch.tensor(0.5), 10.0, 1.0) == 1
    assert clip_scale(products, torch.tensor(0.5), None, 4.0) == 0.25
    assert clip_scale(products, torch.tensor(0.5), 1.0, 4.0) == pytest.approx(0.25 / 1.25, rel=1e-5)


def test_a_flat_shards_state_is_split_as_its_weights_are():
    state = AdamWState(torch.arange(6.0), torch.arange(6.0) * 2, 3.0, {})
    first, second = split_adam_state(state, [2, 3])
    assert first.first.tolist() == [0, 1] and second.second.tolist() == [4, 6, 8]
    assert all(part.first is None for part in split_adam_state(AdamWState(None, None, 0.0, {}), [2, 3]))


@pytest.mark.parametrize("anchor", ["branch", "error"])
def test_a_trainers_lambda_is_at_most_the_plain_one(make_trainer, anchor):
    """Same first batch, same weights: only the metric differs. From the second step on the momentum counts."""
    settings = {"safeguard": "parameter", "safeguard_mu": 0.1, "safeguard_anchor": anchor, "beta": 200.0}
    logs = {}
    for metric in ("plain", "adamw"):
        trainer = make_trainer(safeguard_preconditioner=metric, max_steps=1, **settings)
        trainer.train()
        logs[metric] = trainer.state.log_history[0]["safeguard/scale"]
    assert 0 <= logs["adamw"] <= logs["plain"]
    trainer = make_trainer(safeguard_preconditioner="adamw", max_steps=4, gradient_accumulation_steps=2, **settings)
    trainer.train()
    assert all(0 <= entry["safeguard/scale"] <= 1 for entry in trainer.state.log_history[:4])


def test_other_optimizers_and_output_space_are_refused(make_trainer, make_args):
    with pytest.raises(ValueError, match="needs torch's AdamW, got Adafactor"):
        make_trainer(safeguard="parameter", safeguard_preconditioner="adamw", optim="adafactor").train()
    with pytest.raises(ValueError, match="`safeguard_preconditioner='adamw'` needs `safeguard='parameter'`"):
        make_args(safeguard_preconditioner="adamw")
    with pytest.raises(ValueError, match="`safeguard_preconditioner` must be one of plain, adamw"):
        make_args(safeguard="parameter", safeguard_preconditioner="adam")


@pytest.mark.parametrize(("loser", "expected"), [((4.0, 3.0), 0.5), ((0.0, 5.0), 0.45)])
def test_the_bound_is_the_smaller_of_the_two(loser, expected):
    """W = (1, 2), so W.W = 5; W.L = 10 gives 0.5 by the plain rule. There the first step of AdamW without epsilon
    divides by |W - L / 2|, which is (1, 1/2): W becomes (1, 4), and the two bounds are 9 / 16 and 9 / 20."""
    line = torch.nn.Linear(2, 1, bias=False)
    adamw = torch.optim.AdamW(line.parameters(), eps=0.0, weight_decay=0.0)
    branches = BranchGradients(ReplicatedBackend(line, ONE_PROCESS), mu=0.0, anchor="branch", adamw=adamw)
    branches.backward(WINNER, line(torch.tensor([[1.0, 2.0]])).sum())
    branches.backward(LOSER, line(torch.tensor([loser])).sum())
    metrics, _, _ = branches.combine()
    assert float(metrics["safeguard/scale"]) == pytest.approx(expected, rel=1e-6)

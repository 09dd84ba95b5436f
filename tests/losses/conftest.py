"""Fixtures of the loss tests: seeded pairs, and every loss written a second time in float64."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch


def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return -torch.log1p(torch.exp(-x))


def decay(x: torch.Tensor) -> torch.Tensor:
    return x / torch.expm1(x)


def dmpo(p: torch.Tensor, alpha: float) -> torch.Tensor:
    return p * torch.log(p / (1 - alpha)) + (1 - p) * torch.log((1 - p) / alpha)


def linear_weight(change: torch.Tensor, eta: float) -> torch.Tensor:
    return (0.2 * change + 0.5).clamp(eta, 1 - eta).detach()


def mean_square(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().mean(1)


# Functions of `s`, with errors `w` and `l` of winner and loser, their changes `dw` and `dl`, the logit `u`, `p` its
# sigmoid, rewards `rw` and `rl`, `b` for beta, the winner's `shift` from the reference and `residual`, `gap` of scores;
# and of the loss's own settings `k`.
AGAIN = {
    "sigmoid": lambda s, k: -log_sigmoid(s.u),
    "hinge": lambda s, k: (1 - s.u).clamp(min=0),
    "ipo": lambda s, k: (s.u / s.b - 1 / (2 * s.b)) ** 2,
    "robust": lambda s, k: (
        (-(1 - k["label_smoothing"]) * log_sigmoid(s.u) + k["label_smoothing"] * log_sigmoid(-s.u))
        / (1 - 2 * k["label_smoothing"])
    ),
    "dspo": lambda s, k: mean_square(s.residual - s.b * (1 - s.p).view(-1, 1) * s.shift),
    "dspo_sdxl": lambda s, k: (
        (1 - s.p) ** 2 * (mean_square(s.shift) if s.shift.square().mean() >= k["dspo_threshold"] else 1)
    ),
    "dmpo": lambda s, k: dmpo(s.p, k["dmpo_alpha"]),
    "sft": lambda s, k: s.w,
    "mapo": lambda s, k: (
        s.w - s.b * log_sigmoid(k["mapo_temperature"] * (decay(k["mapo_scale"] * s.w) - decay(k["mapo_scale"] * s.l)))
    ),
    "simpo": lambda s, k: -log_sigmoid(-s.b / 2 * (s.w - s.l) - k["simpo_gamma"]),
    "dpop": lambda s, k: -log_sigmoid(s.u - k["dpop_lambda"] * s.b / 2 * s.dw.clamp(min=0)),
    "linear": lambda s, k: linear_weight(s.b * (s.dw - s.dl), k["linear_eta"]) * (s.w - s.l),
    "smpo": lambda s, k: (
        -log_sigmoid(k["smpo_coefficient"] * (2 * torch.sigmoid(s.gap / k["smpo_score_scale"]) - 1) * s.u)
    ),
    "capo": lambda s, k: (s.u - s.gap) ** 2,
    # TRL's dpo_trainer.py, with `beta * logratios` for these rewards
    "apo_zero": lambda s, k: (1 - torch.sigmoid(s.rw)) + torch.sigmoid(s.rl),
    "apo_down": lambda s, k: torch.sigmoid(s.rw) + (1 - torch.sigmoid(s.rw - s.rl)),
    "tgo": lambda s, k: -(log_sigmoid(s.rw) + log_sigmoid(-s.rl)) / 2,
    "kto": lambda s, k: kto(torch.cat([s.rw, s.rl]), k["kto_loser_weight"]),
}


def kto(rewards: torch.Tensor, weight: float) -> torch.Tensor:
    """Diffusion-KTO, image by image, with labels of 1 and -1 as the authors' code has them."""
    pairs = len(rewards) // 2
    label = torch.tensor([1.0] * pairs + [-1.0] * pairs).double()
    utility = torch.sigmoid(label * (rewards - rewards.detach().mean().clamp(min=0)))
    return (torch.where(label > 0, 1.0, weight) * (1 - utility)).view(2, pairs).mean(0)


def losses_again(name, pred, target, ref, *, beta, loss_kwargs=None, scores=None) -> torch.Tensor:
    """Loss of each pair in float64, without the package's code."""
    pred, target, ref = (tensor.double().flatten(1) for tensor in (pred, target, ref))
    winner, loser = mean_square(pred - target).chunk(2)
    ref_winner, ref_loser = mean_square(ref - target).chunk(2)
    scores = torch.zeros(len(pred)) if scores is None else scores
    s = SimpleNamespace(w=winner, l=loser, dw=winner - ref_winner, dl=loser - ref_loser, b=beta)
    s.rw, s.rl = -beta / 2 * s.dw, -beta / 2 * s.dl
    s.u = s.rw - s.rl
    s.p = torch.sigmoid(s.u)
    s.gap = scores.double()[: len(winner)] - scores.double()[len(winner) :]
    s.shift, s.residual = (pred - ref)[: len(winner)], (pred - target)[: len(winner)]
    return AGAIN[name](s, loss_kwargs or {})


@pytest.fixture
def losses_by_hand() -> Callable[..., list[float]]:
    return lambda *given, **settings: losses_again(*given, **settings).tolist()


@pytest.fixture
def gradient_by_hand() -> Callable[..., torch.Tensor]:
    """Gradient of the mean of `losses_again` with respect to the predictions, in float64."""

    def run(name, pred, target, ref, **settings) -> torch.Tensor:
        leaf = pred.double().requires_grad_()
        losses_again(name, leaf, target, ref, **settings).mean().backward()
        return leaf.grad

    return run


@pytest.fixture
def seeded_pairs() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """`(model_pred, target, ref_pred)` of `pairs` pairs whose residuals of winner and loser are aligned."""

    def make(pairs=3, shape=(2, 2), seed=0, residual=1.0, shift=0.3) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)

        def normal():
            return torch.randn(pairs, *shape, generator=generator)

        target = torch.cat([normal(), normal()])
        winner = residual * normal()
        loser = 1.5 * winner + 0.5 * residual * normal()
        pred = target + torch.cat([winner, loser])
        return pred, target, pred + shift * torch.cat([normal(), normal()])

    return make

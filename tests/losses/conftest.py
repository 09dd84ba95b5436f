"""Fixtures of the loss tests: seeded pairs, every loss written a second time in plain Python, finite differences."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


def decay(x: float) -> float:
    return x / math.expm1(x) if x else 1.0


def mean_square(values: Sequence[float]) -> float:
    return math.fsum(value * value for value in values) / len(values)


def minus(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=True)]


def formula(name: str, w: float, loser: float, u: float, m: float, change: float, beta: float, k: dict) -> float:
    """Losses that read nothing but the errors: `w`, `loser` of the policy, `u`, `m` and the winner's `change`."""
    if name == "sigmoid":
        return -log_sigmoid(u)
    if name == "hinge":
        return max(1 - u, 0.0)
    if name == "ipo":
        return (u / beta - 1 / (2 * beta)) ** 2
    if name == "robust":
        e = k["label_smoothing"]
        return (-(1 - e) * log_sigmoid(u) + e * log_sigmoid(-u)) / (1 - 2 * e)
    if name == "dmpo":
        p, q = sigmoid(u), 1 - k["dmpo_alpha"]
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    if name == "sft":
        return w
    if name == "mapo":
        s, t = k["mapo_scale"], k["mapo_temperature"]
        return w - beta * log_sigmoid(t * (decay(s * w) - decay(s * loser)))
    if name == "simpo":
        return -log_sigmoid(-beta / 2 * (w - loser) - k["simpo_gamma"])
    r_w, r_l = -beta / 2 * change, -beta / 2 * (change - m)
    if name == "apo_zero":  # TRL's dpo_trainer.py, with `beta * logratios` for these rewards
        return (1 - sigmoid(r_w)) + sigmoid(r_l)
    if name == "apo_down":
        return sigmoid(r_w) + (1 - sigmoid(r_w - r_l))
    assert name == "dpop"
    return -log_sigmoid(u - k["dpop_lambda"] * beta / 2 * max(change, 0.0))


def plain_losses(name: str, pred, target, ref, beta: float, k: dict, scores=None, held=None) -> list[float]:
    """One loss a pair from rows of floats, winners first. `held` is where detached quantities are taken."""
    pairs = len(pred) // 2
    held = pred if held is None else held

    def changes(rows, i):
        winner, loser = (mean_square(minus(rows[j], target[j])) for j in (i, i + pairs))
        ref_winner, ref_loser = (mean_square(minus(ref[j], target[j])) for j in (i, i + pairs))
        return winner, loser, winner - ref_winner, loser - ref_loser

    far = math.fsum(mean_square(minus(held[i], ref[i])) for i in range(pairs)) / pairs >= k.get("dspo_threshold", 0.1)
    losses = []
    for i in range(pairs):
        winner, loser, winner_change, loser_change = changes(pred, i)
        m = winner_change - loser_change
        u = -beta / 2 * m
        shift, residual = minus(pred[i], ref[i]), minus(pred[i], target[i])
        if name == "dspo":
            losses.append(mean_square([r - beta * sigmoid(-u) * d for r, d in zip(residual, shift, strict=True)]))
        elif name == "dspo_sdxl":
            losses.append(sigmoid(-u) ** 2 * (mean_square(shift) if far else 1.0))
        elif name == "linear":
            _, _, held_winner, held_loser = changes(held, i)
            eta = k["linear_eta"]
            weight = min(max(0.2 * beta * (held_winner - held_loser) + 0.5, eta), 1 - eta)
            losses.append(weight * (winner - loser))
        elif name == "capo":
            losses.append((u - (scores[i] - scores[i + pairs])) ** 2)
        elif name == "smpo":
            p = sigmoid((scores[i] - scores[i + pairs]) / k["smpo_score_scale"])
            losses.append(-log_sigmoid(k["smpo_coefficient"] * (2 * p - 1) * u))
        else:
            losses.append(formula(name, winner, loser, u, m, winner_change, beta, k))
    return losses


def rows_of(tensor: torch.Tensor) -> list[list[float]]:
    return tensor.detach().double().flatten(1).tolist()


@pytest.fixture
def losses_by_hand() -> Callable[..., list[float]]:
    """Tensors in, a list of Python floats out; every value a double, none of the package's code."""

    def run(name, pred, target, ref, *, beta, loss_kwargs=None, scores=None) -> list[float]:
        scores = None if scores is None else scores.tolist()
        return plain_losses(name, rows_of(pred), rows_of(target), rows_of(ref), beta, loss_kwargs or {}, scores)

    return run


@pytest.fixture
def gradient_by_differences() -> Callable[..., torch.Tensor]:
    """Central differences of the mean loss of `plain_losses` in doubles, shaped as the predictions."""

    def run(name, pred, target, ref, *, beta, loss_kwargs=None, scores=None, step=1e-5) -> torch.Tensor:
        base, scores = rows_of(pred), None if scores is None else scores.tolist()
        fixed = (rows_of(target), rows_of(ref), beta, loss_kwargs or {}, scores)
        gradient = torch.zeros(len(base), len(base[0]), dtype=torch.float64)
        for i, row in enumerate(base):
            for j, value in enumerate(row):
                means = []
                for moved in (value + step, value - step):
                    rows = [list(other) for other in base]
                    rows[i][j] = moved
                    losses = plain_losses(name, rows, *fixed, held=base)
                    means.append(math.fsum(losses) / len(losses))
                gradient[i, j] = (means[0] - means[1]) / (2 * step)
        return gradient.view(pred.shape)

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

"""Loss of a run: one row of [`LOSSES`] or a weighted sum of rows, with an optional cap of the logit.

A sum has a [`LossSpec`] like a single loss.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import torch

from .pair_terms import PairTerms
from .preference import LOSS_KWARG_RANGES, LOSSES, LossSpec, LossType


def loss_weights_by_name(
    loss_type: LossType | Sequence[LossType], loss_weights: Sequence[float] | None = None
) -> dict[LossType, float]:
    """Return the weight of each loss in a sum, in order. A single loss has the weight 1.

    Args:
        loss_type (`str` or `list[str]`): One name of [`LOSSES`], or several.
        loss_weights (`list[float]`, *optional*): A weight for each name, 1 each if unset.

    Raises:
        `ValueError`: If a name is unknown or repeated, if there is no name, or if the weights are not one finite number
            of at least 0 for each name. At least one weight must be above 0.
    """
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    for name in names:
        if name not in LOSSES:
            raise ValueError(f"`loss_type` must be one of {', '.join(LOSSES)}; got {name!r}.")
    if not names or len(set(names)) < len(names) or {"dspo", "dspo_sdxl"} <= set(names):
        raise ValueError(
            f"`loss_type` must name one loss or several different ones, and only one of `dspo` and `dspo_sdxl`. Got "
            f"{names}. Set `loss_weights` to weight a loss."
        )
    weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    valid = all(weight >= 0 and math.isfinite(weight) for weight in weights)
    if len(weights) != len(names) or not valid or not any(weights):
        raise ValueError(
            "`loss_weights` must have one finite number of at least 0 for each loss of `loss_type`, and one of them "
            f"must be above 0. Got {weights} for {', '.join(names)}. Leave it unset for equal weights."
        )
    return dict(zip(names, weights, strict=True))


def loss_spec(
    loss_type: LossType | Sequence[LossType],
    loss_weights: Sequence[float] | None = None,
    margin_clamp: float | None = None,
) -> LossSpec:
    """Return the [`LossSpec`] of a loss or of a weighted sum of losses.

    Args:
        loss_type, loss_weights: See [`loss_weights_by_name`].
        margin_clamp (`float`, *optional*): Cap of the logit, greater than 0.

    Raises:
        `ValueError`: If [`loss_weights_by_name`] refuses the names or weights, or if `margin_clamp` is set and no
            loss reads the loser, or one that does is not a function of the logit alone.
    """
    weights = loss_weights_by_name(loss_type, loss_weights)
    spec = LOSSES[next(iter(weights))] if list(weights.values()) == [1.0] else _sum_spec(weights)
    if margin_clamp is None:
        return spec
    if not (margin_clamp > 0 and math.isfinite(margin_clamp)):
        raise ValueError(
            f"`margin_clamp` must be finite and greater than 0. Got {margin_clamp}. Leave it unset for no cap."
        )
    refuse_parts(
        [name for name in weights if LOSSES[name].uses_loser and not LOSSES[name].reads_logit_only]
        or [name for name in weights if not spec.uses_loser],
        "`margin_clamp` applies only to losses that are functions of the logit alone",
        {name for name, row in LOSSES.items() if row.reads_logit_only},
    )
    return replace(spec, function=_Capped(spec.function, margin_clamp), margin_clamp=margin_clamp)


def check_auto_beta(loss_type: LossType | Sequence[LossType], loss_weights: Sequence[float] | None = None) -> None:
    """Raise `ValueError` if `auto_beta` cannot steer the beta of a loss, or if no loss has a beta.

    A loss qualifies if its beta is a factor of a logit and of nothing else. Losses of weight 0 are ignored.
    """
    rows = {name: LOSSES[name] for name, weight in loss_weights_by_name(loss_type, loss_weights).items() if weight}
    refuse_parts(
        [name for name, row in rows.items() if row.uses_beta and not row.beta_scales_logit]
        or [name for name in rows if not any(row.uses_beta for row in rows.values())],
        "`auto_beta` applies only to losses whose `beta` is a factor of a logit",
        {name for name, row in LOSSES.items() if row.beta_scales_logit},
    )


def refuse_parts(refused: Sequence[str], rule: str, accepted: Collection[str]) -> None:
    """Raise `ValueError` if `refused` is not empty. The message lists the `accepted` losses."""
    if refused:
        listed = ", ".join(name for name in LOSSES if name in accepted)
        raise ValueError(f"{rule}: {listed}. Got {', '.join(refused)}. Leave it unset, or choose another loss.")


def check_loss_kwargs(
    loss_type: LossType | Sequence[LossType], beta: float | torch.Tensor | None, loss_kwargs: dict[str, float]
) -> None:
    """Raise `ValueError` if a setting of a loss is out of range or belongs to another loss.

    The value of a tensor `beta` is not checked because reading it would wait for its device.
    """
    spec = loss_spec(loss_type)
    if spec.uses_beta and beta is not None and not isinstance(beta, torch.Tensor):
        if not (beta > 0 and math.isfinite(beta)):
            raise ValueError(f"`beta` must be a finite number greater than 0. Got {beta}. Diffusion-DPO uses 5000.")
    for name, value in loss_kwargs.items():
        if name not in spec.loss_kwargs:
            accepted = f"it takes {', '.join(spec.loss_kwargs)}" if spec.loss_kwargs else "it takes none"
            raise ValueError(f"`{name}` is not a setting of the loss {loss_type!r}: {accepted}. Leave it unset.")
        if name not in LOSS_KWARG_RANGES:
            continue  # a setting of a registered loss
        rule, holds = LOSS_KWARG_RANGES[name]
        if not (math.isfinite(value) and holds(value)):
            raise ValueError(f"`{name}` must be {rule}, got {value}.")


@dataclass(frozen=True)
class _Sum:
    """Weighted sum of losses as one function. Its signature has the settings of all summed losses."""

    parts: tuple[tuple[float, LossSpec], ...]

    def __call__(self, terms: PairTerms, **settings: Any) -> torch.Tensor:
        beta = settings.pop("beta", None)
        losses = [
            weight * spec.pair_losses(terms, beta=beta, **_settings_of(spec, settings)) for weight, spec in self.parts
        ]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)

    @property
    def __signature__(self) -> inspect.Signature:
        merged = {
            name: parameter
            for _, spec in self.parts
            for name, parameter in inspect.signature(spec.function).parameters.items()
        }
        return inspect.Signature(sorted(merged.values(), key=lambda parameter: parameter.kind))


@dataclass(frozen=True)
class _Capped:
    """Loss whose logit is capped at `margin_clamp`."""

    function: Any
    margin_clamp: float

    def __call__(self, terms: PairTerms, **settings: Any) -> torch.Tensor:
        return cast(torch.Tensor, self.function(replace(terms, margin_clamp=self.margin_clamp), **settings))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.function)


def _settings_of(spec: LossSpec, settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name in spec.loss_kwargs}


def _sum_spec(weights: dict[LossType, float]) -> LossSpec:
    """Return the [`LossSpec`] of a weighted sum.

    Let `a_i` and `b_i` be the gradients of loss `i` by the winner's and by the loser's error, and `k_i > 0` its weight.
    The sum has the gradients `a = sum k_i a_i` and `b = sum k_i b_i`. They have equal sizes if those of every loss do.
    A loss without a loser does not qualify. DSPO does not qualify either, because its two gradients count as equal only
    if it is the only loss. The gradients are positive if those of every loss are. The gradient of the winner's branch
    is a non-negative multiple of the gradient of the winner's error if this holds for every loss.

    Losses of weight 0 are dropped, so they need neither beta nor a reference.
    """
    parts = tuple((weight, LOSSES[name]) for name, weight in weights.items() if weight)
    rows = [row for _, row in parts]
    targets = [row for row in rows if row.target_logit is not None]
    equal = all(row.equal_weights and row.uses_loser and not row.reads_reference_prediction for row in rows)

    def target_logit(terms: PairTerms, **settings: float) -> Any:
        """Return the smallest target logit of all losses. Past it, at least one loss raises the winner's error."""
        logits = (cast(Any, row.target_logit)(terms, **_settings_of(row, settings)) for row in targets)
        zeros = torch.zeros_like(terms.winner_error)  # broadcasts numbers to tensors without a copy from the host
        return torch.stack([zeros + logit for logit in logits]).amin(0)

    with_beta = [row for row in rows if row.uses_beta]
    return LossSpec(
        _Sum(parts),
        needs_reference=any(row.needs_reference for row in rows),
        reads_reference_prediction=any(row.reads_reference_prediction for row in rows),
        uses_loser=any(row.uses_loser for row in rows),
        needs_scores=any(row.needs_scores for row in rows),
        reads_shares=any(row.reads_shares for row in rows),
        equal_weights=equal,
        positive_weights=equal and all(row.positive_weights for row in rows),
        target_logit=target_logit if targets else None,
        anchor="branch" if all(row.anchor == "branch" for row in rows) else "error",
        default_beta=with_beta[0].default_beta if with_beta else LossSpec.default_beta,
        reads_logit_only=all(row.reads_logit_only for row in rows),
        beta_scales_logit=all(row.beta_scales_logit for row in with_beta),
    )


def register_loss(name: str, function: Callable[..., torch.Tensor], **facts: Any) -> None:
    """Add a custom loss to [`LOSSES`], for `loss_type` and [`diffusion_preference_loss`].

    Args:
        name (`str`): Name of the loss. It must differ from the names of this package's losses.
        function (`Callable`): Function that takes [`PairTerms`], and `beta` as a keyword argument if it uses one, and
            returns the loss of each pair, `(B,)`. Other keyword arguments keep their defaults in training.
        facts (`Any`): Fields of [`LossSpec`] that differ from the safe defaults. By default, the loss reads the loser
            and the reference's errors, and lambda is computed from the gradients of the loss.

    Raises:
        `ValueError`: If this package has a loss of this name, if the name is not an identifier, or if the function has
            an argument that is neither `terms` nor keyword-only.

    Example:

    ```python
    def squared_hinge(terms, *, beta):
        return torch.relu(1 - terms.logit(beta)).square()


    register_loss("squared_hinge", squared_hinge)
    args = DiffusionSDPOConfig("run", loss_type="squared_hinge", beta=1000.0)
    ```
    """
    if name in get_args(LossType) or not name.isidentifier():
        raise ValueError(
            "The name of a registered loss must be an identifier that differs from this package's losses "
            f"({', '.join(get_args(LossType))}). Got {name!r}. Choose another name."
        )
    terms, *settings = inspect.signature(function).parameters.values()
    if terms.kind is terms.KEYWORD_ONLY or any(each.kind is not each.KEYWORD_ONLY for each in settings):
        raise ValueError(
            f"The loss {name!r} must take the terms of the pairs first, and its settings as keyword-only arguments. "
            f"Got the arguments {inspect.signature(function)}. Define it as `def {name}(terms, *, beta)`."
        )
    safe = {"equal_weights": False, "positive_weights": False, "anchor": "error"}
    LOSSES[cast(LossType, name)] = LossSpec(function, **{**safe, **facts})

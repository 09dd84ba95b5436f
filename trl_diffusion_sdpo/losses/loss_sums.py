"""The loss of a run: a row of [`LOSSES`], or a weighted sum of rows, which is described as a row is, and a cap of its
logit."""

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
    """The weight of each loss of a sum, in its order; of one loss alone, `{loss_type: 1.0}`.

    Args:
        loss_type (`str` or `list[str]`): A name of [`LOSSES`], or several.
        loss_weights (`list[float]`, *optional*): A weight for each name; 1 each if unset.

    Raises:
        `ValueError`: If a name is unknown or given twice, there is none, or the weights are not one finite number of at
            least 0 for each name with one above 0.
    """
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    for name in names:
        if name not in LOSSES:
            raise ValueError(f"`loss_type` must be one of {', '.join(LOSSES)}; got {name!r}.")
    if not names or len(set(names)) < len(names) or {"dspo", "dspo_sdxl"} <= set(names):
        raise ValueError(
            "`loss_type` must name a loss, or several different ones, of which `dspo` and `dspo_sdxl` count as one; "
            f"got {names}. The size of a part is its weight in `loss_weights`."
        )
    weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    valid = all(weight >= 0 and math.isfinite(weight) for weight in weights)
    if len(weights) != len(names) or not valid or not any(weights):
        raise ValueError(
            "`loss_weights` must be a finite number of at least 0 for each loss of `loss_type`, one of them above 0; "
            f"got {weights} for {', '.join(names)}."
        )
    return dict(zip(names, weights, strict=True))


def loss_spec(
    loss_type: LossType | Sequence[LossType],
    loss_weights: Sequence[float] | None = None,
    margin_clamp: float | None = None,
) -> LossSpec:
    """The row of a loss: that of [`LOSSES`] with this name, or that of a sum.

    Args:
        loss_type, loss_weights: As of [`loss_weights_by_name`].
        margin_clamp (`float`, *optional*): Caps the logit, greater than 0.

    Raises:
        `ValueError`: As [`loss_weights_by_name`], and if a part that reads the loser is no function of the logit alone
            and `margin_clamp` is given.
    """
    weights = loss_weights_by_name(loss_type, loss_weights)
    spec = LOSSES[next(iter(weights))] if list(weights.values()) == [1.0] else _sum_spec(weights)
    if margin_clamp is None:
        return spec
    if not (margin_clamp > 0 and math.isfinite(margin_clamp)):
        raise ValueError(
            f"`margin_clamp` must be finite and greater than 0, got {margin_clamp}. Leave it unset for none."
        )
    refuse_parts(
        [name for name in weights if LOSSES[name].uses_loser and not LOSSES[name].reads_logit_only]
        or [name for name in weights if not spec.uses_loser],
        "`margin_clamp` caps the logit of losses that are functions of it alone",
        {name for name, row in LOSSES.items() if row.reads_logit_only},
    )
    return replace(spec, function=_Capped(spec.function, margin_clamp), margin_clamp=margin_clamp)


def check_auto_beta(loss_type: LossType | Sequence[LossType], loss_weights: Sequence[float] | None = None) -> None:
    """Raise `ValueError` where a part has a beta that is no factor of a logit alone, or none has a beta; parts of
    weight 0 are none."""
    rows = {name: LOSSES[name] for name, weight in loss_weights_by_name(loss_type, loss_weights).items() if weight}
    refuse_parts(
        [name for name, row in rows.items() if row.uses_beta and not row.beta_scales_logit]
        or [name for name in rows if not any(row.uses_beta for row in rows.values())],
        "`auto_beta` chooses the factor of a logit",
        {name for name, row in LOSSES.items() if row.beta_scales_logit},
    )


def refuse_parts(refused: Sequence[str], rule: str, accepted: Collection[str]) -> None:
    """Raise `ValueError` if there are `refused` names."""
    if refused:
        listed = ", ".join(name for name in LOSSES if name in accepted)
        raise ValueError(f"{rule}: {listed}; got {', '.join(refused)}. Leave it unset, or choose another loss.")


def check_loss_kwargs(
    loss_type: LossType | Sequence[LossType], beta: float | torch.Tensor | None, loss_kwargs: dict[str, float]
) -> None:
    """Raise `ValueError` if a setting of a loss is out of range or belongs to another loss. A tensor `beta` is not
    looked at, which would wait for its device."""
    spec = loss_spec(loss_type)
    if spec.uses_beta and beta is not None and not isinstance(beta, torch.Tensor):
        if not (beta > 0 and math.isfinite(beta)):
            raise ValueError(f"`beta` must be a finite number greater than 0, got {beta}. Diffusion-DPO uses 5000.")
    for name, value in loss_kwargs.items():
        if name not in spec.loss_kwargs:
            accepted = f"it takes {', '.join(spec.loss_kwargs)}" if spec.loss_kwargs else "it takes none"
            raise ValueError(f"`{name}` is no setting of the loss {loss_type!r}: {accepted}. Leave it unset.")
        if name not in LOSS_KWARG_RANGES:
            continue  # a setting of a registered loss
        rule, holds = LOSS_KWARG_RANGES[name]
        if not (math.isfinite(value) and holds(value)):
            raise ValueError(f"`{name}` must be {rule}, got {value}.")


@dataclass(frozen=True)
class _Sum:
    """The weighted sum of losses as one function, whose signature has the settings of all of them."""

    parts: tuple[tuple[float, LossSpec], ...]

    def __call__(self, terms: PairTerms, **settings: Any) -> torch.Tensor:
        beta = settings.pop("beta", None)
        losses = [weight * spec.pair_losses(terms, beta=beta, **_own(spec, settings)) for weight, spec in self.parts]
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
    """A loss of terms whose logit is capped."""

    function: Any
    margin_clamp: float

    def __call__(self, terms: PairTerms, **settings: Any) -> torch.Tensor:
        return cast(torch.Tensor, self.function(replace(terms, margin_clamp=self.margin_clamp), **settings))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.function)


def _own(spec: LossSpec, settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name in spec.loss_kwargs}


def _sum_spec(weights: dict[LossType, float]) -> LossSpec:
    """The row of a weighted sum.

    With the weights `a_i` of the winner's error and `b_i` of the loser's in each part, those of the sum are the sums
    `a = sum k_i a_i` and `b = sum k_i b_i`, `k_i > 0`. They are equal if those of every part are, which excludes parts
    without a loser, and DSPO, whose branches are treated as equal only where it stands alone; positive if those of
    every part are. The winner's branch is a non-negative multiple of the winner's error if that of every part is. A
    part of weight 0 is none: nothing is asked for on its account, neither a beta nor a reference.
    """
    parts = tuple((weight, LOSSES[name]) for name, weight in weights.items() if weight)
    rows = [row for _, row in parts]
    targets = [row for row in rows if row.target_logit is not None]
    equal = all(row.equal_weights and row.uses_loser and not row.reads_reference_prediction for row in rows)

    def target_logit(terms: PairTerms, **settings: float) -> Any:
        """The smallest of the parts' targets: past it, that part raises the winner's error."""
        found = (cast(Any, row.target_logit)(terms, **_own(row, settings)) for row in targets)
        zeros = torch.zeros_like(terms.winner_error)  # a number is added on the device
        return torch.stack([zeros + target for target in found]).amin(0)

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
    """Add a loss of your own to [`LOSSES`], for `loss_type` and [`diffusion_preference_loss`].

    Args:
        name (`str`): Its name; no name of a loss of this package.
        function (`Callable`): From [`PairTerms`], and `beta` as a keyword argument if it has one, to the loss of each
            pair, `(B,)`. Other keyword arguments keep their defaults in training.
        facts (`Any`): Fields of [`LossSpec`] that differ from the safe ones: the loss reads the loser and the
            reference's errors, and every lambda follows from the gradients of the loss.

    Raises:
        `ValueError`: If the name is taken by this package or is no word, or the function has an argument that is
            neither `terms` nor a keyword.

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
            f"`register_loss` needs a word that is no loss of this package ({', '.join(get_args(LossType))}); got "
            f"{name!r}. Choose another name."
        )
    terms, *settings = inspect.signature(function).parameters.values()
    if terms.kind is terms.KEYWORD_ONLY or any(each.kind is not each.KEYWORD_ONLY for each in settings):
        raise ValueError(
            f"The loss {name!r} must take the terms of the pairs, and its settings as keywords: `def "
            f"{name}(terms, *, beta)`; got the arguments {inspect.signature(function)}."
        )
    safe = {"equal_weights": False, "positive_weights": False, "anchor": "error"}
    LOSSES[cast(LossType, name)] = LossSpec(function, **{**safe, **facts})

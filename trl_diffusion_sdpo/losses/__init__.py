"""Preference losses and the safeguard, on tensors alone."""

from .diffusion_preference import (
    SAFEGUARDS,
    PreferenceLossOutput,
    check_safeguard,
    diffusion_preference_loss,
    order_by_scores,
)
from .pair_terms import PairTerms, pair_terms
from .preference import LOSSES, LossSpec, check_loss_kwargs, loss_spec
from .safeguard import (
    ANCHORS,
    GRANULARITIES,
    adamw_scale,
    loser_scale,
    output_scale,
    parameter_scale,
    scale_gradient,
    winner_error_gradient,
)

__all__ = [
    "ANCHORS",
    "GRANULARITIES",
    "LOSSES",
    "SAFEGUARDS",
    "PreferenceLossOutput",
    "LossSpec",
    "PairTerms",
    "adamw_scale",
    "check_loss_kwargs",
    "check_safeguard",
    "diffusion_preference_loss",
    "loser_scale",
    "loss_spec",
    "order_by_scores",
    "output_scale",
    "pair_terms",
    "parameter_scale",
    "scale_gradient",
    "winner_error_gradient",
]

"""Every formula of the project, on tensors and numbers: losses, safeguard, metrics, noise bins, winner budget."""

from .diffusion_preference import (
    PreferenceLossOutput,
    Safeguard,
    check_safeguard,
    diffusion_preference_loss,
    order_by_scores,
)
from .masks import mask_anchor, mask_metrics, region_factors, within
from .noise_bins import NOISE_BINS, noise_bin_changes, noise_bin_of, noise_range_weights
from .pair_weights import WEIGHT_FUNCTIONS, calibrated_scores, score_gaps, with_mean_one
from .preference import (
    KTO_UTILITIES,
    LOSSES,
    NAMED_SETTINGS,
    LossSpec,
    LossType,
    PairTerms,
    check_loss_kwargs,
    loss_spec,
    loss_weights_by_name,
    mean_error,
    pair_terms,
    register_loss,
)
from .safeguard import (
    Anchor,
    Granularity,
    SafeguardSettings,
    output_scale,
    parameter_scale,
    winner_error_gradient,
)
from .winner_budget import BudgetController

__all__ = [
    "KTO_UTILITIES",
    "LOSSES",
    "NAMED_SETTINGS",
    "NOISE_BINS",
    "WEIGHT_FUNCTIONS",
    "Anchor",
    "BudgetController",
    "Granularity",
    "LossSpec",
    "LossType",
    "PairTerms",
    "PreferenceLossOutput",
    "Safeguard",
    "SafeguardSettings",
    "calibrated_scores",
    "check_loss_kwargs",
    "check_safeguard",
    "diffusion_preference_loss",
    "loss_spec",
    "loss_weights_by_name",
    "mask_anchor",
    "mask_metrics",
    "mean_error",
    "noise_bin_changes",
    "noise_bin_of",
    "noise_range_weights",
    "order_by_scores",
    "output_scale",
    "pair_terms",
    "parameter_scale",
    "region_factors",
    "register_loss",
    "score_gaps",
    "winner_error_gradient",
    "with_mean_one",
    "within",
]

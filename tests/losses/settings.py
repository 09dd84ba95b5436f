"""Settings under which no loss saturates on residuals of order one, and each loss's safeguard."""

from trl_diffusion_sdpo.losses import LOSSES

# A loss that starts without lowering the winner's error takes no safeguard.
SAFEGUARD = {name: "output" if spec.lowers_winner else "none" for name, spec in LOSSES.items()}

BETA = 0.7
SETTINGS = {
    "robust": {"label_smoothing": 0.2},
    "dspo_sdxl": {"dspo_threshold": 0.0},
    "dmpo": {"dmpo_alpha": 0.05},
    "mapo": {"mapo_scale": 0.5, "mapo_temperature": 3.0},
    "simpo": {"simpo_gamma": 0.3},
    "dpop": {"dpop_lambda": 2.0},
    "linear": {"linear_eta": 0.05},
    "smpo": {"smpo_coefficient": 3.0, "smpo_score_scale": 0.3},
    "kto": {"kto_loser_weight": 0.4},
}

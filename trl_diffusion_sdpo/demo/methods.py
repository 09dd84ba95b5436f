"""The methods that the demo compares, with their settings."""

from dataclasses import dataclass, field
from typing import Any

RUNS_FOLDER = "runs"  # in the demo's folder; has a folder for each method

HARD = {"learning_rate": 2e-4, "beta": 100.0}
GENTLE = {"learning_rate": 1e-4, "beta": 500.0}
UNSAFE = {"loss_type": "sigmoid", "safeguard": "none"}
SAFE = {"loss_type": "sigmoid", "safeguard": "output", "safeguard_mu": 0.6}
# A lower error on the winners for slightly less reward.
RECIPE = {"loss_type": "sigmoid", "safeguard": "parameter", "safeguard_mu": 0.8, "lr_scheduler_type": "cosine"}


@dataclass(frozen=True)
class Method:
    """One way to train."""

    key: str  # name of its folder
    label: str  # name to display
    settings: dict[str, Any] = field(default_factory=dict)  # fields of `DiffusionSDPOConfig`
    gentle: bool = False  # whether it trains for half as many steps


METHODS = (
    Method("sft", "SFT", {"loss_type": "sft", "learning_rate": HARD["learning_rate"]}),
    Method("dpo", "Diffusion-DPO", UNSAFE | HARD),
    Method("sdpo", "Diffusion-SDPO", SAFE | HARD),
    Method("sdpo_recipe", "Diffusion-SDPO, recipe", RECIPE | HARD),
)
GENTLE_METHODS = (
    Method("dpo_gentle", "Diffusion-DPO, gentle", UNSAFE | GENTLE, gentle=True),
    Method("sdpo_gentle", "Diffusion-SDPO, gentle", SAFE | GENTLE, gentle=True),
)
# The recipe's images with preference guidance from the base model. `settings` are those of `preference_guidance`.
GUIDED_METHOD = Method("sdpo_recipe_guided", "Diffusion-SDPO, recipe, guided", {"scale": 4.0, "interval": [0.0, 0.62]})
GUIDED_FROM = "sdpo_recipe"  # the trained model of this method

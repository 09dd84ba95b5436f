"""Define the training methods that the demo compares, with their settings."""

from dataclasses import dataclass, field
from typing import Any

RUNS_FOLDER = "runs"  # subfolder of the demo's output folder, with one folder per method

HARD = {"learning_rate": 2e-4, "beta": 100.0}
UNSAFE = {"loss_type": "sigmoid", "safeguard": "none"}
SAFE = {"loss_type": "sigmoid", "safeguard": "output", "safeguard_mu": 0.6}
# Stricter settings than `SAFE`: a lower error on the chosen images, but a slightly lower oracle score.
RECIPE = {"loss_type": "sigmoid", "safeguard": "parameter", "safeguard_mu": 0.8, "lr_scheduler_type": "cosine"}


@dataclass(frozen=True)
class Method:
    """A training method of the demo."""

    key: str  # name of the method's folder
    label: str  # name in plots and tables
    settings: dict[str, Any] = field(default_factory=dict)  # fields of `DiffusionSDPOConfig`


METHODS = (
    Method("sft", "SFT", {"loss_type": "sft", "learning_rate": HARD["learning_rate"]}),
    Method("dpo", "Diffusion-DPO", UNSAFE | HARD),
    Method("sdpo", "Diffusion-SDPO", SAFE | HARD),
    Method("sdpo_recipe", "Diffusion-SDPO, recipe", RECIPE | HARD),
)
# This method trains no model: images are generated with the recipe's model under preference guidance, with the base
# model as the reference. Its `settings` are arguments of `preference_guidance`.
GUIDED_METHOD = Method("sdpo_recipe_guided", "Diffusion-SDPO, recipe, guided", {"scale": 4.0, "interval": [0.0, 0.62]})
GUIDED_FROM = "sdpo_recipe"  # key of the method whose tuned model `GUIDED_METHOD` uses

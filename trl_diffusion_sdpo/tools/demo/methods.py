"""Define the training methods that the demo compares, with their settings."""

from dataclasses import dataclass, field
from typing import Any

RUNS_FOLDER = "runs"  # subfolder of the demo's output folder, with one folder per method

HARD = {"learning_rate": 2e-4, "beta": 100.0}
UNSAFE = {"loss_type": "sigmoid", "safeguard": "none"}
# The published rule. Its paper has mu 0.9 for Stable Diffusion 1.5 and mu 0.6 for SDXL; the demo takes the looser one.
PUBLISHED = {"loss_type": "sigmoid", "safeguard": "output", "safeguard_mu": 0.6}
RECIPE = {"loss_type": "sigmoid", "safeguard": "parameter", "safeguard_mu": 0.8, "lr_scheduler_type": "cosine"}


@dataclass(frozen=True)
class Method:
    """A training method of the demo."""

    key: str  # name of the method's folder
    label: str  # name in plots and tables
    settings: dict[str, Any] = field(default_factory=dict)  # fields of `DiffusionSDPOConfig`


METHODS = (
    Method("sft", "SFT", {"loss_type": "sft", "safeguard": "none", "learning_rate": HARD["learning_rate"]}),
    Method("dpo", "Diffusion-DPO", UNSAFE | HARD),
    Method("sdpo", "Diffusion-SDPO as published", PUBLISHED | HARD),
    Method("sdpo_recipe", "recipe", RECIPE | HARD),
)
BASE = Method("base", "base model")
# Not trained: images by the recipe's model, guided from its reference (the base model). The settings are arguments of
# `preference_guidance`.
GUIDED = Method("sdpo_recipe_guided", "recipe, guided from its reference", {"scale": 4.0, "interval": [0.0, 0.62]})
GUIDED_FROM = "sdpo_recipe"  # key of the method whose tuned model generates these images
# Pairs of keys whose scores the demo compares, with intervals that hold together.
COMPARED = (
    ("sdpo_recipe", BASE.key),
    ("sdpo_recipe", "sft"),
    ("sdpo_recipe", "sdpo"),
    (GUIDED.key, GUIDED_FROM),
)

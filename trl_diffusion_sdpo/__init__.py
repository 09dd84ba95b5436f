"""Preference tuning of text-to-image diffusers pipelines in the manner of TRL, with a safeguard for the preferred
images. The public names are imported at their first use."""

from typing import TYPE_CHECKING

from .utils.import_utils import lazy_attributes

__version__ = "0.1.0.dev0"

_HOMES = {
    "PreferenceLossOutput": ".losses",
    "DiffusionSDPOConfig": ".trainer",
    "DiffusionSDPOTrainer": ".trainer",
    "PairMixture": ".data",
    "PairTerms": ".losses",
    "PreferenceCollator": ".data",
    "diffusion_preference_loss": ".losses",
    "load_pairs": ".data",
    "preference_guidance": ".guidance",
    "register_family": ".families",
    "register_loss": ".losses",
}
__all__ = [
    "PreferenceLossOutput",
    "DiffusionSDPOConfig",
    "DiffusionSDPOTrainer",
    "PairMixture",
    "PairTerms",
    "PreferenceCollator",
    "diffusion_preference_loss",
    "load_pairs",
    "preference_guidance",
    "register_family",
    "register_loss",
]

if TYPE_CHECKING:
    from .data import PairMixture, PreferenceCollator, load_pairs
    from .families import register_family
    from .guidance import preference_guidance
    from .losses import PairTerms, PreferenceLossOutput, diffusion_preference_loss, register_loss
    from .trainer import DiffusionSDPOConfig, DiffusionSDPOTrainer

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES, ["__version__"])

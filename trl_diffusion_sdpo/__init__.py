"""Preference tuning of text-to-image diffusers pipelines with a trainer like those of TRL.

Diffusion-SDPO adds a safeguard to Diffusion-DPO, so that the error on preferred images does not rise. Importing the
package is fast: each public name is imported at its first use.
"""

from typing import TYPE_CHECKING

from .utils.import_utils import lazy_attributes

__version__ = "0.1.0"

_HOMES = {
    "Candidate": ".tools.evaluation",
    "evaluate_models": ".tools.evaluation",
    "PreferenceLossOutput": ".losses",
    "DiffusionSDPOConfig": ".trainer",
    "DiffusionSDPOTrainer": ".trainer",
    "PairMixture": ".data",
    "PairTerms": ".losses",
    "PreferenceCollator": ".data",
    "UserError": ".utils.errors",
    "diffusion_preference_loss": ".losses",
    "load_pairs": ".data",
    "load_scorer": ".tools.rewards",
    "preference_guidance": ".tools.guidance",
    "register_family": ".families",
    "register_loss": ".losses",
    "register_scorer": ".tools.rewards",
    "score_pairs": ".tools.pairing.score",
}
__all__ = [
    "Candidate",
    "PreferenceLossOutput",
    "DiffusionSDPOConfig",
    "DiffusionSDPOTrainer",
    "PairMixture",
    "PairTerms",
    "PreferenceCollator",
    "UserError",
    "diffusion_preference_loss",
    "evaluate_models",
    "load_pairs",
    "load_scorer",
    "preference_guidance",
    "register_family",
    "register_loss",
    "register_scorer",
    "score_pairs",
]

if TYPE_CHECKING:
    from .data import PairMixture, PreferenceCollator, load_pairs
    from .families import register_family
    from .losses import PairTerms, PreferenceLossOutput, diffusion_preference_loss, register_loss
    from .tools.evaluation import Candidate, evaluate_models
    from .tools.guidance import preference_guidance
    from .tools.pairing.score import score_pairs
    from .tools.rewards import load_scorer, register_scorer
    from .trainer import DiffusionSDPOConfig, DiffusionSDPOTrainer
    from .utils.errors import UserError

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES, ["__version__"])

"""`DiffusionSDPOTrainer` and its settings, `DiffusionSDPOConfig`, both imported at their first use."""

from typing import TYPE_CHECKING

from ..utils.import_utils import lazy_attributes

_HOMES = {"DiffusionSDPOConfig": ".config.diffusion_sdpo_config", "DiffusionSDPOTrainer": ".diffusion_sdpo_trainer"}
__all__ = ["DiffusionSDPOConfig", "DiffusionSDPOTrainer"]

if TYPE_CHECKING:
    from .config.diffusion_sdpo_config import DiffusionSDPOConfig
    from .diffusion_sdpo_trainer import DiffusionSDPOTrainer

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)

"""Model families: how to train each kind of diffusers pipeline."""

from .base import Family, check_in_channels, no_autocast
from .loss_defaults import DDPM_DEFAULTS, FALLBACK, FLOW_DEFAULTS, PARAMETER_MU, LossDefaults
from .noise import DDPMProcess, FlowMatchingProcess, NoiseProcess, constant
from .registry import FAMILIES, family_for_class_name, find_family, known_pipeline_classes, register_family
from .unet_checks import check_text_to_image_unet

__all__ = [
    "DDPM_DEFAULTS",
    "FALLBACK",
    "FAMILIES",
    "FLOW_DEFAULTS",
    "PARAMETER_MU",
    "DDPMProcess",
    "Family",
    "FlowMatchingProcess",
    "LossDefaults",
    "NoiseProcess",
    "check_in_channels",
    "check_text_to_image_unet",
    "constant",
    "family_for_class_name",
    "find_family",
    "known_pipeline_classes",
    "no_autocast",
    "register_family",
]

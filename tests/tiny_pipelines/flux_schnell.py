"""Tiny FLUX.1 pipeline of the schnell kind: no guidance scale as an input, and sigmas that are not shifted."""

from diffusers import FluxPipeline

from tiny_pipelines import parts
from tiny_pipelines.flux import build_flux

RESOLUTION = 16
CALL = {"guidance_scale": 0.0, "max_sequence_length": 256}  # as its model card calls it


def build(seed: int = 0) -> FluxPipeline:
    schnell_scheduler = {**parts.DEV_SCHEDULER, "shift": 1.0, "use_dynamic_shifting": False}
    return build_flux(seed, schnell_scheduler, guidance_embeds=False)


to_pipeline = parts.pack_squares
from_pipeline = parts.unpack_squares

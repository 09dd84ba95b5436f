"""Tiny FLUX.1 pipeline of the schnell kind: no guidance scale as an input, and sigmas that are not shifted."""

from diffusers import FluxPipeline

from tiny_pipelines.flux import DEV_SCHEDULER, build_flux
from tiny_pipelines.parts import pack_squares, unpack_squares

RESOLUTION = 16
CALL = {"guidance_scale": 0.0, "max_sequence_length": 256}  # as its model card calls it


def build(seed: int = 0) -> FluxPipeline:
    schnell_scheduler = {**DEV_SCHEDULER, "shift": 1.0, "use_dynamic_shifting": False}
    return build_flux(seed, schnell_scheduler, guidance_embeds=False)


to_pipeline = pack_squares
from_pipeline = unpack_squares

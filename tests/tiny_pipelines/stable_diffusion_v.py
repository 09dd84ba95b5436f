"""Tiny Stable Diffusion whose scheduler says v_prediction, like that of Stable Diffusion 2.1."""

from tiny_pipelines import stable_diffusion

RESOLUTION = stable_diffusion.RESOLUTION
CALL = stable_diffusion.CALL


def build(seed: int = 0):
    return stable_diffusion.build(seed, prediction_type="v_prediction")

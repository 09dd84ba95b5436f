"""The same tiny Stable Diffusion with a scheduler that says v_prediction, as Stable Diffusion 2.1 has it."""

from tiny_pipelines import stable_diffusion

RESOLUTION = stable_diffusion.RESOLUTION
CALL = stable_diffusion.CALL


def build(seed: int = 0):
    return stable_diffusion.build(seed, prediction_type="v_prediction")

"""Stable Diffusion with a denoiser of another class, and with a style added to every prompt."""

# diffusers loads a component's class from a module outside diffusers only if `ModelMixin` is a name of that module.
from diffusers import ModelMixin, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401

STYLE = " in oil"


class OutsideUNet(UNet2DConditionModel):
    """The UNet under another name."""


class OutsidePipeline(StableDiffusionPipeline):
    """Adds a style to the prompts."""

    def encode_prompt(self, prompt, *given, **named):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return super().encode_prompt([text + STYLE for text in prompts], *given, **named)

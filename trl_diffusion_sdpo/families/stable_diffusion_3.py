"""Stable Diffusion 3 and 3.5: a transformer that sees latents and text as one sequence, conditioned on two CLIP text
encoders and optionally T5, over a flow matching process."""

from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline

from .base import FLOW_DEFAULTS, JOINT_ATTENTION_TARGETS, Family, check_in_channels, no_autocast
from .noise import FlowMatchingProcess


class StableDiffusion3Family(Family):
    """`StableDiffusion3Pipeline`, and folders of its image-to-image and inpainting classes if their transformer is the
    text-to-image one.

    T5 may be left out, as diffusers allows (`text_encoder_3=None, tokenizer_3=None`): its part of the text is then
    zeros, here as in the pipeline.

    Source of the architecture and the process: https://huggingface.co/papers/2403.03206.
    """

    name = "Stable Diffusion 3"
    pipeline_classes = (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    )
    denoiser_name = "transformer"
    frozen_components = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    # As diffusers' script train_dreambooth_lora_sd3.py: the joint attention of every block, image and text side. The
    # second attention (`attn2`) that some blocks of 3.5 Medium have for the image alone is left as it is, as there.
    lora_target_modules = JOINT_ATTENTION_TARGETS
    # Our choice, because nothing is published for full tuning: between those of Stable Diffusion and SDXL.
    learning_rate_full = 1e-6
    learning_rate_lora = 1e-4  # as diffusers' script
    defaults = FLOW_DEFAULTS
    noise_process_class = FlowMatchingProcess
    weighting_scheme = "logit_normal"  # as the paper and diffusers' script
    patch_size = 2

    def __init__(self, pipeline: DiffusionPipeline):
        if pipeline.text_encoder_3 is None:
            self.frozen_components = ("vae", "text_encoder", "text_encoder_2")
        super().__init__(pipeline)

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_in_channels(self, self.pipeline.vae.config.latent_channels)

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        device = self.pipeline.text_encoder.device
        with no_autocast(device):
            prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
                prompts,
                prompt_2=None,
                prompt_3=None,
                device=device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
        # (N, tokens of CLIP and then of T5, width of T5) and (N, projection widths of both CLIP encoders)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        dtype = self.dtype
        return denoiser(
            hidden_states=noisy_latents.to(dtype),
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]

"""Stable Diffusion 1.x and 2.x: a UNet conditioned on one CLIP text encoder, over a DDPM noise process that predicts
epsilon or v."""

from collections.abc import Mapping

import torch

from .base import FALLBACK, Family, LossDefaults, check_text_to_image_unet, no_autocast
from .noise import DDPMProcess


class StableDiffusionFamily(Family):
    """`StableDiffusionPipeline`, and folders of its image-to-image and inpainting classes if their UNet is the
    text-to-image one.

    Sources of `defaults`: https://huggingface.co/papers/2511.03317 for sigmoid, dspo and dmpo;
    https://huggingface.co/papers/2406.06424 for MaPO's beta; the published script of
    https://huggingface.co/papers/2506.02698 for SmPO's.
    """

    name = "Stable Diffusion"
    pipeline_classes = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
    )
    denoiser_name = "unet"
    frozen_components = ("vae", "text_encoder")
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")  # as diffusers' own DPO script
    # Published: 2.05e-5 for AdamW at 2048 pairs. This is the same under the square root rule at about 20 pairs.
    learning_rate_full = 2e-6
    learning_rate_lora = 1e-4  # diffusers' DPO script takes 1e-5, over 10000 steps
    defaults = {
        FALLBACK: LossDefaults(beta=5000.0, safeguard_mu=0.9),
        "sigmoid": LossDefaults(beta=5000.0, safeguard_mu=0.9),
        "dmpo": LossDefaults(beta=2000.0, safeguard_mu=0.9),
        "dspo": LossDefaults(beta=0.001, safeguard_mu=0.2),
        "linear": LossDefaults(beta=100.0, safeguard_mu=0.9),
        "mapo": LossDefaults(beta=0.1, safeguard_mu=0.9),
        "simpo": LossDefaults(beta=500.0, safeguard_mu=0.9),  # half of it is MaPO's slope at 0: T s / 2 = 250
        "smpo": LossDefaults(beta=2000.0, safeguard_mu=0.9),
    }
    noise_process_class = DDPMProcess

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_text_to_image_unet(self.pipeline)

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        device = self.pipeline.text_encoder.device
        with no_autocast(device):
            prompt_embeds, _ = self.pipeline.encode_prompt(
                prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        return {"prompt_embeds": prompt_embeds}  # (N, tokens, width)

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        dtype = self.dtype
        return denoiser(
            noisy_latents.to(dtype),
            timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]

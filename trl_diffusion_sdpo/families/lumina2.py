"""Lumina Image 2.0: a transformer that attends to a Gemma 2 prompt and to the image jointly, over flow matching whose
clock runs the other way round."""

from collections.abc import Mapping

import torch

from .base import FLOW_DEFAULTS, Family, check_in_channels, no_autocast
from .noise import FlowMatchingProcess


class Lumina2Family(Family):
    """`Lumina2Pipeline` and the checkpoints saved under its older name.

    The denoiser counts time from noise to image and predicts image minus noise; both are turned round in `predict`.
    Prompts get the pipeline's own system prompt in front, as they do when it draws.

    Sources: https://huggingface.co/papers/2503.21758 for the model; LoRA targets and rate as diffusers' own script.
    """

    name = "Lumina Image 2.0"
    pipeline_classes = ("Lumina2Pipeline", "Lumina2Text2ImgPipeline")
    denoiser_name = "transformer"
    frozen_components = ("vae", "text_encoder")
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")  # as diffusers' own LoRA script for Lumina 2
    # Our choice, since none is published: between those of Stable Diffusion (2e-6) and of SDXL (2e-7).
    learning_rate_full = 1e-6
    learning_rate_lora = 1e-4  # as diffusers' script
    defaults = FLOW_DEFAULTS
    noise_process_class = FlowMatchingProcess
    patch_size = 2

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_in_channels(self, self.pipeline.vae.config.latent_channels)

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        device = self.pipeline.text_encoder.device
        with no_autocast(device):
            prompt_embeds, mask, _, _ = self.pipeline.encode_prompt(
                prompts, do_classifier_free_guidance=False, num_images_per_prompt=1, device=device
            )
        return {"prompt_embeds": prompt_embeds, "prompt_mask": mask.bool()}  # (N, tokens, width) and (N, tokens)

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        dtype = self.dtype
        velocity = denoiser(
            hidden_states=noisy_latents.to(dtype),
            timestep=1 - timesteps / self.noise_process.num_train_timesteps,  # 0 is noise, 1 the image
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            encoder_attention_mask=conditioning["prompt_mask"],
            return_dict=False,
        )[0]
        return -velocity

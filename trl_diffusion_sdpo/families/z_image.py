"""Z-Image: one stream of image and prompt tokens, conditioned on as many Qwen 3 tokens as a prompt has, over flow
matching whose clock runs the other way round."""

from collections.abc import Mapping

import torch
from torch.nn.functional import pad

from .base import FLOW_DEFAULTS, Family, no_autocast
from .noise import FlowMatchingProcess

PROMPT_TOKENS = 512  # the pipeline's `max_sequence_length`


class ZImageFamily(Family):
    """`ZImagePipeline`: Z-Image, and by the same class Z-Image-Turbo; Omni transformers are refused.

    Turbo is distilled from Z-Image to draw in about eight steps without guidance, and nothing in its configuration
    says so. Its LoRA trains here as any other, on the objective of the model it was distilled from: a long training
    costs it the few steps. Tune Z-Image where that matters.

    The denoiser counts time from noise to image and predicts image minus noise; both are turned round in `predict`.
    Guidance is off at `guidance_scale=0`, not 1: the pipeline adds the scaled difference to the prompt's prediction.

    Sources: https://huggingface.co/papers/2511.22699 for the model; LoRA targets and rate as diffusers' own script.
    """

    name = "Z-Image"
    pipeline_classes = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
    denoiser_name = "transformer"
    frozen_components = ("vae", "text_encoder")
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")  # as diffusers' own LoRA script for Z-Image
    # Our choice, since none is published: between those of Stable Diffusion (2e-6) and of SDXL (2e-7).
    learning_rate_full = 1e-6
    learning_rate_lora = 1e-4  # as diffusers' script
    defaults = FLOW_DEFAULTS
    noise_process_class = FlowMatchingProcess
    patch_size = 2

    @property
    def default_resolution(self) -> int:
        """What the pipeline draws if told nothing; its denoiser states no size."""
        return 1024

    def check_pipeline(self) -> None:
        super().check_pipeline()
        if self.denoiser.config.siglip_feat_dim is not None:
            raise ValueError(
                "A Z-Image transformer for text-to-image takes no image features, and this one does "
                f"(`siglip_feat_dim` is {self.denoiser.config.siglip_feat_dim}): it is Omni's. Use Z-Image or "
                "Z-Image-Turbo."
            )

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        device = self.pipeline.text_encoder.device
        with no_autocast(device):
            # A copy of the list: the pipeline writes its chat template into the one it gets.
            rows, _ = self.pipeline.encode_prompt(
                list(prompts), device=device, do_classifier_free_guidance=False, max_sequence_length=PROMPT_TOKENS
            )
        # Every batch is as long as the longest prompt may be, so that rows of several batches fit together.
        prompt_embeds = torch.stack([pad(row, (0, 0, 0, PROMPT_TOKENS - len(row))) for row in rows])
        # On the CPU: the lengths shape the denoiser's sequences, so that the host reads them in every prediction.
        lengths = torch.tensor([len(row) for row in rows])
        return {"prompt_embeds": prompt_embeds, "prompt_lengths": lengths}  # (N, PROMPT_TOKENS, width) and (N,)

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        dtype = self.dtype
        latents = noisy_latents.to(dtype).unsqueeze(2)  # (N, C, 1, H, W): images are videos of one frame
        lengths = conditioning["prompt_lengths"].tolist()
        prompts = conditioning["prompt_embeds"].to(dtype)
        velocities = denoiser(
            list(latents.unbind()),
            (1000 - timesteps) / 1000,  # 0 is noise, 1 the image
            [row[:length] for row, length in zip(prompts, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(velocities).squeeze(2)  # N of (C, 1, H, W) -> (N, C, H, W)

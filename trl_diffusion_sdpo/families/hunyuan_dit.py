"""HunyuanDiT: a transformer conditioned on a bilingual BERT and an mT5 text encoder, trained by DDPM to predict v.

Versions before 1.2 are also conditioned on image sizes and a style.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

from ..utils.errors import UserError
from .base import Family
from .loss_defaults import DDPM_DEFAULTS
from .noise import DDPMProcess, constant

BASE_LATENTS = 512 // 8  # side in latents to which the rotary positions of all image sizes are scaled
BERT = 0  # the pipeline's indices of its text encoders
MT5 = 1


class HunyuanDiTFamily(Family):
    """Trains `HunyuanDiTPipeline`, versions 1.0 to 1.2. Version 1.2 accepts image sizes and style, but ignores them.

    To generate images of any size, call the pipeline with `use_resolution_binning=False`. By default, it rounds sizes
    to a fixed list.
    """

    name = "HunyuanDiT"
    frozen_components = ("vae", "text_encoder", "text_encoder_2")
    # Our choice: all projections of self-attention and cross-attention. Diffusers has no LoRA script for HunyuanDiT.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    learning_rate_full = 1e-6  # our choice; no rate is published for preference tuning of this model
    learning_rate_lora = 1e-4  # from HunyuanDiT's LoRA script
    defaults = DDPM_DEFAULTS
    noise_process_class = DDPMProcess
    patch_size = 2
    batch_dimensions = {"image_rotary_emb": None}

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """Return arguments that also stop the pipeline from rounding image sizes to a fixed list."""
        return {**super().generation_kwargs(scale), "use_resolution_binning": False}

    def check_pipeline(self) -> None:
        super().check_pipeline()
        transformer = self.denoiser.config
        channels = self.pipeline.vae.config.latent_channels
        if transformer.in_channels != channels or not transformer.learn_sigma:
            raise UserError(
                f"A HunyuanDiT transformer must have {channels} input channels, the latent channels of its VAE, and "
                f"`learn_sigma=True`. This one has {transformer.in_channels} input channels and "
                f"`learn_sigma={transformer.learn_sigma}`. Use a text-to-image checkpoint."
            )

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        embeds, mask = self._encode_with("text_encoder", BERT, prompts)
        embeds_2, mask_2 = self._encode_with("text_encoder_2", MT5, prompts)
        return {
            "prompt_embeds": embeds,  # (N, 77, width of BERT)
            "prompt_attention_mask": mask,  # (N, 77)
            "prompt_embeds_2": embeds_2,  # (N, 256, width of mT5)
            "prompt_attention_mask_2": mask_2,  # (N, 256)
        }

    def _encode_with(self, text_encoder: str, index: int, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = getattr(self.pipeline, text_encoder).dtype
        embeds, _, mask, _ = self.call_encode_prompt(
            prompts,
            text_encoder=text_encoder,
            dtype=dtype,
            do_classifier_free_guidance=False,
            text_encoder_index=index,
        )
        return embeds, mask.bool()

    def size_conditioning(
        self, original_sizes: torch.Tensor, crop_top_lefts: torch.Tensor, target_size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """Return `image_meta_size`, `(N, 6)`: original size, target size and crop, as in the pipeline. In float32,
        because half precision would round them."""
        target = constant(tuple(target_size), original_sizes.dtype, original_sizes.device)
        target_sizes = target.expand(len(original_sizes), 2)
        image_meta_size = torch.cat([original_sizes, target_sizes, crop_top_lefts.to(original_sizes)], dim=1)
        return {"image_meta_size": image_meta_size.float()}

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        dtype = latents.dtype
        return {
            "hidden_states": latents,
            "timestep": timesteps.to(dtype),  # the transformer computes its conditioning in the timesteps' dtype
            "encoder_hidden_states": conditioning["prompt_embeds"].to(dtype),
            "text_embedding_mask": conditioning["prompt_attention_mask"],
            # The transformer calls `view` on this tensor and on `image_meta_size`, so both must be contiguous.
            "encoder_hidden_states_t5": conditioning["prompt_embeds_2"].to(dtype).contiguous(),
            "image_meta_size": conditioning["image_meta_size"].contiguous(),
            "text_embedding_mask_t5": conditioning["prompt_attention_mask_2"],
            "style": torch.zeros_like(timesteps, dtype=torch.long),  # the only style
            "image_rotary_emb": self._rotary_embedding(latents),
        }

    def prediction_of(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return output.chunk(2, dim=1)[0]  # (N, 2C, H, W) -> (N, C, H, W): drop the learned variance

    def _rotary_embedding(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cosines and sines of the rotary position embeddings, `(tokens, width of an attention head)`
        each."""
        grid = tuple(side // self.patch_size for side in latents.shape[-2:])
        region = get_resize_crop_region_for_grid(grid, BASE_LATENTS // self.patch_size)
        width = self.denoiser.config.attention_head_dim
        return get_2d_rotary_pos_embed(width, region, grid, device=latents.device, output_type="pt")

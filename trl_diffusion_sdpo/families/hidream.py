"""HiDream-I1: a transformer with routed experts, trained by flow matching.

It is conditioned on two CLIP encoders, T5 and every layer of Llama 3.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from torch import nn

from ..utils.errors import UserError
from .base import Family, check_in_channels


class RoutedExperts(nn.Module):
    """Mixture-of-experts layer of diffusers' transformer, with the same weights under the same names.

    It gives the same output in training and evaluation mode. Diffusers' own layer computes no gradient in evaluation
    mode, and in training mode adds in another order, so policy and reference would round differently.
    """

    def __init__(self, layer: MOEFeedForwardSwiGLU):
        super().__init__()
        self.shared_experts = layer.shared_experts
        self.experts = layer.experts
        self.gate = layer.gate
        self.training = layer.training

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for tokens `(N, tokens, width)`.

        Every expert is called, even one without tokens: FSDP and DeepSpeed gather its weights only if all processes
        call it.
        """
        experts, weights, _ = self.gate(hidden_states)  # both (N * tokens, number of experts per token)
        tokens = hidden_states.flatten(0, -2)
        order = experts.flatten().argsort(stable=True)  # the first expert's tokens, then the second's, ...
        numbers = torch.arange(len(self.experts), device=experts.device)
        counts = (experts.flatten().unsqueeze(-1) == numbers).sum(dim=0).tolist()  # `tolist` waits for the device
        parts = tokens[order // experts.shape[1]].split(counts)
        sorted_outputs = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        outputs = torch.empty_like(sorted_outputs).index_copy(0, order, sorted_outputs)
        routed = (outputs.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)
        return routed.view_as(hidden_states).to(hidden_states.dtype) + self.shared_experts(hidden_states)


class HiDreamFamily(Family):
    """Trains `HiDreamImagePipeline`.

    Prompts are padded to 128 tokens, without a mask. The pipeline's call generates images of about 1 megapixel,
    whatever size you request.
    """

    name = "HiDream-I1"
    frozen_components = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
    # The attention projections of image tokens, as in diffusers' train_dreambooth_lora_hidream.py.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out")
    learning_rate_full = 1e-6  # our choice, as for other large transformers
    learning_rate_lora = 1e-4  # our choice, as for similar transformers
    weighting_scheme = "logit_normal"
    patch_size = 2
    batch_dimensions = {"encoder_hidden_states_llama3": 1}  # the first dimension has the layers of Llama

    @property
    def default_resolution(self) -> int:
        return self.pipeline.default_sample_size * self.vae_scale_factor

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_in_channels(self, self.pipeline.vae.config.latent_channels)

    def prepare_denoiser(self, denoiser: nn.Module) -> None:
        """Replace every mixture-of-experts layer by [`RoutedExperts`], which has the same weights."""
        for module in list(denoiser.modules()):
            for name, child in module.named_children():
                if isinstance(child, MOEFeedForwardSwiGLU):
                    setattr(module, name, RoutedExperts(child))

    def check_image_size(self, height: int, width: int) -> None:
        tokens = self.tokens_of_image(height, width)
        most = self.denoiser.max_seq
        if height != width and tokens > most:
            raise UserError(
                f"For {self.name}, an image that is not square can have at most {most} tokens, and an image of {width} "
                f"x {height} pixels has {tokens} tokens. Lower `resolution`."
            )

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        t5, _, llama, _, pooled, _ = self.call_encode_prompt(prompts, do_classifier_free_guidance=False)
        return {
            "t5_embeds": t5,  # (N, tokens, width of T5)
            "llama_embeds": llama.transpose(0, 1).contiguous(),  # (N, layers, tokens, width of Llama)
            "pooled_prompt_embeds": pooled,  # (N, projection widths of both CLIP encoders)
        }

    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        # Left to the transformer, this would read the numbers of rows and columns from a tensor and wait for the
        # device several times per image.
        tokens, mask, _, ids = self.denoiser.patchify(latents)
        if mask is None:  # the image is square, so no token is padding
            mask = tokens.new_ones(tokens.shape[:2])
        rows, columns = (side // self.denoiser.config.patch_size for side in latents.shape[-2:])
        return {
            "hidden_states": tokens,
            "hidden_states_masks": mask,
            "img_sizes": [(rows, columns)] * len(latents),
            "img_ids": ids,
            "timesteps": timesteps,
            "encoder_hidden_states_t5": conditioning["t5_embeds"].to(latents.dtype),
            "encoder_hidden_states_llama3": conditioning["llama_embeds"].to(latents.dtype).transpose(0, 1),
            "pooled_embeds": conditioning["pooled_prompt_embeds"].to(latents.dtype),
        }

    def prediction_of(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Return the negative of the transformer's output, as the pipeline does. In training mode the output comes as
        patches, which are put together first."""
        if output.shape[2:] != latents.shape[2:]:
            patch = self.denoiser.config.patch_size
            rows, columns = (side // patch for side in latents.shape[2:])
            squares = output[:, :, : rows * columns].unflatten(2, (rows, columns)).unflatten(4, (patch, patch))
            output = squares.permute(0, 1, 2, 4, 3, 5).reshape(latents.shape)
        return -output

    def timesteps_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return inputs["timesteps"]

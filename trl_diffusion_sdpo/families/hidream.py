"""HiDream-I1: a transformer with routed experts, trained by flow matching.

The transformer is conditioned on two CLIP encoders, T5 and every layer of Llama 3.
"""

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from diffusers import DiffusionPipeline, HiDreamImageTransformer2DModel
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU

from .base import Family, check_in_channels


def route(self: MOEFeedForwardSwiGLU, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the output of a mixture-of-experts layer for tokens `(N, tokens, width)`. Training mode and
    evaluation mode give the same output.

    In diffusers' own forward pass, evaluation mode computes no gradient, and training mode adds numbers in another
    order, so policy and reference would round differently. This function calls every expert, even one without tokens,
    because FSDP and DeepSpeed gather an expert's weights only if all processes call the expert.
    """
    experts, weights, _ = self.gate(hidden_states)  # both (N * tokens, number of experts per token)
    tokens = hidden_states.flatten(0, -2)
    order = experts.flatten().argsort(stable=True)  # the tokens of the first expert, then those of the second, ...
    numbers = torch.arange(len(self.experts), device=experts.device)
    counts = (experts.flatten().unsqueeze(-1) == numbers).sum(dim=0).tolist()  # `tolist` waits for the device
    parts = tokens[order // experts.shape[1]].split(counts)
    sorted_outputs = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
    outputs = torch.empty_like(sorted_outputs).index_copy(0, order, sorted_outputs)
    routed = (outputs.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)
    return routed.view_as(hidden_states).to(hidden_states.dtype) + self.shared_experts(hidden_states)


def patchify(self: HiDreamImageTransformer2DModel, hidden_states: torch.Tensor) -> tuple[Any, ...]:
    """Return what diffusers' `patchify` returns, but with the numbers of rows and columns as Python integers instead of
    a tensor. Reading the tensor would wait for the device several times per image."""
    tokens, masks, _, ids = type(self).patchify(self, hidden_states)
    rows, columns = (side // self.config.patch_size for side in hidden_states.shape[-2:])
    return tokens, masks, [(rows, columns)] * len(hidden_states), ids


def mend(denoiser: torch.nn.Module) -> None:
    """Replace two methods of a HiDream transformer by `route` and `patchify`. Other transformers are not changed."""
    for module in denoiser.modules():
        if isinstance(module, MOEFeedForwardSwiGLU):
            module.forward = MethodType(route, module)
        elif isinstance(module, HiDreamImageTransformer2DModel):
            module.patchify = MethodType(patchify, module)


class HiDreamFamily(Family):
    """Trains `HiDreamImagePipeline`.

    Prompts are padded to 128 tokens, and the padding is not masked. Whatever size is requested, the pipeline's call
    generates images of about 1 megapixel.
    """

    name = "HiDream-I1"
    pipeline_classes = ("HiDreamImagePipeline",)
    frozen_components = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
    # The attention projections of image tokens, as in diffusers' train_dreambooth_lora_hidream.py.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out")
    learning_rate_full = 1e-6  # our choice, as for other large transformers
    learning_rate_lora = 1e-4  # our choice, as for similar transformers
    weighting_scheme = "logit_normal"
    patch_size = 2
    batch_dimensions = {"encoder_hidden_states_llama3": 1}  # the first dimension has the layers of Llama

    def __init__(self, pipeline: DiffusionPipeline):
        super().__init__(pipeline)
        mend(self.denoiser)

    @property
    def default_resolution(self) -> int:
        return self.pipeline.default_sample_size * self.vae_scale_factor

    def check_pipeline(self) -> None:
        super().check_pipeline()
        check_in_channels(self, self.pipeline.vae.config.latent_channels)

    def check_image_size(self, height: int, width: int) -> None:
        tokens, most = self.tokens_of_image(height, width), self.denoiser.max_seq
        if height != width and tokens > most:
            raise ValueError(
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
        return {
            "hidden_states": latents,
            "timesteps": timesteps,
            "encoder_hidden_states_t5": conditioning["t5_embeds"].to(latents.dtype),
            "encoder_hidden_states_llama3": conditioning["llama_embeds"].to(latents.dtype).transpose(0, 1),
            "pooled_embeds": conditioning["pooled_prompt_embeds"].to(latents.dtype),
        }

    def prediction_of(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Return the negative of the transformer's output, as the pipeline does. In training mode, the transformer
        returns patches, which this method first puts together."""
        if output.shape[2:] != latents.shape[2:]:
            patch = self.denoiser.config.patch_size
            rows, columns = (side // patch for side in latents.shape[2:])
            squares = output[:, :, : rows * columns].unflatten(2, (rows, columns)).unflatten(4, (patch, patch))
            output = squares.permute(0, 1, 2, 4, 3, 5).reshape(latents.shape)
        return -output

    def timesteps_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        return inputs["timesteps"]

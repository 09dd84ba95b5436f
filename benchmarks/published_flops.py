"""Count the FLOPs of published models on the meta device: denoiser, VAE encoder and text encoders.

    python benchmarks/published_flops.py

writes `benchmarks/results/flops.json`, with the FLOPs in `docs/memory_and_speed.md`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from published_sizes import PIPELINES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import PreTrainedModel

FILE = Path(__file__).parent / "results" / "flops.json"
MODELS = ("sd15", "sdxl", "sd35-medium", "flux-dev")
CLIP_TOKENS, T5_TOKENS = 77, {"sd35-medium": 256, "flux-dev": 512}
PASSES = {"lora": 2, "full": 3}  # passes of the policy: its backward pass costs one or two forward passes


def published_flops() -> dict[str, dict[str, int]]:
    """Return the FLOPs that this script counted last, by model."""
    return json.loads(FILE.read_text(encoding="utf-8"))["models"]


def pair_flops(flops: Mapping[str, int], tuning: str, *, cached: bool = False, errors: bool = False) -> int:
    """Return the FLOPs of a step for one pair of images.

    Args:
        flops (`Mapping[str, int]`): FLOPs of `"denoiser"` and `"vae"` per image, and of `"text"` per prompt.
        cached (`bool`): Whether latents and prompt embeddings are precomputed.
        errors (`bool`): Whether the reference's errors are precomputed.
    """
    encoding = 0 if cached else 2 * flops["vae"] + flops["text"]
    return encoding + 2 * flops["denoiser"] * (PASSES[tuning] + (0 if errors else 1))


def count(model: str) -> dict[str, int]:
    """Count the FLOPs of a model's parts for an image of its published size and a prompt of the length used in
    training."""
    published = PIPELINES[model]
    side = published.resolution
    with torch.device("meta"):
        parts = {
            name: construct(class_name, settings)
            for name, (class_name, settings) in published.components.items()
            if name != "scheduler"
        }
        denoiser = next(parts[name] for name in ("unet", "transformer") if name in parts)
        images, text = torch.empty(1, 3, side, side), 0
        for name, part in parts.items():
            if name.startswith("text_encoder"):
                length = T5_TOKENS[model] if "T5" in type(part).__name__ else CLIP_TOKENS
                text += flops(part, torch.empty(1, length, dtype=torch.long))
        inputs = denoiser_inputs(model, denoiser, side)
    vae = flops(parts["vae"].encoder, images)
    return {"denoiser": flops(denoiser, **inputs), "vae": vae, "text": text, "resolution": side}


def construct(class_name: str, settings: Mapping[str, Any]) -> nn.Module:
    network_class = getattr(diffusers, class_name, None) or getattr(transformers, class_name)
    if issubclass(network_class, PreTrainedModel):
        return network_class(network_class.config_class(**settings))
    return network_class(**settings)


def denoiser_inputs(model: str, denoiser: Any, side: int) -> dict[str, Any]:
    """Return a denoiser's inputs for one image, on the default device."""
    config, latent = denoiser.config, side // 8
    if model == "flux-dev":
        tokens = (latent // 2) ** 2
        return {
            "hidden_states": torch.empty(1, tokens, config.in_channels),
            "encoder_hidden_states": torch.empty(1, T5_TOKENS[model], config.joint_attention_dim),
            "pooled_projections": torch.empty(1, config.pooled_projection_dim),
            "timestep": torch.empty(1),
            "guidance": torch.empty(1),
            "img_ids": torch.empty(tokens, 3),
            "txt_ids": torch.empty(T5_TOKENS[model], 3),
        }
    if model == "sd35-medium":
        return {
            "hidden_states": torch.empty(1, config.in_channels, latent, latent),
            "encoder_hidden_states": torch.empty(1, CLIP_TOKENS + T5_TOKENS[model], config.joint_attention_dim),
            "pooled_projections": torch.empty(1, config.pooled_projection_dim),
            "timestep": torch.empty(1),
        }
    inputs: dict[str, Any] = {
        "sample": torch.empty(1, config.in_channels, latent, latent),
        "timestep": torch.empty(1),
        "encoder_hidden_states": torch.empty(1, CLIP_TOKENS, config.cross_attention_dim),
    }
    if model == "sdxl":
        inputs["added_cond_kwargs"] = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
    return inputs


@torch.no_grad()
def flops(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Count the FLOPs of a forward pass. Tensors may be on the meta device."""
    with FlopCounterMode(display=False) as counter:
        module(*args, **kwargs)
    return counter.get_total_flops()


def main() -> None:
    found = {model: count(model) for model in tqdm(MODELS, unit="model", leave=False, disable=None)}
    FILE.write_text(json.dumps({"torch": torch.__version__, "models": found}, indent=1) + "\n", encoding="utf-8")
    for model, parts in found.items():
        shown = ", ".join(f"{part} {parts[part] / 1e12:.2f}" for part in ("denoiser", "vae", "text"))
        print(f"{model}, {parts['resolution']} px, TFLOP: {shown}")


if __name__ == "__main__":
    main()

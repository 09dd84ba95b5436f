"""Count the FLOPs that a pair takes at published sizes, on tensors without data.

A pair has two images. The VAE encodes both, the text encoders its prompt; the reference and the policy predict both. A
backward pass counts as one forward pass for a LoRA, and as two for all weights. With `precompute_latents`, VAE and text
encoders are left out, and with `precompute_ref_errors` the reference too.

    python benchmarks/pair_flops.py        # a minute; writes results/pair_flops.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_networks import construct, network_class
from published_sizes import PIPELINES
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).parent / "results" / "pair_flops.json"
CLIP_TOKENS = 77
T5_TOKENS = {"sd35-medium": 256, "flux-dev": 512}
SIZES = {  # key in the results -> model, and the side of its images in pixels
    **{model: (model, pipeline.resolution) for model, pipeline in PIPELINES.items()},
    "flux-dev-512": ("flux-dev", 512),
}


def inputs_of_denoiser(model: str, side: int) -> dict[str, Any]:
    """Return what the denoiser gets for one image of `side` latents and its prompt, without data."""
    empty = torch.empty
    if model == "sd15":
        return {"sample": empty(1, 4, side, side), "encoder_hidden_states": empty(1, CLIP_TOKENS, 768)}
    if model == "sdxl":
        sizes = {"text_embeds": empty(1, 1280), "time_ids": empty(1, 6)}
        inputs = {"sample": empty(1, 4, side, side), "encoder_hidden_states": empty(1, CLIP_TOKENS, 2048)}
        return {**inputs, "added_cond_kwargs": sizes}
    tokens = T5_TOKENS[model]
    if model == "sd35-medium":
        inputs = {"hidden_states": empty(1, 16, side, side), "pooled_projections": empty(1, 2048)}
        return {**inputs, "encoder_hidden_states": empty(1, CLIP_TOKENS + tokens, 4096)}
    patches = (side // 2) ** 2
    inputs = {"hidden_states": empty(1, patches, 64), "encoder_hidden_states": empty(1, tokens, 4096)}
    places = {"img_ids": empty(patches, 3), "txt_ids": empty(tokens, 3)}
    return {**inputs, **places, "pooled_projections": empty(1, 768), "guidance": empty(1)}


def flops(call: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def count(model: str, side: int) -> dict[str, int]:
    """Return the FLOPs of one image's encoding and prediction, and of one prompt's encoding."""
    counted = {"vae": 0, "text": 0, "denoiser": 0}
    with torch.device("meta"):
        for name, (class_name, settings) in PIPELINES[model].components.items():
            if name == "scheduler":
                continue
            network = construct(network_class(class_name), settings).eval()
            if name == "vae":
                image = torch.empty(1, 3, side, side)
                counted["vae"] = flops(lambda network=network, image=image: network.encode(image))
            elif name.startswith("text_encoder"):
                tokens = T5_TOKENS[model] if class_name.startswith("T5") else CLIP_TOKENS
                ids = torch.zeros(1, tokens, dtype=torch.long)
                counted["text"] += flops(lambda network=network, ids=ids: network(ids))
            else:
                inputs = {"timestep": torch.empty(1), **inputs_of_denoiser(model, side // 8)}
                counted["denoiser"] = flops(lambda network=network, inputs=inputs: network(**inputs))
    return counted


def main() -> int:
    counted = {}
    for key, (model, side) in SIZES.items():
        counted[key] = count(model, side)
        print(key, {name: f"{value / 1e12:.2f} TFLOP" for name, value in counted[key].items()})
    RESULTS.write_text(json.dumps(counted, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

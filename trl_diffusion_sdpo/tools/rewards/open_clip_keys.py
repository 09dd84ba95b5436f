"""Translate the names of open_clip's weights to those of transformers' `CLIPModel`."""

import re
from collections.abc import Mapping

import torch

# Pattern in an open_clip name -> its replacement for `CLIPModel`.
_NAMES = {
    r"^visual\.class_embedding$": "vision_model.embeddings.class_embedding",
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",  # transformers misspells this name
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^visual\.proj$": "visual_projection.weight",
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^ln_final\.": "text_model.final_layer_norm.",
    r"^text_projection$": "text_projection.weight",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"\.attn\.out_proj\.": ".self_attn.out_proj.",
    r"\.ln_1\.": ".layer_norm1.",
    r"\.ln_2\.": ".layer_norm2.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
}


def clip_state_dict(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return open_clip's weights under the names of `CLIPModel`.

    Unknown names stay, so that `load_state_dict` raises an error that lists them.
    """
    renamed = {}
    for name, weight in weights.items():
        if name == "attn_mask":  # a buffer, not a weight
            continue
        weight = weight.T if name in ("visual.proj", "text_projection") else weight
        name = rename(name, _NAMES)
        if ".attn.in_proj_" not in name:
            renamed[name] = weight.contiguous()
            continue
        # Split open_clip's one matrix (3D, D) for queries, keys and values into three (D, D).
        block, _, kind = name.partition(".attn.in_proj_")
        for letter, third in zip("qkv", weight.chunk(3), strict=True):
            renamed[f"{block}.self_attn.{letter}_proj.{kind}"] = third.contiguous()
    return renamed


def rename(name: str, patterns: Mapping[str, str]) -> str:
    """Return a name after replacing matches of each regular expression in `patterns`, which maps them to their
    replacements."""
    for pattern, target in patterns.items():
        name = re.sub(pattern, target, name)
    return name

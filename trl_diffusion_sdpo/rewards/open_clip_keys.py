"""Translate the names of open_clip's weights to those of transformers' `CLIPModel`."""

import re
from collections.abc import Mapping

import torch

# Pattern of an open_clip name -> name in `CLIPModel`.
_VISION = {
    r"visual\.class_embedding": "vision_model.embeddings.class_embedding",
    r"visual\.conv1\.weight": "vision_model.embeddings.patch_embedding.weight",
    r"visual\.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    r"visual\.ln_pre\.(.*)": r"vision_model.pre_layrnorm.\1",  # transformers misspells this name
    r"visual\.ln_post\.(.*)": r"vision_model.post_layernorm.\1",
    r"visual\.proj": "visual_projection.weight",
    r"visual\.transformer\.resblocks\.(.*)": r"vision_model.encoder.layers.\1",
}
_TEXT = {
    r"token_embedding\.weight": "text_model.embeddings.token_embedding.weight",
    r"positional_embedding": "text_model.embeddings.position_embedding.weight",
    r"ln_final\.(.*)": r"text_model.final_layer_norm.\1",
    r"text_projection": "text_projection.weight",
    r"transformer\.resblocks\.(.*)": r"text_model.encoder.layers.\1",
    r"logit_scale": "logit_scale",
}
_BLOCK = {
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
_TRANSPOSED = ("visual.proj", "text_projection")
_BUFFERS = ("attn_mask",)


def clip_state_dict(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return open_clip's weights under the names that `CLIPModel` uses.

    Unknown names are not changed, so that `load_state_dict` raises an error that lists these names.
    """
    renamed = {}
    for name, weight in weights.items():
        if name in _BUFFERS:
            continue
        target = _renamed(name)
        weight = weight.T if name in _TRANSPOSED else weight
        if ".attn.in_proj_" not in target:
            renamed[target] = weight.contiguous()
            continue
        # open_clip has one matrix for queries, keys and values. Split (3D, D) into three matrices (D, D).
        before, _, kind = target.partition(".attn.in_proj_")
        for letter, third in zip("qkv", weight.chunk(3), strict=True):
            renamed[f"{before}.self_attn.{letter}_proj.{kind}"] = third.contiguous()
    return renamed


def _renamed(name: str) -> str:
    for pattern, target in {**_VISION, **_TEXT}.items():
        if re.fullmatch(pattern, name):
            name = re.sub(f"^{pattern}$", target, name)
            break
    for part, target in _BLOCK.items():
        name = name.replace(part, target)
    return name

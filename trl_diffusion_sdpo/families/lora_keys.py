"""Names of the modules of diffusers' denoisers in the models' original code, from which kohya's scripts, ComfyUI and
related tools form the names of a LoRA's tensors.

Sources: `networks/lora.py`, `lora_sd3.py` and `lora_flux.py` of kohya-ss/sd-scripts, and `model_lora_keys_unet` of
ComfyUI's `comfy/lora.py` with the tables `*_to_diffusers` of `comfy/utils.py`. These read `lora_unet_` followed by the
name of a weight of the original model, or for UNets by the name in diffusers.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

# Relative numbers of rows of the matrices that the original model concatenates into one; `None` where they differ
# between checkpoints.
EQUAL_2, EQUAL_3, QKV_MLP, UNKNOWN_3 = (1, 1), (1, 1, 1), (1, 1, 1, 4), (None, None, None)


class OriginalModule(NamedTuple):
    """A module of diffusers in the original model.

    Attributes:
        module: Name of the original module, with `{}` for the block's number.
        position: Index among the modules of diffusers whose matrices are concatenated in the original one.
        rows: Relative numbers of rows of these modules.
    """

    module: str
    position: int = 0
    rows: tuple[int | None, ...] = (1,)


def fused(module: str, rows: tuple[int | None, ...], prefix: str, *names: str) -> dict[str, OriginalModule]:
    """Entries of modules that the original model concatenates, in the order of `names`."""
    return {f"{prefix}.{name}": OriginalModule(module, position, rows) for position, name in enumerate(names)}


def renamed(inside: str, prefix: str, names: Mapping[str, str]) -> dict[str, OriginalModule]:
    """Entries of modules that the original model only renames: name below `prefix` -> name below `inside`."""
    return {f"{prefix}.{ours}": OriginalModule(f"{inside}.{theirs}") for ours, theirs in names.items()}


_TO, _ADD = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_FLUX, _FLUX_SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"

_TWO_STREAMS = {
    **fused("double_blocks.{}.img_attn.qkv", EQUAL_3, f"{_FLUX}.attn", *_TO),
    **fused("double_blocks.{}.txt_attn.qkv", EQUAL_3, f"{_FLUX}.attn", *_ADD),
    **renamed(
        "double_blocks.{}",
        _FLUX,
        {"attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj"},
    ),
}

FLUX = {
    **_TWO_STREAMS,
    **renamed(
        "double_blocks.{}",
        _FLUX,
        {
            "ff.net.0.proj": "img_mlp.0",
            "ff.net.2": "img_mlp.2",
            "ff_context.net.0.proj": "txt_mlp.0",
            "ff_context.net.2": "txt_mlp.2",
            "norm1.linear": "img_mod.lin",
            "norm1_context.linear": "txt_mod.lin",
        },
    ),
    **fused("single_blocks.{}.linear1", QKV_MLP, _FLUX_SINGLE, *(f"attn.{name}" for name in _TO), "proj_mlp"),
    **renamed("single_blocks.{}", _FLUX_SINGLE, {"proj_out": "linear2", "norm.linear": "modulation.lin"}),
}

FLUX_2 = {
    **_TWO_STREAMS,
    **renamed(
        "double_blocks.{}",
        _FLUX,
        {
            "ff.linear_in": "img_mlp.0",
            "ff.linear_out": "img_mlp.2",
            "ff_context.linear_in": "txt_mlp.0",
            "ff_context.linear_out": "txt_mlp.2",
        },
    ),
    **renamed("single_blocks.{}", _FLUX_SINGLE, {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}),
}

STABLE_DIFFUSION_3 = {
    **fused("joint_blocks.{}.x_block.attn.qkv", EQUAL_3, f"{_FLUX}.attn", *_TO),
    **fused("joint_blocks.{}.context_block.attn.qkv", EQUAL_3, f"{_FLUX}.attn", *_ADD),
    **fused("joint_blocks.{}.x_block.attn2.qkv", EQUAL_3, f"{_FLUX}.attn2", *_TO),
    # Without `norm1_context`, whose two halves are swapped in the last block.
    **renamed(
        "joint_blocks.{}",
        _FLUX,
        {
            "attn.to_out.0": "x_block.attn.proj",
            "attn.to_add_out": "context_block.attn.proj",
            "attn2.to_out.0": "x_block.attn2.proj",
            "ff.net.0.proj": "x_block.mlp.fc1",
            "ff.net.2": "x_block.mlp.fc2",
            "ff_context.net.0.proj": "context_block.mlp.fc1",
            "ff_context.net.2": "context_block.mlp.fc2",
            "norm1.linear": "x_block.adaLN_modulation.1",
        },
    ),
}

_AURA_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
_AURA_CONTEXT = {"add_q_proj": "q", "add_k_proj": "k", "add_v_proj": "v", "to_add_out": "o"}
_AURA_FEED_FORWARD = {"linear_1": "c_fc1", "linear_2": "c_fc2", "out_projection": "c_proj"}
AURA_FLOW = {
    **renamed(
        "double_layers.{}.attn", "joint_transformer_blocks.{}.attn", {k: f"w2{v}" for k, v in _AURA_ATTENTION.items()}
    ),
    **renamed(
        "double_layers.{}.attn", "joint_transformer_blocks.{}.attn", {k: f"w1{v}" for k, v in _AURA_CONTEXT.items()}
    ),
    **renamed("double_layers.{}.mlpX", "joint_transformer_blocks.{}.ff", _AURA_FEED_FORWARD),
    **renamed("double_layers.{}.mlpC", "joint_transformer_blocks.{}.ff_context", _AURA_FEED_FORWARD),
    **renamed(
        "single_layers.{}.attn", "single_transformer_blocks.{}.attn", {k: f"w1{v}" for k, v in _AURA_ATTENTION.items()}
    ),
    **renamed("single_layers.{}.mlp", "single_transformer_blocks.{}.ff", _AURA_FEED_FORWARD),
}

_EMBEDDER = {"linear_1": "mlp.0", "linear_2": "mlp.2"}
PIXART = {
    **fused("blocks.{}.attn.qkv", EQUAL_3, f"{_FLUX}.attn1", *_TO),
    **fused("blocks.{}.cross_attn.kv_linear", EQUAL_2, f"{_FLUX}.attn2", "to_k", "to_v"),
    **renamed(
        "blocks.{}",
        _FLUX,
        {
            "attn1.to_out.0": "attn.proj",
            "attn2.to_q": "cross_attn.q_linear",
            "attn2.to_out.0": "cross_attn.proj",
            "ff.net.0.proj": "mlp.fc1",
            "ff.net.2": "mlp.fc2",
        },
    ),
    **renamed("t_embedder", "adaln_single.emb.timestep_embedder", _EMBEDDER),
    **renamed("csize_embedder", "adaln_single.emb.resolution_embedder", _EMBEDDER),
    **renamed("ar_embedder", "adaln_single.emb.aspect_ratio_embedder", _EMBEDDER),
    "adaln_single.linear": OriginalModule("t_block.1"),
    "caption_projection.linear_1": OriginalModule("y_embedder.y_proj.fc1"),
    "caption_projection.linear_2": OriginalModule("y_embedder.y_proj.fc2"),
    "pos_embed.proj": OriginalModule("x_embedder.proj"),
    "proj_out": OriginalModule("final_layer.linear"),
}

_WAN_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
WAN = {
    **renamed("blocks.{}.self_attn", "blocks.{}.attn1", _WAN_ATTENTION),
    **renamed("blocks.{}.cross_attn", "blocks.{}.attn2", _WAN_ATTENTION),
    **renamed("blocks.{}.ffn", "blocks.{}.ffn", {"net.0.proj": "0", "net.2": "2"}),
}

Z_IMAGE = {
    name: original
    for blocks in ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
    for name, original in {
        **fused(f"{blocks}.attention.qkv", EQUAL_3, f"{blocks}.attention", *_TO),
        **renamed(
            blocks,
            blocks,
            {"attention.to_out.0": "attention.out", "adaLN_modulation.0": "adaLN_modulation.0"}
            | {name: name for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")},
        ),
    }.items()
}

LUMINA_2 = {
    name: original
    for blocks in ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
    for name, original in {
        **fused(f"{blocks}.attention.qkv", UNKNOWN_3, f"{blocks}.attn", *_TO),
        **renamed(
            blocks,
            blocks,
            {"attn.to_out.0": "attention.out"}
            | {f"feed_forward.linear_{number}": f"feed_forward.w{number}" for number in (1, 2, 3)},
        ),
    }.items()
}

# Class of the denoiser -> its entries; `None` if the tools read the names in diffusers.
ORIGINAL_MODULES: dict[str, dict[str, OriginalModule] | None] = {
    "UNet2DConditionModel": None,
    "QwenImageTransformer2DModel": None,
    "SD3Transformer2DModel": STABLE_DIFFUSION_3,
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX_2,
    "AuraFlowTransformer2DModel": AURA_FLOW,
    "PixArtTransformer2DModel": PIXART,
    "WanTransformer3DModel": WAN,
    "ZImageTransformer2DModel": Z_IMAGE,
    "Lumina2Transformer2DModel": LUMINA_2,
}


def original_module(denoiser_class: str, module: str) -> OriginalModule:
    """The original module of a module of a diffusers denoiser, with the block's number.

    Raises:
        ValueError: If the denoiser's class or the module is unknown.
    """
    if denoiser_class not in ORIGINAL_MODULES:
        raise ValueError(
            f"No names are known by which other tools read a LoRA of a {denoiser_class}; they are known for "
            f"{', '.join(sorted(ORIGINAL_MODULES))}. Use `load_lora_weights` of diffusers, or merge the LoRA into the "
            "model."
        )
    entries = ORIGINAL_MODULES[denoiser_class]
    if entries is None:
        return OriginalModule(module)
    for name, original in entries.items():
        found = re.fullmatch(re.escape(name).replace(r"\{\}", r"(\d+)"), module)
        if found:
            return original._replace(module=original.module.format(*found.groups()))
    raise ValueError(
        f"No name is known by which other tools read a LoRA of the module {module} of a {denoiser_class}. Train with "
        "the default `target_modules`, or merge the LoRA into the model."
    )

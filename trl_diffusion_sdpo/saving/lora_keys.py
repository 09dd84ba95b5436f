"""Translate module names of diffusers' denoisers into those of the models' original code.

Kohya's scripts, ComfyUI and related tools name a LoRA's tensors `lora_unet_`, followed by the module's name in the
original code, or for UNets in diffusers.

Sources: `networks/lora.py`, `lora_sd3.py` and `lora_flux.py` of kohya-ss/sd-scripts; the function
`model_lora_keys_unet` in ComfyUI's `comfy/lora.py`; and the tables `*_to_diffusers` in `comfy/utils.py`.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from ..utils.errors import UserError

# The original code often has one matrix where diffusers has several, such as queries, keys and values. These are the
# relative numbers of rows of diffusers' matrices, or `None` if they differ between checkpoints.
EQUAL_2 = (1, 1)
EQUAL_3 = (1, 1, 1)
QKV_MLP = (1, 1, 1, 4)
UNKNOWN_3 = (None, None, None)


class OriginalModule(NamedTuple):
    """Where a diffusers module's matrix is in the original code.

    Attributes:
        module: Name in the original code, with `{}` in place of the block number.
        position: Index of the diffusers module among those that the original code concatenates into `module`.
        rows: Relative numbers of rows of these.
    """

    module: str
    position: int = 0
    rows: tuple[int | None, ...] = (1,)


def fused(module: str, rows: tuple[int | None, ...], prefix: str, *names: str) -> dict[str, OriginalModule]:
    """Map the diffusers modules `names` inside `prefix` to the original `module`, which concatenates their matrices."""
    return {f"{prefix}.{name}": OriginalModule(module, position, rows) for position, name in enumerate(names)}


def renamed(inside: str, prefix: str, names: Mapping[str, str]) -> dict[str, OriginalModule]:
    """Map diffusers modules to original ones that differ only in name: for each entry `ours: theirs` of `names`,
    `{prefix}.{ours}` in diffusers is `{inside}.{theirs}` in the original."""
    return {f"{prefix}.{ours}": OriginalModule(f"{inside}.{theirs}") for ours, theirs in names.items()}


def per_block(
    blocks: tuple[str, ...], attention: str, rows: tuple[int | None, ...], names: Mapping[str, str]
) -> dict[str, OriginalModule]:
    """Map the modules of several kinds of blocks to original ones. In each block, the original code concatenates
    queries, keys and values, and modules in `names` differ only in name."""
    return {
        name: original
        for block in blocks
        for name, original in {
            **fused(f"{block}.attention.qkv", rows, f"{block}.{attention}", *_TO),
            **renamed(block, block, names),
        }.items()
    }


_TO = ("to_q", "to_k", "to_v")
_ADD = ("add_q_proj", "add_k_proj", "add_v_proj")
_FLUX = "transformer_blocks.{}"
_FLUX_SINGLE = "single_transformer_blocks.{}"

_TWO_STREAMS = {
    **fused("double_blocks.{}.img_attn.qkv", EQUAL_3, f"{_FLUX}.attn", *_TO),
    **fused("double_blocks.{}.txt_attn.qkv", EQUAL_3, f"{_FLUX}.attn", *_ADD),
    **renamed("double_blocks.{}", _FLUX, {"attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj"}),
}

FLUX = {
    **_TWO_STREAMS,
    **renamed("double_blocks.{}.img_mlp", f"{_FLUX}.ff", {"net.0.proj": "0", "net.2": "2"}),
    **renamed("double_blocks.{}.txt_mlp", f"{_FLUX}.ff_context", {"net.0.proj": "0", "net.2": "2"}),
    **renamed("double_blocks.{}", _FLUX, {"norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin"}),
    **fused("single_blocks.{}.linear1", QKV_MLP, _FLUX_SINGLE, *(f"attn.{name}" for name in _TO), "proj_mlp"),
    **renamed("single_blocks.{}", _FLUX_SINGLE, {"proj_out": "linear2", "norm.linear": "modulation.lin"}),
}

FLUX_2 = {
    **_TWO_STREAMS,
    **renamed("double_blocks.{}.img_mlp", f"{_FLUX}.ff", {"linear_in": "0", "linear_out": "2"}),
    **renamed("double_blocks.{}.txt_mlp", f"{_FLUX}.ff_context", {"linear_in": "0", "linear_out": "2"}),
    **renamed("single_blocks.{}", _FLUX_SINGLE, {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}),
}

_FC = {"net.0.proj": "fc1", "net.2": "fc2"}
STABLE_DIFFUSION_3 = {
    **fused("joint_blocks.{}.x_block.attn.qkv", EQUAL_3, f"{_FLUX}.attn", *_TO),
    **fused("joint_blocks.{}.context_block.attn.qkv", EQUAL_3, f"{_FLUX}.attn", *_ADD),
    **fused("joint_blocks.{}.x_block.attn2.qkv", EQUAL_3, f"{_FLUX}.attn2", *_TO),
    # `norm1_context` has no entry: in the last block, its two halves have another order.
    **renamed(
        "joint_blocks.{}",
        _FLUX,
        {
            "attn.to_out.0": "x_block.attn.proj",
            "attn.to_add_out": "context_block.attn.proj",
            "attn2.to_out.0": "x_block.attn2.proj",
            "norm1.linear": "x_block.adaLN_modulation.1",
        },
    ),
    **renamed("joint_blocks.{}.x_block.mlp", f"{_FLUX}.ff", _FC),
    **renamed("joint_blocks.{}.context_block.mlp", f"{_FLUX}.ff_context", _FC),
}

_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
_AURA_IMAGE = {name: f"w2{original}" for name, original in _ATTENTION.items()}
_AURA_TEXT = {"add_q_proj": "w1q", "add_k_proj": "w1k", "add_v_proj": "w1v", "to_add_out": "w1o"}
_AURA_SINGLE = {name: f"w1{original}" for name, original in _ATTENTION.items()}
_AURA_FEED_FORWARD = {"linear_1": "c_fc1", "linear_2": "c_fc2", "out_projection": "c_proj"}
AURA_FLOW = {
    **renamed("double_layers.{}.attn", "joint_transformer_blocks.{}.attn", {**_AURA_IMAGE, **_AURA_TEXT}),
    **renamed("double_layers.{}.mlpX", "joint_transformer_blocks.{}.ff", _AURA_FEED_FORWARD),
    **renamed("double_layers.{}.mlpC", "joint_transformer_blocks.{}.ff_context", _AURA_FEED_FORWARD),
    **renamed("single_layers.{}.attn", "single_transformer_blocks.{}.attn", _AURA_SINGLE),
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
        },
    ),
    **renamed("blocks.{}.mlp", f"{_FLUX}.ff", _FC),
    **renamed("t_embedder", "adaln_single.emb.timestep_embedder", _EMBEDDER),
    **renamed("csize_embedder", "adaln_single.emb.resolution_embedder", _EMBEDDER),
    **renamed("ar_embedder", "adaln_single.emb.aspect_ratio_embedder", _EMBEDDER),
    "adaln_single.linear": OriginalModule("t_block.1"),
    "caption_projection.linear_1": OriginalModule("y_embedder.y_proj.fc1"),
    "caption_projection.linear_2": OriginalModule("y_embedder.y_proj.fc2"),
    "pos_embed.proj": OriginalModule("x_embedder.proj"),
    "proj_out": OriginalModule("final_layer.linear"),
}

WAN = {
    **renamed("blocks.{}.self_attn", "blocks.{}.attn1", _ATTENTION),
    **renamed("blocks.{}.cross_attn", "blocks.{}.attn2", _ATTENTION),
    **renamed("blocks.{}.ffn", "blocks.{}.ffn", {"net.0.proj": "0", "net.2": "2"}),
}

_KREA_2_BLOCK = {
    **{f"attn.{name}": f"attn.w{original}" for name, original in _ATTENTION.items()},
    "attn.to_gate": "attn.gate",
    **{f"ff.{name}": f"mlp.{name}" for name in ("gate", "up", "down")},
}
KREA_2 = {
    **renamed("blocks.{}", _FLUX, _KREA_2_BLOCK),
    **renamed("txtfusion.layerwise_blocks.{}", "text_fusion.layerwise_blocks.{}", _KREA_2_BLOCK),
    **renamed("txtfusion.refiner_blocks.{}", "text_fusion.refiner_blocks.{}", _KREA_2_BLOCK),
}

_QWEN_MLP = "transformer_blocks.{}.img_mlp"
QWEN_IMAGE_21 = {
    **renamed(f"{_FLUX}.attn", f"{_FLUX}.attn", {name: name for name in (*_TO, "to_out.0")}),
    **fused(f"{_QWEN_MLP}.gate_up", EQUAL_2, _QWEN_MLP, "gate_layer", "proj"),
    **renamed(_QWEN_MLP, _QWEN_MLP, {"out": "out"}),
}

_SAME_FEED_FORWARD = {f"feed_forward.w{number}": f"feed_forward.w{number}" for number in (1, 2, 3)}
IDEOGRAM_4 = per_block(
    ("layers.{}",), "attention", EQUAL_3, {"attention.to_out.0": "attention.o", **_SAME_FEED_FORWARD}
)

_REFINED = ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
_Z_IMAGE_NAMES = {
    "attention.to_out.0": "attention.out",
    "adaLN_modulation.0": "adaLN_modulation.0",
    **_SAME_FEED_FORWARD,
}
Z_IMAGE = per_block(_REFINED, "attention", EQUAL_3, _Z_IMAGE_NAMES)

_LUMINA_FEED_FORWARD = {f"feed_forward.linear_{number}": f"feed_forward.w{number}" for number in (1, 2, 3)}
LUMINA_2 = per_block(_REFINED, "attn", UNKNOWN_3, {"attn.to_out.0": "attention.out", **_LUMINA_FEED_FORWARD})

# Denoiser class -> table of its modules, or `None` if other tools use diffusers' names.
ORIGINAL_MODULES: dict[str, dict[str, OriginalModule] | None] = {
    "UNet2DConditionModel": None,
    "QwenImageTransformer2DModel": None,
    "ErnieImageTransformer2DModel": None,
    "HiDreamImageTransformer2DModel": None,
    "QwenImage21Transformer2DModel": QWEN_IMAGE_21,
    "SD3Transformer2DModel": STABLE_DIFFUSION_3,
    "ChromaTransformer2DModel": FLUX,
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX_2,
    "AuraFlowTransformer2DModel": AURA_FLOW,
    "Ideogram4Transformer2DModel": IDEOGRAM_4,
    "Krea2Transformer2DModel": KREA_2,
    "PixArtTransformer2DModel": PIXART,
    "WanTransformer3DModel": WAN,
    "ZImageTransformer2DModel": Z_IMAGE,
    "Lumina2Transformer2DModel": LUMINA_2,
}


def original_module(denoiser_class: str, module: str) -> OriginalModule:
    """Return the original module for a diffusers module, with its block number. Raise `ValueError` if
    `ORIGINAL_MODULES` has none."""
    if denoiser_class not in ORIGINAL_MODULES:
        raise UserError(
            f"Only a LoRA of one of the denoisers {', '.join(sorted(ORIGINAL_MODULES))} can be exported for other "
            f"tools. Got a LoRA of {denoiser_class}. Load it with diffusers' `load_lora_weights`, or merge it into the "
            "model."
        )
    entries = ORIGINAL_MODULES[denoiser_class]
    if entries is None:
        return OriginalModule(module)
    for name, original in entries.items():
        match = re.fullmatch(re.escape(name).replace(r"\{\}", r"(\d+)"), module)
        if match:
            return original._replace(module=original.module.format(*match.groups()))
    raise UserError(
        f"Other tools cannot read a LoRA of the module {module} in a {denoiser_class}. Train with the default "
        "`target_modules`, or merge the LoRA into the model."
    )

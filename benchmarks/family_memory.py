"""The sizes of the families' denoisers, and the memory that training them needs at least: prints the table of
docs/model_families.md, a row for each family.

Every denoiser is built from its published configuration on PyTorch's meta device, without weights and downloads, in
seconds. Parameters and LoRA are counted. Memory is computed from them: weights, gradients, AdamW's two moments and the
reference, without activations, text encoders and VAE.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from peft import LoraConfig, inject_adapter_in_model
from tqdm.auto import tqdm

from trl_diffusion_sdpo.families import FAMILIES, family_for_class_name
from trl_diffusion_sdpo.families.base import Family

RANK = 16  # TRL's default of `lora_r`
BASE_BYTES = 2  # per frozen weight, bf16: the base of a LoRA, and the reference of full tuning
TRAINED_BYTES = 16  # per trained weight, float32: the weight, its gradient and AdamW's two moments
BUFFER_BYTES = 4  # per element of a position table, which full tuning holds in policy and reference

SD15 = {
    "sample_size": 64,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
}
SD21 = {
    **SD15,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
SD35_MEDIUM = {**SD3, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
SD35_LARGE = {
    **SD3,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
PIXART = {"caption_channels": 4096}
SANA_600M = {
    "num_attention_heads": 36,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
COGVIEW4 = {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 32}
HUNYUAN_12 = {
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 128,
    "hidden_size": 1408,
    "num_layers": 40,
    "mlp_ratio": 4.3637,
    "use_style_cond_and_image_meta_size": False,
}
KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
KLEIN_9B = {**KLEIN_4B, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32}
KLEIN_9B["joint_attention_dim"] = 12288
WAN_1B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
WAN_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}


@dataclass(frozen=True)
class Size:
    """A denoiser of a published size.

    Attributes:
        name (`str`): Name of the size within its family.
        denoiser_class (`str`): Class of diffusers.
        settings (`Mapping[str, Any]`): Differences of its configuration from the class's defaults.
    """

    name: str
    denoiser_class: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Counts:
    """Elements of a denoiser: parameters, those of a LoRA of rank `RANK` on the default targets, and buffers."""

    parameters: int
    lora: int
    buffers: int

    @property
    def lora_bytes(self) -> int:
        """For a LoRA on a base in bf16, which is also the reference."""
        return BASE_BYTES * (self.parameters + self.buffers) + TRAINED_BYTES * self.lora

    @property
    def full_bytes(self) -> int:
        """For all weights in float32, with a reference in bf16."""
        return (TRAINED_BYTES + BASE_BYTES) * self.parameters + 2 * BUFFER_BYTES * self.buffers


# First pipeline class of a family -> its published sizes.
PUBLISHED = {
    "StableDiffusionPipeline": (Size("1.5", "UNet2DConditionModel", SD15), Size("2.1", "UNet2DConditionModel", SD21)),
    "StableDiffusionXLPipeline": (Size("base", "UNet2DConditionModel", SDXL),),
    "StableDiffusion3Pipeline": (
        Size("3 Medium", "SD3Transformer2DModel", SD3),
        Size("3.5 Medium", "SD3Transformer2DModel", SD35_MEDIUM),
        Size("3.5 Large", "SD3Transformer2DModel", SD35_LARGE),
    ),
    "FluxPipeline": (Size("dev", "FluxTransformer2DModel", {"guidance_embeds": True}),),
    "PixArtAlphaPipeline": (Size("XL", "PixArtTransformer2DModel", PIXART),),
    "PixArtSigmaPipeline": (Size("XL", "PixArtTransformer2DModel", {**PIXART, "use_additional_conditions": False}),),
    "SanaPipeline": (
        Size("0.6B", "SanaTransformer2DModel", SANA_600M),
        Size("1.6B", "SanaTransformer2DModel"),
        Size("1.5 4.8B", "SanaTransformer2DModel", {"num_layers": 60}),
    ),
    "QwenImagePipeline": (Size("Qwen-Image", "QwenImageTransformer2DModel"),),
    "ZImagePipeline": (Size("Z-Image", "ZImageTransformer2DModel", {"axes_lens": [1536, 512, 512]}),),
    "OvisImagePipeline": (Size("7B", "OvisImageTransformer2DModel"),),
    "Lumina2Pipeline": (Size("2.0", "Lumina2Transformer2DModel", {"cap_feat_dim": 2304}),),
    "AuraFlowPipeline": (Size("0.3", "AuraFlowTransformer2DModel", {"pos_embed_max_size": 9216}),),
    "CogView4Pipeline": (Size("6B", "CogView4Transformer2DModel", COGVIEW4),),
    "HunyuanDiTPipeline": (Size("1.2", "HunyuanDiT2DModel", HUNYUAN_12),),
    "Flux2Pipeline": (Size("dev", "Flux2Transformer2DModel"),),
    "Flux2KleinPipeline": (
        Size("4B", "Flux2Transformer2DModel", KLEIN_4B),
        Size("9B", "Flux2Transformer2DModel", KLEIN_9B),
    ),
    "WanPipeline": (
        Size("2.1 1.3B", "WanTransformer3DModel", WAN_1B),
        Size("2.1 14B", "WanTransformer3DModel"),
        Size("2.2 5B", "WanTransformer3DModel", WAN_5B),
    ),
}
PREDICTS = {
    "StableDiffusionPipeline": "`epsilon`, or `v_prediction` (2.x at 768)",
    "StableDiffusionXLPipeline": "`epsilon`",
    "PixArtAlphaPipeline": "`epsilon`",
    "PixArtSigmaPipeline": "`epsilon`",
    "HunyuanDiTPipeline": "`v_prediction`",
}
# Families whose tiny pipelines `make test` trains; those of the others train in `make test-families`.
ALWAYS_TRAINED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline")
HEADER = ("Pipeline class", "Parameters", "Predicts", "LoRA targets", "Tested how", "Memory, LoRA")
HEADER += ("Memory, all weights",)


def main() -> None:
    print("\n".join(table()))


def table() -> list[str]:
    """The lines of the table in Markdown."""
    lines = [row(HEADER), row("---" for _ in HEADER)]
    for pipeline_class, sizes in tqdm(PUBLISHED.items(), unit="family", leave=False, disable=None):
        family = family_for_class_name(pipeline_class)
        counts = {size.name: count(size, family) for size in sizes}
        lines.append(
            row(
                (
                    "<br>".join(f"`{name}`" for name in FAMILIES if name in family.pipeline_classes),
                    by_size(counts, lambda size: f"{size.parameters / 1e9:.2f}B"),
                    PREDICTS.get(pipeline_class, "velocity"),
                    targets_in_words(family),
                    "tiny, `make test`" if pipeline_class in ALWAYS_TRAINED else "tiny, `make test-families`",
                    by_size(counts, lambda size: gigabytes(size.lora_bytes)),
                    by_size(counts, lambda size: gigabytes(size.full_bytes)),
                )
            )
        )
    return lines


def count(size: Size, family: type[Family]) -> Counts:
    """Count the elements of a denoiser, before and after a LoRA is added."""
    with torch.device("meta"):
        denoiser = getattr(diffusers, size.denoiser_class)(**size.settings)
        parameters = sum(parameter.numel() for parameter in denoiser.parameters())
        buffers = sum(buffer.numel() for buffer in denoiser.buffers())
        inject_adapter_in_model(LoraConfig(r=RANK, target_modules=list(family.lora_target_modules)), denoiser)
    total = sum(parameter.numel() for parameter in denoiser.parameters())
    return Counts(parameters=parameters, lora=total - parameters, buffers=buffers)


def targets_in_words(family: type[Family]) -> str:
    """The default targets; names that differ by the index of a block are listed once."""
    names = dict.fromkeys(re.sub(r"blocks\.\d+\.", "blocks.*.", name) for name in family.lora_target_modules)
    return ", ".join(f"`{name}`" for name in names)


def by_size(counts: Mapping[str, Counts], text: Callable[[Counts], str]) -> str:
    """The value of the only size, or one line per size."""
    if len(counts) == 1:
        return text(*counts.values())
    return "<br>".join(f"{name}: {text(numbers)}" for name, numbers in counts.items())


def gigabytes(count_of_bytes: int) -> str:
    amount = count_of_bytes / 1e9
    return f"{amount:.1f} GB" if amount < 100 else f"{amount:.0f} GB"


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

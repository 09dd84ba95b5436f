"""The sizes of the families' denoisers, and the memory that training them needs at least: prints the table of
docs/model_families.md, a row for each family.

Every denoiser is built from its published configuration on PyTorch's meta device, without weights and downloads, in
seconds. Parameters and LoRA are counted. Memory is computed from them: weights, gradients, AdamW's two moments and the
reference, without activations, text encoders and VAE.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import diffusers
import torch
from peft import LoraConfig, inject_adapter_in_model
from tqdm.auto import tqdm

from trl_diffusion_sdpo.families import FAMILIES, family_for_class_name
from trl_diffusion_sdpo.families.base import Family
from trl_diffusion_sdpo.planning.published import DENOISERS, Size

RANK = 16  # TRL's default of `lora_r`
BASE_BYTES = 2  # per frozen weight, bf16: the base of a LoRA, and the reference of full tuning
TRAINED_BYTES = 16  # per trained weight, float32: the weight, its gradient and AdamW's two moments
BUFFER_BYTES = 4  # per element of a position table, which full tuning holds in policy and reference


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
    for pipeline_class, sizes in tqdm(DENOISERS.items(), unit="family", leave=False, disable=None):
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

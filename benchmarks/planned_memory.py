"""Compare the planned with the measured peak memory of a training step, in a table with one row per configuration.

Both sides get the same command-line arguments. `trl-diffusion-sdpo plan` computes the planned peak from a pipeline's
configuration files. The measured peak is that of the trainer's third step with random weights. On CUDA this is the
allocator's peak. On the CPU it is the bytes of all tensors before the step plus the allocations that the profiler
records in the step.
"""

import argparse
import gc
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import torch
from random_pipeline import UNETS, build_pipeline, build_tokenizer, random_pairs, text_config
from safeguard_overhead import peak_bytes
from torch._subclasses.fake_tensor import FakeTensor
from tqdm.auto import tqdm
from transformers import CLIPTextModelWithProjection, TrainerCallback
from trl import get_peft_config

from trl_diffusion_sdpo import DiffusionSDPOTrainer
from trl_diffusion_sdpo.cli import train
from trl_diffusion_sdpo.cli.plan import planned_settings

RESULTS = Path(__file__).parent / "results" / "planned_memory.json"
OUTPUT = "--safeguard output"
LORA = f"--use_peft --lora_r 16 {OUTPUT}"
CHECKPOINTING = f"{LORA} --per_device_train_batch_size 4 --gradient_checkpointing true"
PARAMETER = "--per_device_train_batch_size 2 --safeguard parameter"
ACCUMULATION = f"{OUTPUT} --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
BF16 = '--model_init_kwargs {"dtype":"bfloat16"}'
BF16 += " --bf16 --optim adamw_torch_8bit --optim_args bf16_stochastic_round=True"
BF16 += f" {OUTPUT} --precompute_ref_errors"
CASES = {
    "UNet, LoRA": ("unet", f"{LORA} --per_device_train_batch_size 2"),
    "UNet, LoRA, checkpointing": ("unet", CHECKPOINTING),
    "UNet, LoRA, every second block": (
        "unet",
        f'{CHECKPOINTING} --activation_checkpointing_kwargs {{"every_n_layers":2}}',
    ),
    "UNet, full": ("unet", f"{OUTPUT} --per_device_train_batch_size 1"),
    "UNet, full, average, 4 pairs": ("unet", f"{OUTPUT} --per_device_train_batch_size 4 --ema_decay 0.99"),
    "UNet, full, parameter safeguard": ("unet", PARAMETER),
    "UNet, full, one branch at a time": ("unet", f'{PARAMETER} --safeguard_kwargs {{"low_memory":true}}'),
    "UNet, full, bf16 weights, accumulation": (
        "unet",
        f"{BF16} --per_device_train_batch_size 1 --gradient_accumulation_steps 2",
    ),
    "UNet, full, bf16 weights, optimizer in backward": (
        "unet",
        f"{BF16} --per_device_train_batch_size 1 --gradient_accumulation_steps 1 --max_grad_norm 0",
    ),
    "transformer, LoRA": ("transformer", f"{LORA} --per_device_train_batch_size 2"),
    "transformer, LoRA, checkpointing": ("transformer", CHECKPOINTING),
    "transformer, full, accumulation": ("transformer", ACCUMULATION),
}
WITHOUT_T5 = '--model_init_kwargs {"text_encoder_3":null,"tokenizer_3":null}'
STEPS = 3  # the first step creates the optimizer states


@dataclass
class Row:
    """The planned and the measured peak of a configuration in bytes, and their ratio."""

    name: str
    words: str
    planned: int
    measured: int

    @property
    def ratio(self) -> float:
        return self.planned / self.measured


class PeakMeter(TrainerCallback):
    """Measures the last step of a run.

    Args:
        others (`dict[int, int]`): Storages that existed before the run, from `living_storages`.
    """

    def __init__(self, others: dict[int, int]):
        self.peak = 0
        self._others = others
        self._profiler: torch.profiler.profile | None = None
        self._rest = 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step < STEPS - 1:
            return
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        storages = living_storages()
        self._rest = sum(size for address, size in storages.items() if address not in self._others)
        self._profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        )
        self._profiler.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < STEPS:
            return
        if self._profiler is None:
            self.peak = torch.cuda.max_memory_allocated()
            return
        self._profiler.stop()
        self.peak = self._rest + peak_bytes(self._profiler)


def living_storages() -> dict[int, int]:
    """Return the bytes of the storages of all tensors in this process, by address."""
    gc.collect()
    storages = {}
    for held in gc.get_objects():
        is_wrapper = hasattr(type(held), "__tensor_flatten__")  # its parts are tensors too
        if issubclass(type(held), torch.Tensor) and not (held.is_meta or isinstance(held, FakeTensor) or is_wrapper):
            storage = held.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return storages


def compare(name: str, kind: str, words: str, size: str, folder: Path) -> Row:
    """Plan and measure a configuration of a small `"unet"` or `"transformer"` pipeline."""
    arguments, side = written(kind, words, size, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    planned = planned_settings(arguments, "plan", device).plan().peak
    _, training, model = train.parse(arguments + (["--use_cpu", "true"] if device == "cpu" else []))
    meter = PeakMeter(living_storages())
    pairs = random_pairs(16, side)
    trainer = DiffusionSDPOTrainer(
        str(folder / "pipeline"), None, training, pairs, peft_config=get_peft_config(model), callbacks=[meter]
    )
    trainer.train()
    return Row(name, words, planned, meter.peak)


def written(kind: str, words: str, size: str, folder: Path) -> tuple[list[str], int]:
    """Write the pipeline of a configuration, and return its command-line arguments and image side."""
    side = UNETS[size]["sample_size"]
    pipeline = build_pipeline(size, side)
    if kind == "transformer":
        pipeline, side = small_transformer(size)
    pipeline.save_pretrained(folder / "pipeline")
    common = f"--model_name_or_path {folder / 'pipeline'} --output_dir {folder / 'out'} --resolution {side}"
    common += f" --max_steps {STEPS} --save_strategy no --report_to none --disable_tqdm true --logging_strategy no"
    if kind == "transformer":
        common += f" {WITHOUT_T5}"
    if "--precompute" in words:
        common += f" --precompute_dir {folder / 'computed'}"
    return f"{common} {words}".split(), side


def small_transformer(size: str) -> tuple[diffusers.DiffusionPipeline, int]:
    """Build Stable Diffusion 3's transformer and VAE with CLIP text encoders and without T5."""
    layers, heads, side = (2, 2, 16) if size == "tiny" else (6, 8, 64)
    unet_pipeline = build_pipeline("tiny", side)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=side,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=128,
        caption_projection_dim=32 * heads,
        pooled_projection_dim=64,
        pos_embed_max_size=side,
    )
    parts = {f"text_encoder{end}": CLIPTextModelWithProjection(text_config(32)) for end in ("", "_2")}
    parts |= {f"tokenizer{end}": build_tokenizer() for end in ("", "_2")}
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=unet_pipeline.vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder_3=None,
        tokenizer_3=None,
        **parts,
    )
    return pipeline, side


def table(rows: list[Row]) -> str:
    lines = ["| Configuration | Planned, MiB | Measured, MiB | Planned / measured |", "|---|---:|---:|---:|"]
    for row in rows:
        lines.append(f"| {row.name} | {row.planned / 2**20:.1f} | {row.measured / 2**20:.1f} | {row.ratio:.3f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(UNETS), default="28m", help="the UNet; the transformer is of like size")
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rows = []
    for name in tqdm(options.only, unit="run", disable=None):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(name, *CASES[name], options.size, Path(folder)))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

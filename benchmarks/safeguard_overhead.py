"""Measure the cost of the safeguard: time and peak memory of a training step with each kind of safeguard, relative to
none.

The trainer's steps are measured from the batch to the optimizer, on a UNet with random weights. Each round has one
step per mode in random order, so that other load on the machine affects all modes equally. The result of a mode is the
median over rounds of its time divided by that of the same round's step without a safeguard.

    python benchmarks/safeguard_overhead.py --reference --output benchmarks/results/safeguard_overhead.json
    python benchmarks/safeguard_overhead.py --reference --size proportions \
        --output benchmarks/results/safeguard_overhead_one_pair.json
    python benchmarks/safeguard_overhead.py --write_table     # that file's table, into docs/safeguard.md
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from peft import LoraConfig
from proportions import PROPORTIONS
from random_pipeline import UNETS, build_pipeline, random_pairs
from studies.tables import written
from tqdm.auto import tqdm
from transformers import TrainerCallback

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer
from trl_diffusion_sdpo.models.reference import FrozenReference
from trl_diffusion_sdpo.trainer.config.complete import loss_settings

MODES: dict[str, dict[str, Any]] = {
    "none": {"safeguard": "none"},
    "output": {"safeguard": "output"},
    "parameter": {"safeguard": "parameter", "safeguard_kwargs": {"anchor": "branch"}},
    # As under FSDP2, DeepSpeed and `torch_compile`.
    "parameter, half batches": {"safeguard": "parameter", "safeguard_kwargs": {"anchor": "branch"}},
    "parameter, low memory": {
        "safeguard": "parameter",
        "safeguard_kwargs": {"anchor": "branch", "low_memory": True},
    },
    "parameter, error anchor": {"safeguard": "parameter", "safeguard_kwargs": {"anchor": "error"}},
}
PLAIN = "none"
WHOLE = "parameter"
PROPORTIONAL = "proportions"  # one pair, and a pipeline of `proportions.py`, as in `step_time.py`
RESULTS = Path(__file__).parent / "results" / "safeguard_overhead.json"
PAGE = Path(__file__).parents[1] / "docs/safeguard.md"
# Mode -> its words in the table of docs/safeguard.md.
WORDS = {
    "none": "none",
    "output": "output space",
    "parameter": "parameter space, the default",
    "parameter, half batches": "parameter space, half batches",
    "parameter, low memory": "parameter space, `low_memory: true`",
    "parameter, error anchor": "parameter space, `anchor: error`",
}
UNSET: dict[str, Any] = {"safeguard_kwargs": {}}
# Target of the time ratio, with a reference and 4 pairs.
TARGETS = {
    ("lora", "output"): 1.02,
    ("full", "output"): 1.02,
    ("lora", "parameter"): 1.05,
    ("full", "parameter"): 1.15,
}


@dataclass
class Row:
    """The measurements of one mode.

    Attributes:
        seconds (`list[float]`): Time of each round's step.
        ratio (`float`): Median over rounds of the time relative to the same round's step without a safeguard.
        spread (`tuple[float, float]`): First and third quartile of these ratios.
        step_bytes (`int`): Peak memory minus the memory between steps: activations and gradients.
        peak_bytes (`int`): Peak memory with weights, reference and optimizer.
        target (`float`, *optional*): Target of the ratio.
    """

    tuning: str
    mode: str
    reference: bool
    seconds: list[float]
    ratio: float
    spread: tuple[float, float]
    step_bytes: int
    peak_bytes: int
    target: float | None


class Meter(TrainerCallback):
    """Switches the mode at the beginning of every step and measures the step.

    On CUDA it measures wall time and the allocator's peak. On the CPU it measures the CPU time of the process, and the
    allocations that the profiler records in a last round of untimed steps.

    Args:
        plan (`list[str]`): The mode of each step.
        untimed (`int`): Number of warm-up steps.
        profiled (`int`): Number of last steps that run under the profiler; 0 on CUDA.
        bar (`tqdm`): Progress bar of the steps.
    """

    def __init__(self, plan: list[str], untimed: int, profiled: int, bar: tqdm):
        self.plan = plan
        self.untimed = untimed
        self.profiled = profiled
        self.bar = bar
        self.trainer: DiffusionSDPOTrainer | None = None
        self.seconds: list[float] = []
        self.peaks: dict[str, int] = {}
        self.rest = 0
        self._safeguards: dict[str, Any] = {}
        self._started = 0.0
        self._profiler: torch.profiler.profile | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        mode = self.plan[state.global_step]
        for name, value in (UNSET | MODES[mode]).items():
            setattr(self.trainer.args, name, value)
        self.trainer.pair_forward.loss_settings = loss_settings(self.trainer.args)
        self.trainer.pair_forward.by_halves = mode.startswith("parameter") and mode != WHOLE
        if mode not in self._safeguards:  # each has its first step in a warm-up round
            self._safeguards[mode] = self.trainer._make_parameter_safeguard()
        self.trainer._parameter_safeguard = self._safeguards[mode]
        if args.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.rest = torch.cuda.memory_allocated()
        elif state.global_step >= len(self.plan) - self.profiled:
            self.rest = resting_bytes(self.trainer)
            self._profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
            )
            self._profiler.start()
        self._started = self._now(args)

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(self._now(args) - self._started)
        mode = self.plan[state.global_step - 1]
        if args.device.type == "cuda" and state.global_step > self.untimed:
            self.peaks[mode] = max(self.peaks.get(mode, 0), torch.cuda.max_memory_allocated() - self.rest)
        if self._profiler is not None:
            self._profiler.stop()
            self.peaks[mode] = peak_bytes(self._profiler)
            self._profiler = None
        self.bar.update()

    @staticmethod
    def _now(args: DiffusionSDPOConfig) -> float:
        return time.perf_counter() if args.device.type == "cuda" else time.process_time()

    def timed(self) -> dict[str, list[float]]:
        """Return the seconds of each mode's steps, in the order of the rounds."""
        end = len(self.plan) - self.profiled
        seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
        for mode, value in zip(self.plan[self.untimed : end], self.seconds[self.untimed : end], strict=True):
            seconds[mode].append(value)
        return seconds


def measure(options: argparse.Namespace, tuning: str, reference: bool, bar: tqdm) -> list[Row]:
    """Measure all modes in one training run and return their rows."""
    shuffled = random.Random(0)
    rounds = [shuffled.sample(list(MODES), len(MODES)) for _ in range(options.warmup + options.rounds)]
    profiled = 0 if options.device == "cuda" else len(MODES)
    plan = [mode for one in rounds for mode in one] + list(MODES)[:profiled]
    meter = Meter(plan, options.warmup * len(MODES), profiled, bar)
    with tempfile.TemporaryDirectory() as folder:
        meter.trainer = build_trainer(options, tuning, reference, len(plan), folder, meter)
        meter.trainer.train()
    seconds = meter.timed()
    rows = []
    for mode in MODES:
        ratios = [timed / plain for timed, plain in zip(seconds[mode], seconds[PLAIN], strict=True)]
        quartiles = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
        rows.append(
            Row(
                tuning=tuning,
                mode=mode,
                reference=reference,
                seconds=seconds[mode],
                ratio=quartiles[1],
                spread=(quartiles[0], quartiles[2]),
                step_bytes=meter.peaks[mode],
                peak_bytes=meter.peaks[mode] + meter.rest,
                target=TARGETS.get((tuning, mode)) if reference else None,
            )
        )
    return rows


def build_trainer(
    options: argparse.Namespace, tuning: str, reference: bool, steps: int, folder: str, meter: Meter
) -> DiffusionSDPOTrainer:
    if options.size == PROPORTIONAL:
        size = PROPORTIONS["sd15, lora" if tuning == "lora" else "sd15"]
        pipeline, side = size.build(), size.pixels
    else:
        side = options.latents or UNETS[options.size]["sample_size"]
        pipeline = build_pipeline(options.size, side)
    args = DiffusionSDPOConfig(
        folder,
        max_steps=steps,
        resolution=side,
        beta=5000.0 if reference else None,
        per_device_train_batch_size=options.batch,
        # SimPO has the same two branches and no reference.
        loss_type="sigmoid" if reference else "simpo",
        safeguard="parameter",
        learning_rate=1e-9,  # small, so that the weights hardly change
        activation_checkpointing=options.checkpointing,
        bf16=options.dtype == "bf16",
        use_cpu=options.device == "cpu",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    lora = LoraConfig(r=options.rank, lora_alpha=options.rank) if tuning == "lora" else None
    pairs = random_pairs(max(options.batch, 8), side)
    return DiffusionSDPOTrainer(pipeline, None, args, pairs, peft_config=lora, callbacks=[meter])


def peak_bytes(profiler: torch.profiler.profile) -> int:
    """Return the largest number of bytes in tensors that were allocated under the profiler and not yet freed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        trace = json.loads(file.read_text())
    changes = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    allocated, peak = 0, 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


def resting_bytes(trainer: DiffusionSDPOTrainer) -> int:
    """Return the bytes of policy, reference and optimizer between two steps."""
    modules = [trainer.model]
    if isinstance(trainer.reference, FrozenReference):
        modules.append(trainer.reference.module)
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    for state in trainer.optimizer.state.values():
        tensors += [value for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def table(rows: list[Row]) -> str:
    lines = [
        "| tuning | reference | safeguard | time | of plain (quartiles) | target | step's peak | of plain | total |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain = next(r for r in rows if (r.tuning, r.reference, r.mode) == (row.tuning, row.reference, PLAIN))
        low, high = row.spread
        lines.append(
            f"| {row.tuning} | {'yes' if row.reference else 'no'} | {row.mode} | "
            f"{1000 * statistics.median(row.seconds):.0f} ms | {row.ratio:.3f} ({low:.3f} to {high:.3f}) | "
            f"{'' if row.target is None else f'{row.target:.2f}'} | {row.step_bytes / 2**20:.1f} MiB | "
            f"{row.step_bytes / plain.step_bytes:.3f} | {row.peak_bytes / plain.peak_bytes:.3f} |"
        )
    return "\n".join(lines)


def docs_table(report: dict[str, Any]) -> str:
    """Return the table of docs/safeguard.md: for each mode, time and memory of a step relative to the plain step."""
    rows = {(row["tuning"], row["mode"]): row for row in report["rows"] if row["reference"]}
    lines = [
        "| Safeguard | LoRA: time | LoRA: memory | All weights: time | All weights: memory |",
        "|---|---|---|---|---|",
    ]
    for mode, words in WORDS.items():
        if ("lora", mode) not in rows:
            continue
        cells = [words]
        for tuning in ("lora", "full"):
            row = rows[tuning, mode]
            low, high = row["spread"]
            cells.append("1" if mode == PLAIN else f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})")
            cells.append(f"{row['peak_bytes'] / rows[tuning, PLAIN]['peak_bytes']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def environment(options: argparse.Namespace) -> dict[str, Any]:
    cuda = options.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "clock": "wall" if cuda else "CPU time of the process",
        "memory": "torch.cuda.max_memory_allocated" if cuda else "torch.profiler, profile_memory",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[*UNETS, PROPORTIONAL], default="28m", help="the UNet (default: 28m)")
    parser.add_argument("--latents", type=int, help="side of the latents (default: of the UNet)")
    parser.add_argument("--tuning", choices=["lora", "full", "both"], default="both")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16 is autocast")
    parser.add_argument("--batch", type=int, help=f"pairs a step (default: 4; 1 with `--size {PROPORTIONAL}`)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=1, help="warm-up rounds")
    parser.add_argument(
        "--reference",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="only with, or only without, the forward pass of a reference (default: both)",
    )
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU; one is steadiest on a busy machine")
    parser.add_argument(
        "--output", type=Path, default=Path("bench_output/safeguard_overhead.json"), help="file for all numbers"
    )
    parser.add_argument("--write_table", action="store_true", help="measure nothing; write the table of the docs")
    options = parser.parse_args(arguments)
    if options.batch is None:
        options.batch = 1 if options.size == PROPORTIONAL else 4
    if options.write_table:
        shown = docs_table(json.loads(RESULTS.read_text(encoding="utf-8")))
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), {"overhead": shown}), encoding="utf-8")
        return 0
    torch.set_num_threads(options.threads)
    tunings = ["lora", "full"] if options.tuning == "both" else [options.tuning]
    references = [True, False] if options.reference is None else [options.reference]
    cases = [(tuning, reference) for tuning in tunings for reference in references]
    profiled = 0 if options.device == "cuda" else 1
    steps = len(cases) * len(MODES) * (options.warmup + options.rounds + profiled)
    rows: list[Row] = []
    with tqdm(total=steps, unit="step") as bar:
        for tuning, reference in cases:
            bar.set_description(f"{tuning}, {'with' if reference else 'without'} reference")
            rows += measure(options, tuning, reference, bar)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    report = {"settings": settings, "environment": environment(options), "rows": [asdict(row) for row in rows]}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

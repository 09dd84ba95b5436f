"""Speed and memory of training on this machine's accelerator: models of published sizes with random weights.

Every case trains a few steps in a new process and adds a line to a file, even if it fails or takes too long. A case
that already has a line for this device is skipped, so a later call continues where an earlier one stopped. Nothing is
downloaded.
"""

import argparse
import datetime
import fnmatch
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import diffusers
import torch
from gpu_meter import GIB, TIMED, WARMUP, MeasuredTrainer, Memory, Meter, peak_flops
from gpu_networks import SMALLEST_SIDE, build
from peft import LoraConfig
from published_sizes import PIPELINES
from random_pipeline import encoded_pairs
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import PrinterCallback

from trl_diffusion_sdpo import DiffusionSDPOConfig
from trl_diffusion_sdpo.step.pair_forward import NoisyBatch
from trl_diffusion_sdpo.utils.processes import usable_cores

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "torchao")
PAIRS = {"sd15": 4, "sdxl": 2, "sd35-medium": 2, "flux-dev": 1}  # per step
TUNINGS = {"flux-dev": ("lora", "qlora", "full")}
RANK = 16
CASE_SECONDS = 150  # seconds; a longer case is stopped, and no case starts with less time left
MAX_WORKERS = 4  # workers of the data loader, as the trainer chooses for a large dataset
CACHED = {"precompute_latents": True, "precompute_ref_errors": True}
STOCHASTIC = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True", "safeguard": "output"}
FULL_BYTES = 16  # bytes per trained weight: float32 weight, gradient and two moments


@dataclass(frozen=True)
class Case:
    """A case to measure.

    Attributes:
        model (`str`): A key of `PIPELINES`.
        tuning (`str`): `"lora"`, `"qlora"` (base in four bits), `"full"` or `"full-bf16"` (stochastic rounding).
        cached (`bool`): Whether encoded images and prompts and the reference's errors are computed beforehand.
        compiled (`bool`): Whether to compile the repeated blocks, or the whole denoiser if diffusers lists no blocks,
            and the encoders.
    """

    model: str
    tuning: str
    checkpointing: bool
    cached: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        extras = {"checkpointing": self.checkpointing, "cached": self.cached, "compiled": self.compiled}
        return "-".join([self.model, self.tuning, *(name for name, is_set in extras.items() if is_set)])


CASES = [
    Case(model, tuning, checkpointing)
    for model in PAIRS
    for tuning in TUNINGS.get(model, ("lora", "full"))
    for checkpointing in (False, True)
]
CASES += [Case(model, "lora", checkpointing=False, cached=True) for model in PAIRS]
CASES += [Case("flux-dev", "qlora", checkpointing=True, cached=True)]
CASES += [Case("sdxl", "full-bf16", checkpointing=True, cached=True)]
CASES += [Case(model, "lora", checkpointing=False, compiled=True) for model in PAIRS]


def measure(case: Case, device: str, *, smallest: bool) -> dict[str, Any]:
    """Measure a case and return its line. Running out of memory is a valid result."""
    memory = Memory(device)
    line: dict[str, Any] = facts(case, device, smallest=smallest)
    if device == "cuda" and (needed := least_bytes(case)) > memory.total:
        return line | {"outcome": f"does not fit: the weights and AdamW's state alone take {needed / GIB:.0f} GiB"}
    stage = "making the networks"
    try:
        with tempfile.TemporaryDirectory() as folder:
            meter = Meter(memory)
            trainer = build_trainer(case, device, smallest, folder, meter)
            memory.note("models")
            stage = "training"
            trainer.train()
            return line | results(case, trainer, meter, smallest)
    except torch.OutOfMemoryError:
        return line | {"outcome": f"out of memory in {stage}", "memory_gib": memory.peaks}


def build_trainer(case: Case, device: str, smallest: bool, folder: str, meter: Meter) -> MeasuredTrainer:
    side = SMALLEST_SIDE if smallest else PIPELINES[case.model].resolution
    steps = 4 if smallest else WARMUP + TIMED + 1
    pairs = 1 if smallest else PAIRS[case.model]
    pipeline = build(case.model, case.tuning, torch.device(device), smallest=smallest)
    args = DiffusionSDPOConfig(
        folder,
        max_steps=steps,
        per_device_train_batch_size=pairs,
        learning_rate=1e-6,
        activation_checkpointing=case.checkpointing,
        bf16=True,
        use_cpu=device == "cpu",
        resolution=side,
        torch_compile=case.compiled,
        dataloader_num_workers=0 if smallest else min(MAX_WORKERS, usable_cores() - 1),
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **(STOCHASTIC if case.tuning == "full-bf16" else {}),
        **({**CACHED, "precompute_dir": f"{folder}/encoded"} if case.cached else {}),
    )
    lora = None if case.tuning.startswith("full") else LoraConfig(r=RANK, lora_alpha=RANK)
    data = encoded_pairs(pairs * steps, side)
    trainer = MeasuredTrainer(pipeline, None, args, data, peft_config=lora, callbacks=[meter])
    trainer.remove_callback(PrinterCallback)
    meter.trainer = trainer
    return trainer


def results(case: Case, trainer: MeasuredTrainer, meter: Meter, smallest: bool) -> dict[str, Any]:
    pairs = trainer.args.per_device_train_batch_size
    seconds = meter.seconds[WARMUP:] or meter.seconds
    # Loading delays come in bursts, so the mean counts for whole steps, and the median for the work alone.
    mean, working = statistics.fmean(seconds), statistics.median(meter.working[WARMUP:] or meter.working)
    flops = flops_of_step(case, trainer)
    peak = peak_flops(meter.memory.name)
    return {
        "outcome": "trained",
        "pairs": pairs,
        "resolution": trainer.args.resolution,
        "timed_steps": len(seconds),
        "workers": trainer.args.dataloader_num_workers,
        "optimizer": str(trainer.args.optim.value),
        "seconds_per_step": mean,
        "seconds_without_loading": working,
        "quartiles": statistics.quantiles(seconds, method="inclusive") if len(seconds) > 1 else [mean] * 3,
        "pairs_per_second": pairs / mean,
        "teraflops_per_pair": flops / pairs / 1e12,
        "utilisation": None if peak is None else flops / mean / peak,
        "peak_teraflops": None if peak is None else peak / 1e12,
        "memory_gib": meter.memory.peaks,
        "first_loss": float(trainer.first_loss),
        # Policy and reference are equal before the first step.
        "neutral": abs(float(trainer.first_loss) - math.log(2)) < 1e-6,
    }


@torch.no_grad()
def flops_of_step(case: Case, trainer: MeasuredTrainer) -> int:
    """Return the FLOPs that a step needs: encoding, the reference, and forward and backward pass of the policy.

    A backward pass counts as two forward passes, or one if the weights are frozen. Recomputation by checkpointing does
    not count.
    """
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with FlopCounterMode(display=False) as encoding:
        batch: NoisyBatch = trainer.pair_forward.noisy_batch(inputs)
    with FlopCounterMode(display=False) as forward:
        trainer.pair_forward.predict(trainer.model_wrapped, batch)
    passes = (3 if case.tuning.startswith("full") else 2) + (0 if case.cached else 1)
    return encoding.get_total_flops() + passes * forward.get_total_flops()


def least_bytes(case: Case) -> int:
    """Return the bytes of the denoiser's weights and of what training adds to each. Computed on the meta device."""
    denoiser = next(part for part in ("unet", "transformer") if part in PIPELINES[case.model].components)
    class_name, settings = PIPELINES[case.model].components[denoiser]

    with torch.device("meta"):
        count = sum(weight.numel() for weight in getattr(diffusers, class_name)(**settings).parameters())
    # In full training, the reference is a second copy in bf16.
    each = {"full": FULL_BYTES + (0 if case.cached else 2), "full-bf16": 6, "lora": 2, "qlora": 0.5}
    return count * each[case.tuning]


def facts(case: Case, device: str, *, smallest: bool) -> dict[str, Any]:
    """Return what a line says besides its results."""
    return {
        "case": case.name,
        "model": case.model,
        "tuning": case.tuning,
        "checkpointing": case.checkpointing,
        "cached": case.cached,
        "compiled": case.compiled,
        "smallest": smallest,
        "device": device_name(device),
        "device_gib": round(torch.cuda.mem_get_info()[1] / GIB, 1) if device == "cuda" else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in LIBRARIES},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of the checkout, with a plus if files were changed. `None` outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


# ---- All cases ------------------------------------------------------------------------------------------------------


def lines_of(file: Path) -> list[dict[str, Any]]:
    """Read the lines of a result file. An incomplete last line is dropped."""
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            print(f"{file}: a line is damaged and is left out: {text[:60]!r}", file=sys.stderr)
    return lines


def pending(options: argparse.Namespace) -> list[Case]:
    """Return the requested cases that have no line for this device."""
    name = device_name(options.device)
    have = {
        line["case"]
        for line in lines_of(options.file)
        if (line["device"], line["smallest"]) == (name, options.smallest)
    }
    wanted = [case for case in CASES if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.cases)]
    return [case for case in wanted if options.again or case.name not in have]


def measured(case: Case, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Measure a case in a new process and return its line. A failure or a timeout is a valid result."""
    if not options.isolated:
        return measure(case, options.device, smallest=options.smallest)
    words = [sys.executable, __file__, "--one", case.name, "--device", options.device]
    words += ["--smallest"] if options.smallest else []
    # A new session, so that the data loader's workers, which hold the output open, end together with the case.
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        shown, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return facts(case, options.device, smallest=options.smallest) | {"outcome": f"not done in {seconds:.0f} s"}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.returncode:
        raise RuntimeError(f"the process ended with {child.returncode}")
    return json.loads(shown.splitlines()[-1])


def run(options: argparse.Namespace) -> int:
    """Measure the pending cases while time is left. Return 1 if a case failed."""
    began, failed = time.monotonic(), []
    cases = pending(options)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(cases, unit="case")
    for done, case in enumerate(bar):
        left = options.seconds - (time.monotonic() - began)
        if left < options.case_seconds and done:
            print(f"{len(cases) - done} cases are left: call again.")
            break
        bar.set_description(case.name)
        try:
            line = measured(case, options, min(left, options.case_seconds))
        except Exception as error:
            traceback.print_exc()
            failed.append(f"{case.name}: {error}")
            line = facts(case, options.device, smallest=options.smallest) | {"outcome": f"failed: {error}"[:200]}
        with options.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    print(table(lines_of(options.file)))
    for failure in failed:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failed else 0


def table(lines: list[dict[str, Any]]) -> str:
    """Return the latest line of each case and device as a Markdown table."""
    latest = {(line["device"], line["case"], line["smallest"]): line for line in lines}
    rows = [
        "| Device | Model | Tuning | Checkpointing | Pairs a step | Pairs/s | Utilisation | Peak GiB | Between steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in latest.values():
        model = line["model"] + "".join(f", {name}" for name in ("cached", "compiled", "smallest") if line[name])
        cells = [line["device"], model, line["tuning"], "yes" if line["checkpointing"] else "no"]
        if line["outcome"] == "trained":
            share = "" if line["utilisation"] is None else f"{line['utilisation']:.0%}"
            memory = line["memory_gib"]
            cells += [str(line["pairs"]), f"{line['pairs_per_second']:.2f}", share]
            cells += [f"{memory['step']:.1f}", f"{memory['between steps']:.1f}"]
        else:
            cells += ["", line["outcome"], "", "", ""]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--smallest", action="store_true", help="networks of one layer, to test this script")
    parser.add_argument("--cases", nargs="+", default=["*"], help="patterns of names, such as 'flux-*'")
    parser.add_argument("--seconds", type=float, default=570, help="of the call: no case is begun that may end later")
    parser.add_argument("--case_seconds", type=float, default=CASE_SECONDS, help="a case that takes longer is ended")
    parser.add_argument("--again", action="store_true", help="also cases that have a line, of whatever outcome")
    parser.add_argument(
        "--isolated", action=argparse.BooleanOptionalAction, default=True, help="a process for each case"
    )
    parser.add_argument("--one", choices=[case.name for case in CASES], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.jsonl")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this Python's torch sees no GPU; `--device cpu --smallest` tests the script")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.one is None:
        return run(options)
    case = next(case for case in CASES if case.name == options.one)
    print(json.dumps(measure(case, options.device, smallest=options.smallest)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

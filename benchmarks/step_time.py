"""Measure what a training step costs: this package's step against hand-written ones, and with precomputed inputs.

Every comparison is a ratio of two steps of the same round. In a round, each contestant takes one step, in random
order. All run in one process on one thread, and CPU time is measured, so other programs on the machine change the
ratios little. The table shows the median over rounds, with quartiles.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bare_steps import STEPS, Bench, PlainTrainer, script_batch
from peft import LoraConfig
from proportions import PROPORTIONS, THIN, Proportions
from random_pipeline import random_pairs
from safeguard_overhead import environment
from tqdm.auto import tqdm
from transformers import PrinterCallback
from turns import InTurns, RecordingTrainer, loop

from trl_diffusion_sdpo import DiffusionSDPOConfig

LATENTS = {"precompute_latents": True}
ERRORS = {"precompute_ref_errors": True, "precompute_epochs": 1}
# Name of a trainer of this package -> the settings in which it differs from the others.
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, parameter space": {"safeguard": "parameter"},
    "ours, errors": ERRORS,
    "ours, cached": LATENTS,
    "ours, cached, errors": LATENTS | ERRORS,
}
LORA_TARGETS, RANK = ("to_k", "to_q", "to_v", "to_out.0"), 4  # as in diffusers' script
BETA, MU, LEARNING_RATES = 5000.0, 0.9, {"full": 1e-6, "lora": 1e-4}
# Factor on the number of rounds. Two rounds of the same contestant differ by 0.85 to 1.2, so a median of five rounds
# cannot show a few percent. Steps without arithmetic are short enough for more rounds.
ROUNDS = {THIN: 8, "sd15": 3}


@dataclass(frozen=True)
class Comparison:
    """One ratio: the step time of a contestant divided by that of another.

    Attributes:
        part (`str`): Value of `--parts` that selects this comparison.
        published (`str`): Pipeline size to imitate, a key of `PROPORTIONS`.
        tuning (`str`): `"full"` or `"lora"`.
        target (`float`, *optional*): Value that the ratio should not exceed.
        whole (`bool`): Whether to include the loading of data in the time of a step.
    """

    part: str
    published: str
    tuning: str
    name: str
    against: str
    target: float | None = None
    whole: bool = False


COMPARISONS = (
    Comparison("bare", "sd15", "full", "ours", "bare loop", 1.03),
    Comparison("bare", "sd15", "lora", "ours", "bare loop", 1.03),
    Comparison("overhead", THIN, "full", "ours", "bare loop"),
    Comparison("overhead", THIN, "lora", "ours", "bare loop"),
    Comparison("overhead", THIN, "full", "plain Trainer", "bare loop"),
    Comparison("overhead", THIN, "lora", "plain Trainer", "bare loop"),
    Comparison("authors", "sd15", "full", "ours", "authors' step"),
    Comparison("diffusers", "sd15", "lora", "ours", "diffusers' script"),
    Comparison("safeguard", "sd15", "full", "ours, parameter space", "ours", 1.08),
    Comparison("safeguard", "sd15", "lora", "ours, parameter space", "ours", 1.05),
    Comparison("safeguard", "sdxl", "full", "ours, parameter space", "ours", 1.08),
    Comparison("safeguard", "sdxl", "lora", "ours, parameter space", "ours", 1.05),
    Comparison("cached", "sdxl", "full", "ours, cached", "ours", 1 / 1.3, whole=True),
    Comparison("cached", "sdxl", "lora", "ours, cached", "ours", 1 / 1.3, whole=True),
    Comparison("cached", "sdxl", "lora", "ours, cached, errors", "ours, errors", 1 / 1.3, whole=True),
    Comparison("errors", "sd15", "full", "ours, cached, errors", "ours, cached", 0.80),
    Comparison("errors", "sd15", "lora", "ours, cached, errors", "ours, cached", 0.72),
    Comparison("both", "sd15", "full", "ours, cached, errors", "authors' step", 0.60),
    Comparison("both", "sd15", "lora", "ours, cached, errors", "diffusers' script"),
)
PARTS = tuple(dict.fromkeys(comparison.part for comparison in COMPARISONS))


@dataclass
class Result:
    """A comparison with its measurements.

    Attributes:
        ratios (`list[float]`): Ratio of each round.
        milliseconds (`tuple[float, float]`): Median step time of both contestants.
        operations (`tuple[int, int]`): Number of PyTorch operations in a step of each.
        written (`tuple[int, int]`): Bytes that these operations return.
        more (`float`): How many milliseconds longer the first contestant's step takes, as a median over rounds.
        difference (`float`): Largest difference between both contestants' losses in a step. They train on the same
            pairs. All contestants except the scripts also draw the same noise.
    """

    comparison: Comparison
    ratios: list[float]
    milliseconds: tuple[float, float]
    operations: tuple[int, int]
    written: tuple[int, int]
    more: float
    difference: float

    @property
    def quartiles(self) -> tuple[float, float, float]:
        if len(self.ratios) == 1:
            return (self.ratios[0],) * 3
        low, median, high = statistics.quantiles(self.ratios, method="inclusive")
        return low, median, high


def measure(comparisons: list[Comparison], options: argparse.Namespace, folder: Path, bar: tqdm) -> list[Result]:
    """Measure comparisons of one kind of pipeline and tuning in common rounds."""
    published, tuning = comparisons[0].published, comparisons[0].tuning
    names = contestants_of(comparisons)
    contestants: dict[str, InTurns] = {}
    for name in names:
        bar.set_description(f"{published}, {tuning}: {name}")
        contestants[name] = contestant(name, published, tuning, options, folder / f"{len(contestants)}")
    shuffled = random.Random(0)
    for _ in range(options.warmup + rounds_of(published, options)):
        for name in shuffled.sample(names, len(names)):
            contestants[name].advance()
            bar.update()
    for turns in contestants.values():
        turns.advance(counted=True)
        bar.update()
    return [result(comparison, contestants, options.warmup) for comparison in comparisons]


def contestants_of(comparisons: list[Comparison]) -> list[str]:
    return list(dict.fromkeys(name for c in comparisons for name in (c.name, c.against)))


def rounds_of(published: str, options: argparse.Namespace) -> int:
    """Return the number of timed rounds."""
    return options.rounds * (1 if options.smallest else ROUNDS.get(published, 1))


def contestant(name: str, published: str, tuning: str, options: argparse.Namespace, folder: Path) -> InTurns:
    """Build a contestant and its networks.

    A contestant is a trainer of this package with the settings of its name, a hand-written loop, or transformers'
    Trainer around the same passes. Each has its own networks with equal weights.
    """
    size = size_of(published, tuning, options)
    steps = options.warmup + rounds_of(published, options) + 1
    pairs_of_step = options.pairs or size.pairs
    pairs = random_pairs(pairs_of_step * steps, size.pixels)
    args = arguments_of(
        OURS.get(name, {}),
        size,
        options,
        folder,
        max_steps=steps,
        per_device_train_batch_size=pairs_of_step,
        learning_rate=LEARNING_RATES[tuning],
    )
    lora = None
    if tuning == "lora":
        lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LORA_TARGETS))
    trainer = RecordingTrainer(size.build(), None, args, pairs, peft_config=lora)
    trainer.remove_callback(PrinterCallback)
    if name in OURS:
        return InTurns(trainer.take_turns, options.device, options.threads)
    bench = Bench(size.build().to(options.device), tuning, BETA, MU, LEARNING_RATES[tuning], lora)
    bench.unet.load_state_dict(trainer.denoiser.state_dict())  # a LoRA has a random start
    batches = (script_batch(bench, batch) for batch in trainer.get_train_dataloader())
    if name not in STEPS:
        plain = PlainTrainer(bench, args, list(batches))
        plain.remove_callback(PrinterCallback)
        return InTurns(plain.take_turns, options.device, options.threads)
    return InTurns(loop(partial(STEPS[name], bench), batches), options.device, options.threads)


def arguments_of(
    differing: dict[str, Any], size: Proportions, options: argparse.Namespace, folder: Path, **settings: Any
) -> DiffusionSDPOConfig:
    """Return the settings that all trainers share, and those in which this one differs."""
    caches = {"precompute_dir": str(folder / "encoded")} if "precompute_latents" in differing else {}
    return DiffusionSDPOConfig(
        str(folder),
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        beta=BETA,
        safeguard_mu=MU,
        use_cpu=options.device == "cpu",
        bf16=False,
        resolution=size.pixels,
        dataloader_num_workers=0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{"safeguard": "output"} | differing,  # output space is the rule of the authors' step
        **caches,
        **settings,
    )


def size_of(published: str, tuning: str, options: argparse.Namespace) -> Proportions:
    if options.smallest:
        return PROPORTIONS[f"smallest {PROPORTIONS[published].published}"]
    return PROPORTIONS.get(f"{published}, {tuning}", PROPORTIONS[published])


def result(comparison: Comparison, contestants: dict[str, InTurns], warmup: int) -> Result:
    """Return the ratios of the timed rounds, and the largest difference between the losses of all rounds."""
    both = [contestants[name] for name in (comparison.name, comparison.against)]
    seconds = [(one.turns if comparison.whole else one.steps)[warmup:] for one in both]
    return Result(
        comparison,
        [mine / other for mine, other in zip(*seconds, strict=True)],
        (1000 * statistics.median(seconds[0]), 1000 * statistics.median(seconds[1])),
        (both[0].operations.count, both[1].operations.count),
        (both[0].operations.bytes, both[1].operations.bytes),
        1000 * statistics.median(mine - other for mine, other in zip(*seconds, strict=True)),
        max(abs(float(mine - other)) for mine, other in zip(both[0].losses, both[1].losses, strict=True)),
    )


def table(results: list[Result]) -> str:
    lines = [
        "| part | proportions | tuning | step | of | ratio (quartiles) | target | milliseconds | more | operations "
        "| bytes written | losses differ by |",
        "|---" * 12 + "|",
    ]
    for measured in results:
        of = measured.comparison
        low, median, high = measured.quartiles
        target = "" if of.target is None else f"{of.target:.2f}"
        milliseconds = ", ".join(f"{value:.0f}" for value in measured.milliseconds)
        lines.append(
            f"| {of.part} | {of.published} | {of.tuning} | {of.name} | {of.against} | "
            f"{median:.3f} ({low:.3f} to {high:.3f}) | {target} | {milliseconds} | {measured.more:.1f} | "
            f"{measured.operations[0]}, {measured.operations[1]} | {measured.written[0] / measured.written[1]:.3f} | "
            f"{measured.difference:.1e} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--warmup", type=int, default=1, help="warm-up rounds")
    parser.add_argument("--pairs", type=int, help="pairs a step (default: of the proportions)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU; one is steadiest on a busy machine")
    parser.add_argument("--smallest", action="store_true", help="networks so small that the ratios mean nothing")
    parser.add_argument(
        "--output", type=Path, default=Path("bench_output/step_time.json"), help="file for all numbers"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in COMPARISONS:
        if comparison.part in options.parts:
            groups.setdefault((comparison.published, comparison.tuning), []).append(comparison)
    steps = sum(
        (options.warmup + rounds_of(published, options) + 1) * len(contestants_of(comparisons))
        for (published, _), comparisons in groups.items()
    )
    results: list[Result] = []
    settings = {name: str(value) for name, value in vars(options).items()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=steps, unit="step") as bar:
        for number, comparisons in enumerate(groups.values()):
            results += measure(comparisons, options, Path(folder) / f"{number}", bar)
            rows = [asdict(measured) | {"quartiles": measured.quartiles} for measured in results]
            facts = {"settings": settings, "environment": environment(options), "load": f"{os.getloadavg()[2]:.1f}"}
            options.output.write_text(json.dumps({**facts, "results": rows}, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from bare_steps import STEPS, Bench, PlainTrainer, script_batch
from comparisons import COMPARISONS, Comparison
from matplotlib import pyplot as plt
from peft import LoraConfig
from proportions import PARTS as PARTS_OF_STEP
from proportions import PROPORTIONS, THIN, Proportions, true_shares
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
    "ours, errors": ERRORS,
    "ours, cached": LATENTS,
    "ours, cached, errors": LATENTS | ERRORS,
}
LORA_TARGETS, RANK = ("to_k", "to_q", "to_v", "to_out.0"), 4  # as in diffusers' script
BETA, MU, LEARNING_RATES = 5000.0, 0.9, {"full": 1e-6, "lora": 1e-4}


SETTINGS = ("parts", "rounds", "warmup", "pairs", "device", "threads", "smallest", "quick")
PARTS = tuple(dict.fromkeys(comparison.part for comparison in COMPARISONS))
# Factor on the number of rounds. Two rounds of the same contestant differ by 0.85 to 1.2, so a median of five rounds
# cannot show a few percent. Steps without arithmetic are short enough for more rounds.
ROUNDS = {THIN: 8, "sd15": 3}
QUICK_ROUNDS = {THIN: 4, "sd15": 2}


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


@dataclass
class Group:
    """What is measured in the same rounds: one kind of pipeline with LoRA or full training.

    Attributes:
        shares (`dict[str, float]`): Share of each part in the time of a hand-written step, or of this package's step.
        true_shares (`dict[str, float]`): Share of each part in the FLOPs at the published size, or in its time if
            known.
        starts (`dict[str, float]`): Trainer -> seconds before its first step.
    """

    published: str
    tuning: str
    results: list[Result] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    true_shares: dict[str, float] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)


def measure(published: str, tuning: str, options: argparse.Namespace, folder: Path, bar: tqdm) -> Group:
    """Measure the comparisons of one kind of pipeline, with LoRA or full training, in common rounds."""
    wanted = [c for c in wanted_comparisons(options) if (c.published, c.tuning) == (published, tuning)]
    names = list(dict.fromkeys(name for c in wanted for name in (c.name, c.against)))
    contestants: dict[str, InTurns] = {}
    group = Group(published, tuning)
    benches: list[Bench] = []
    for name in names:
        bar.set_description(f"{published}, {tuning}: {name}")
        contestants[name], bench = contestant(name, published, tuning, options, folder / f"{len(contestants)}")
        if bench is None:
            group.starts[name] = contestants[name].start
        else:
            benches.append(bench)
    shuffled = random.Random(0)
    rounds = rounds_of(published, options)
    for _ in range(options.warmup + rounds):
        for name in shuffled.sample(names, len(names)):
            bar.set_description(f"{published}, {tuning}: {name}")
            contestants[name].advance()
            bar.update()
    for one in contestants.values():
        one.advance(counted=True)
        bar.update()
    group.results = [result(comparison, contestants, options.warmup) for comparison in wanted]
    group.true_shares = true_shares(published, tuning)
    timed = benches[0].seconds if benches else contestants["ours"].parts if "ours" in contestants else {}
    if timed:
        group.shares = shares(timed, options.warmup, rounds)
    return group


def wanted_comparisons(options: argparse.Namespace) -> list[Comparison]:
    """Return the comparisons of the selected parts. A quick call skips SDXL's LoRA and its VAE in half precision."""
    found = [comparison for comparison in COMPARISONS if comparison.part in options.parts]
    if options.quick:
        found = [
            one for one in found if one.published == THIN or f"quick {one.published}, {one.tuning}" in PROPORTIONS
        ]
    return found


def rounds_of(published: str, options: argparse.Namespace) -> int:
    """Return the number of timed rounds."""
    times = {} if options.smallest else QUICK_ROUNDS if options.quick else ROUNDS
    return options.rounds * times.get(published, 1)


def contestant(
    name: str, published: str, tuning: str, options: argparse.Namespace, folder: Path
) -> tuple[InTurns, Bench | None]:
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
        return InTurns(trainer.take_turns, options.device, options.threads), None
    bench = Bench(size.build().to(options.device), tuning, BETA, MU, LEARNING_RATES[tuning], lora)
    bench.unet.load_state_dict(trainer.denoiser.state_dict())  # a LoRA has a random start
    batches = (script_batch(bench, batch) for batch in trainer.get_train_dataloader())
    if name not in STEPS:
        plain = PlainTrainer(bench, args, list(batches))
        plain.remove_callback(PrinterCallback)
        return InTurns(plain.take_turns, options.device, options.threads), bench
    return InTurns(loop(partial(STEPS[name], bench), batches), options.device, options.threads), bench


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
        **differing,
        **caches,
        **settings,
    )


def size_of(published: str, tuning: str, options: argparse.Namespace) -> Proportions:
    if options.smallest:
        return PROPORTIONS[f"smallest {PROPORTIONS[published].published}"]
    names = ([f"quick {published}, {tuning}"] if options.quick else []) + [f"{published}, {tuning}", published]
    return PROPORTIONS[next(name for name in names if name in PROPORTIONS)]


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


def shares(parts: Mapping[str, list[float]], warmup: int, steps: int) -> dict[str, float]:
    """Return the share of each part in the time of the steps after `warmup`. A part may consist of several pieces."""
    sums = {}
    for part, seconds in parts.items():
        pieces = len(seconds) // (len(parts["reference"]))
        sums[part] = sum(seconds[warmup * pieces : (warmup + steps) * pieces])
    return {part: found / sum(sums.values()) for part, found in sums.items()}


# ---- Report ---------------------------------------------------------------------------------------------------------


def table(groups: list[Group]) -> str:
    lines = [
        "| part | proportions | tuning | step | of | ratio (quartiles) | target | milliseconds | more | operations "
        "| bytes written | losses differ by |",
        "|---" * 12 + "|",
    ]
    for group in groups:
        for found in group.results:
            of = found.comparison
            low, median, high = found.quartiles
            target = "" if of.target is None else f"{of.target:.2f}"
            lines.append(
                f"| {of.part} | {of.published} | {of.tuning} | {of.name} | {of.against} | "
                f"{median:.3f} ({low:.3f} to {high:.3f}) | {target} | "
                f"{found.milliseconds[0]:.0f}, {found.milliseconds[1]:.0f} | {found.more:.1f} | {found.operations[0]}, "
                f"{found.operations[1]} | {found.written[0] / found.written[1]:.3f} | {found.difference:.1e} |"
            )
    parts = (*PARTS_OF_STEP, "optimizer")
    lines += ["", f"| shares of a step | {' | '.join(parts)} |", "|---" * (1 + len(parts)) + "|"]
    for group in groups:
        for kind, found in (("here, by time", group.shares), ("true size", group.true_shares)):
            cells = [f"{found.get(part, 0):.1%}" for part in parts]
            if found:
                lines.append(f"| {group.published}, {group.tuning}, {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(groups: list[Group], file: Path) -> None:
    """Plot a bar for each comparison with its quartiles and target."""
    matplotlib.use("Agg")
    found = [result for group in groups for result in group.results][::-1]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.45 * len(found)), layout="constrained")
    names = [f"{of.name} / {of.against}\n{of.published}, {of.tuning}" for of in (one.comparison for one in found)]
    medians = [one.quartiles[1] for one in found]
    below, above = ([abs(one.quartiles[end] - one.quartiles[1]) for one in found] for end in (0, 2))
    bars = axes.barh(names, medians, xerr=[below, above], color="tab:blue", alpha=0.75, height=0.6)
    axes.bar_label(bars, [f"{median:.2f}" for median in medians], padding=6, fontsize="small")
    targets = [(row, one.comparison.target) for row, one in enumerate(found) if one.comparison.target is not None]
    for number, (row, target) in enumerate(targets):
        axes.plot([target] * 2, [row - 0.4, row + 0.4], color="tab:red", label="target" if not number else None)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(0, max(1.15, *(one.quartiles[2] for one in found)) * 1.1)
    axes.set_xlabel("time of a step, relative to the other of the same round (median and quartiles)")
    axes.tick_params(axis="y", labelsize="small")
    if targets:
        axes.legend(loc="lower right", fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 5)")
    parser.add_argument("--warmup", type=int, default=1, help="warm-up rounds")
    parser.add_argument("--pairs", type=int, help="pairs a step (default: of the proportions)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU; one is steadiest on a busy machine")
    parser.add_argument("--resume", action="store_true", help="keep what `--output` has of the same settings")
    parser.add_argument("--smallest", action="store_true", help="networks so small that the ratios mean nothing")
    parser.add_argument("--quick", action="store_true", help="fewer pixels, comparisons and rounds: a first look")
    parser.add_argument("--output", type=Path, help="file for all numbers (default: in bench_output)")
    parser.add_argument("--plot", type=Path, help="file for the plot (default: in bench_output)")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 5)
    name_files(options, "step_time")
    return options


def name_files(options: argparse.Namespace, name: str) -> None:
    """Choose output files if the user named none. A quick call gets other files, so it overwrites no full
    measurement."""
    name += "_quick" if options.quick else ""
    options.output = options.output or Path(f"bench_output/{name}.json")
    options.plot = options.plot or Path(f"bench_output/{name}.png")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    wanted = wanted_comparisons(options)
    kinds = dict.fromkeys((comparison.published, comparison.tuning) for comparison in wanted)
    settings = {name: getattr(options, name) for name in SETTINGS}
    groups = kept_groups(options.output, settings) if options.resume else []
    pending = [kind for kind in kinds if kind not in {(group.published, group.tuning) for group in groups}]
    contestants = {(c.published, c.tuning, name) for c in wanted for name in (c.name, c.against)}
    steps = sum(
        options.warmup + rounds_of(published, options) + 1
        for published, *kind, _ in contestants
        if (published, *kind) in pending
    )
    with tempfile.TemporaryDirectory() as folder, tqdm(total=steps, unit="step") as bar:
        for published, tuning in pending:
            groups.append(measure(published, tuning, options, Path(folder) / f"{published}-{tuning}", bar))
            write(groups, settings, options)
    plot(groups, options.plot)
    print(table(groups))
    return 0


def write(groups: list[Group], settings: dict[str, Any], options: argparse.Namespace) -> None:
    """Write all groups so far. A call with `--resume` continues with the rest."""
    report = {"settings": settings, "environment": environment(options), "load": f"{os.getloadavg()[2]:.1f}"}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    report["groups"] = [as_json(group) for group in groups]
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def kept_groups(file: Path, settings: dict[str, Any]) -> list[Group]:
    """Read the groups that an earlier call with the same settings has measured."""
    if not file.is_file():
        return []
    report = json.loads(file.read_text(encoding="utf-8"))
    of_file = {"quick": False, **report["settings"]}  # older files lack this entry
    if of_file != settings:
        raise ValueError(f"`--resume` needs the settings of {file}, {of_file}; got {settings}.")
    return [from_json(group) for group in report["groups"]]


def as_json(group: Group) -> dict[str, Any]:
    quartiles = [{"quartiles": found.quartiles} for found in group.results]
    written = asdict(group)
    written["results"] = [found | more for found, more in zip(written["results"], quartiles, strict=True)]
    return written


def from_json(written: dict[str, Any]) -> Group:
    results = [
        Result(**{name: value for name, value in found.items() if name != "quartiles"}) for found in written["results"]
    ]
    for found in results:
        found.comparison = Comparison(**found.comparison)
    return Group(**{**written, "results": results})


if __name__ == "__main__":
    raise SystemExit(main())

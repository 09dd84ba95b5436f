"""The front of reward against damage: what rules for the loser's gradient gain, and what they cost the winners.

Every run tunes the demo's model of the embedded world on its pairs, by the public trainer, and is measured twice, with
its raw weights and with their average: the oracle's score of samples, and the change of the winners' and losers'
errors on held-out pairs, in all and at each noise level. Prompts and held-out pairs come in two parts: rules and
strengths are chosen on one, and the table of the other is made once.

Runs are rows of a JSON-lines file. A second call makes those that are missing; several processes share the work.

    python benchmarks/front.py run --plan front --workers 2
    python benchmarks/front.py report
"""

import argparse
import json
import multiprocessing
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from diffusers.utils.torch_utils import randn_tensor
from transformers import PrinterCallback

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer
from trl_diffusion_sdpo.demo.oracle import oracle_score
from trl_diffusion_sdpo.demo.pairs import eval_pairs, off_policy_pairs, on_policy_pairs
from trl_diffusion_sdpo.demo.pipeline import LATENT_SHAPE, load_base_pipeline, sample_images
from trl_diffusion_sdpo.demo.world import IMAGE_SIZE, captions

LEVELS = 8
STEPS = {"stress": 200, "gentle": 100, "smallest": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "stress": {"learning_rate": 2e-4, "beta": 100.0},
    "gentle": {"learning_rate": 1e-4, "beta": 500.0},
    # For a look at whether everything runs.
    "smallest": {"learning_rate": 2e-4, "beta": 100.0, "per_device_train_batch_size": 2, "winner_budget_pairs": 2},
}
PARTS = ("selection", "final")
PROBE_SEED, HELD_OUT_SEED, SCORE_SEED = 50_000, 10_000, 20_000  # apart from those of training
HELD_OUT_COPIES = 3  # each held-out pair is measured at this many draws of noise and timestep
SAMPLES_PER_PROMPT = 3
EMA_DECAY = 0.98
SHARED = {
    "per_device_train_batch_size": 32,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "warmup_steps": 20,
    "random_flip": False,
    "resolution": IMAGE_SIZE,
    "noise_levels": LEVELS,
    "ema_decay": EMA_DECAY,
    "winner_budget_pairs": 32,
    "winner_budget_steps": 10,
}
UPPER = [0.62, 1.0]  # noise levels of timesteps 503 and above
# The strength of each rule that the picture of noise levels shows.
SHOWN = {"SFT": 0.0, "output": 0.6, "output, range": 0.45, "budget": 0.1, "parameter": 0.3}


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        rule (`str`): Name of the rule.
        strength (`float`): What is varied within it.
        settings (`dict[str, Any]`): Fields of `DiffusionSDPOConfig` that make it.
        seed (`int`): Of pairs, noise and samples.
        pairs (`str`): `"off_policy"` or `"on_policy"`.
        push (`str`): `"stress"` or `"gentle"`.
    """

    rule: str
    strength: float
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    pairs: str = "off_policy"
    push: str = "stress"

    @property
    def key(self) -> str:
        return f"{self.rule}|{self.strength:g}|{self.seed}|{self.pairs}|{self.push}"


def rule_settings(rule: str, strength: float) -> dict[str, Any]:
    """The configuration of a rule at one strength: a margin mu, or a budget."""
    output = {"safeguard": "output", "safeguard_mu": strength}
    parameter = {"safeguard": "parameter", "safeguard_mu": strength}
    budget = {"safeguard": "none", "winner_budget": strength}
    return {
        "SFT": {"loss_type": "sft"},
        "DPO": {"safeguard": "none"},
        "output": output,
        "output, pair": output | {"safeguard_granularity": "pair"},
        "output, weighted": output | {"safeguard_granularity": "weighted"},
        "output, bucket": output | {"safeguard_granularity": "bucket"},
        "parameter": parameter,
        "parameter, error": parameter | {"safeguard_anchor": "error"},
        "parameter, AdamW": parameter | {"safeguard_metric": "adamw", "safeguard_anchor": "error"},
        "output, range": output | {"loser_noise_range": UPPER},
        "bucket, range": output | {"safeguard_granularity": "bucket", "loser_noise_range": UPPER},
        "parameter, range": parameter | {"loser_noise_range": UPPER},
        "budget": budget,
        "budget, range": budget | {"loser_noise_range": UPPER},
        "budget, output": budget | {"safeguard": "output", "safeguard_mu": 0.3},
        "budget, bucket": budget | {"safeguard": "output", "safeguard_mu": 0.3, "safeguard_granularity": "bucket"},
        "range, budget, 0.6": output | {"safeguard_mu": 0.6, "loser_noise_range": UPPER, "winner_budget": strength},
        "budget, parameter": budget | {"safeguard": "parameter", "safeguard_mu": 0.1},
    }[rule]


def planned(rules: dict[str, tuple[float, ...]], seeds: range, **settings: str) -> list[Run]:
    return [
        Run(rule, strength, rule_settings(rule, strength), seed, **settings)
        for seed in seeds
        for rule, strengths in rules.items()
        for strength in strengths
    ]


# Each rule at three strengths, on one seed.
FRONT: dict[str, tuple[float, ...]] = {
    "SFT": (0.0,),
    "DPO": (0.0,),
    "output": (0.45, 0.6, 0.8),
    "output, range": (0.3, 0.45, 0.6),
    "budget": (0.05, 0.1, 0.3),
    "budget, range": (0.05, 0.1, 0.3),
    "parameter": (0.3, 0.6),
}
# The strengths that are made on two more seeds.
AGAIN: dict[str, tuple[float, ...]] = {
    "SFT": (0.0,),
    "output": (0.6,),
    "budget, range": (0.1,),
    "budget": (0.1, 0.3),
    "output, range": (0.45,),
    "DPO": (0.0,),
}
# Chosen on the first part: what lay best there, and its strictest neighbours, on three seeds.
CHOSEN: dict[str, tuple[float, ...]] = {"range, budget, 0.6": (0.1, 0.2), "output": (0.8,), "output, range": (0.6,)}
# Under other settings: one strength of each.
ELSEWHERE: dict[str, tuple[float, ...]] = {
    "SFT": (0.0,),
    "DPO": (0.0,),
    "output": (0.6,),
    "budget, range": (0.1,),
}
# What was tried on one seed besides.
EXPLORED: dict[str, tuple[float, ...]] = {
    "output, pair": (0.6,),
    "output, weighted": (0.6,),
    "output, bucket": (0.6,),
    "parameter, error": (0.3,),
    "parameter, AdamW": (0.1,),
    "bucket, range": (0.4,),
    "parameter, range": (0.3,),
    "budget, bucket": (0.1,),
    "budget, parameter": (0.1,),
}


def plans() -> dict[str, list[Run]]:
    """Named lists of runs."""
    elsewhere = [("on_policy", "stress"), ("off_policy", "gentle")]
    return {
        "front": planned(FRONT, range(1)) + planned(AGAIN, range(1, 3)),
        "elsewhere": [
            run for pairs, push in elsewhere for run in planned(ELSEWHERE, range(1), pairs=pairs, push=push)
        ],
        "chosen": planned(CHOSEN, range(3)),
        "explore": planned(EXPLORED, range(1)),
        "smallest": [Run("budget, range", 0.1, rule_settings("budget, range", 0.1), push="smallest")],
    }


# ---- One run ------------------------------------------------------------------------------------------------------


class EncodedTrainer(DiffusionSDPOTrainer):
    """Encodes each image and prompt once: the pictures are never cropped or flipped here, and the VAE's most likely
    latent stands for its sample."""

    def __init__(self, *parts, **options):
        self._latents: dict[int, torch.Tensor] = {}
        self._texts: dict[str, torch.Tensor] = {}
        super().__init__(*parts, **options)

    def _encode(self, inputs):
        winners, losers = inputs["pixel_values"].chunk(2)
        keys = [hash(pair.numpy().tobytes()) for pair in torch.stack([winners, losers], 1)]
        new = [row for row, key in enumerate(keys) if key not in self._latents]
        if new:
            encoded = self.family.encode_images(torch.cat([winners[new], losers[new]])).chunk(2)
            self._latents |= dict(zip((keys[row] for row in new), torch.stack(encoded, 1), strict=True))
        unknown = sorted(set(inputs["prompts"]) - self._texts.keys())
        if unknown:
            self._texts |= dict(zip(unknown, self.family.encode_prompts(unknown)["prompt_embeds"], strict=True))
        latents = torch.cat(torch.stack([self._latents[key] for key in keys]).unbind(1)).contiguous()
        text = torch.stack([self._texts[prompt] for prompt in inputs["prompts"]])
        return latents, {"prompt_embeds": torch.cat([text, text])}


def parts_of_prompts() -> dict[str, list[str]]:
    """The prompts, every other one in each part."""
    texts = [caption.text for caption in captions()]
    return {"selection": texts[::2], "final": texts[1::2]}


def held_out(seed: int, *, smallest: bool) -> dict[str, Dataset]:
    """Held-out pairs of each part's prompts, several times over."""
    pairs = eval_pairs(seed + HELD_OUT_SEED, per_prompt=1 if smallest else 4)
    found = {}
    for part, prompts in parts_of_prompts().items():
        rows = [row for row, prompt in enumerate(pairs["prompt"]) if prompt in set(prompts)]
        found[part] = concatenate_datasets([pairs.select(rows)] * (1 if smallest else HELD_OUT_COPIES))
    return found


def judged(pipeline: Any, part: str, seed: int, *, smallest: bool) -> float:
    """The oracle's mean score of samples for a part's prompts, from equal latents for every run of a seed."""
    prompts = [prompt for prompt in parts_of_prompts()[part] for _ in range(1 if smallest else SAMPLES_PER_PROMPT)]
    generator = torch.Generator().manual_seed(SCORE_SEED + seed)
    latents = randn_tensor((len(prompts), *LATENT_SHAPE), generator)
    with torch.no_grad():
        return float(np.mean(oracle_score(sample_images(pipeline, prompts, latents), prompts)))


def make(run: Run) -> dict[str, Any]:
    """Train, and measure both parts with raw and averaged weights."""
    started = time.monotonic()
    pipeline = load_base_pipeline()
    train = off_policy_pairs(run.seed) if run.pairs == "off_policy" else on_policy_pairs(pipeline, run.seed)
    with tempfile.TemporaryDirectory() as folder:
        args = DiffusionSDPOConfig(
            output_dir=folder,
            max_steps=STEPS[run.push],
            seed=run.seed,
            use_cpu=True,
            per_device_eval_batch_size=64,
            save_strategy="no",
            logging_steps=max(1, STEPS[run.push] // 5),
            report_to="none",
            disable_tqdm=True,
            verify_images=False,
            dataloader_pin_memory=False,
            **{**SHARED, **SETTINGS[run.push], **run.settings},
        )
        # The probe of a budget: pairs of its own, of all prompts.
        probe = eval_pairs(run.seed + PROBE_SEED, per_prompt=1)
        # SFT has no reference of its own; a copy serves the changes.
        reference = load_base_pipeline() if run.rule == "SFT" else None
        trainer = EncodedTrainer(pipeline, reference, args, train, probe)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trained = time.monotonic() - started
        row: dict[str, Any] = {**asdict(run), "key": run.key, "seconds": trained, "measured": {}}
        row["scale"] = [entry["safeguard/scale"] for entry in trainer.state.log_history if "safeguard/scale" in entry]
        row["budget"] = [entry["budget/scale"] for entry in trainer.state.log_history if "budget/scale" in entry]
        smallest = run.push == "smallest"
        for part, pairs in held_out(run.seed, smallest=smallest).items():
            metrics = trainer.evaluate(pairs)
            scores = {"raw": judged(pipeline, part, run.seed, smallest=smallest)}
            averaged = load_base_pipeline()
            averaged.register_modules(unet=trainer.average.kept.module)
            scores["ema"] = judged(averaged, part, run.seed, smallest=smallest)
            row["measured"][part] = {
                weights: {"oracle": scores[weights], **changes(metrics, prefix)}
                for weights, prefix in (("raw", "eval"), ("ema", "eval_ema"))
            }
    return row


def changes(metrics: dict[str, float], prefix: str) -> dict[str, Any]:
    """What an evaluation found, absolute and by noise level as a share of the reference's error."""
    found: dict[str, Any] = {"winner": metrics[f"{prefix}_errors/winner_change"]}
    found["loser"] = metrics[f"{prefix}_errors/loser_change"]
    for name in ("winner", "loser"):
        found[f"{name}_levels"] = [
            metrics.get(f"{prefix}_errors/{name}_change_relative@{level}") for level in range(LEVELS)
        ]
    return found


# ---- Many runs ----------------------------------------------------------------------------------------------------


def rows_of(file: Path) -> dict[str, dict[str, Any]]:
    """The rows that a file holds, by key; a line that was cut off is left out, and its run made again."""
    rows = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["key"]] = row
    return rows


def ends_whole(file: Path) -> bool:
    """Whether a file is empty or ends with a whole line."""
    return not file.stat().st_size or file.read_bytes().endswith(b"\n")


def work(run: Run) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    return make(run)


def make_all(runs: list[Run], file: Path, workers: int) -> None:
    """Make the runs that the file lacks, and append a row for each as soon as it is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    there = rows_of(file)
    missing = [run for run in runs if run.key not in there]
    print(f"{len(runs)} runs, {len(missing)} to make", flush=True)
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=20) as pool:
        for done, row in enumerate(pool.imap_unordered(work, missing), 1):
            with file.open("a", encoding="utf-8") as out:
                out.write(("" if ends_whole(file) else "\n") + json.dumps(row) + "\n")
            raw = row["measured"]["selection"]["raw"]
            passed = time.monotonic() - started
            print(
                f"{done}/{len(missing)} {row['key']}: oracle {raw['oracle']:.3f}, winner {raw['winner']:+.4f}, "
                f"{passed / done * (len(missing) - done) / 60:.0f} min to go",
                flush=True,
            )


# ---- Report -------------------------------------------------------------------------------------------------------

COLORS = {"SFT": "#555555", "DPO": "#c0392b", "output": "#2471a3", "output, range": "#1e8449", "budget": "#8e44ad"}
SPARE_COLORS = ("#d68910", "#16a085", "#7f8c8d", "#a04000", "#1f618d", "#b03a7a")


@dataclass(frozen=True)
class Point:
    """Runs of one rule and strength over seeds, measured on one part with one kind of weights."""

    rule: str
    strength: float
    oracle: np.ndarray
    winner: np.ndarray
    levels: np.ndarray  # (seeds, levels), relative

    @property
    def worst(self) -> np.ndarray:
        """Largest relative change over the noise levels, of each seed."""
        return np.nanmax(self.levels, axis=1)


def points(rows: list[dict[str, Any]], part: str, weights: str, pairs: str, push: str) -> list[Point]:
    """All rules and strengths under one setting, in the order of the rules."""
    kept = [row for row in rows if (row["pairs"], row["push"]) == (pairs, push)]
    found = []
    for rule, strength in dict.fromkeys((row["rule"], row["strength"]) for row in kept):
        mine = [row["measured"][part][weights] for row in kept if (row["rule"], row["strength"]) == (rule, strength)]
        levels = np.array([[np.nan if x is None else x for x in one["winner_levels"]] for one in mine])
        oracle, winner = (np.array([one[name] for one in mine]) for name in ("oracle", "winner"))
        found.append(Point(rule, strength, oracle, winner, levels))
    return sorted(found, key=lambda point: (point.rule, point.strength))


def table(rows: list[dict[str, Any]], part: str, pairs: str = "off_policy", push: str = "stress") -> str:
    """Markdown: reward, winner change, and the largest relative change over the noise levels, raw and averaged."""
    lines = [
        "| rule | strength | seeds | oracle | winner change | worst level | oracle, EMA | winner change, EMA "
        "| worst level, EMA |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    both = zip(*(points(rows, part, weights, pairs, push) for weights in ("raw", "ema")), strict=True)
    for raw, ema in both:
        cells = [f"{raw.rule}", f"{raw.strength:g}", str(len(raw.oracle))]
        for point in (raw, ema):
            cells += [
                spread(point.oracle, "{:.3f}"),
                spread(point.winner, "{:+.4f}"),
                f"{100 * point.worst.mean():+.0f}%",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def deviation(values: np.ndarray) -> float:
    """Standard deviation over seeds; 0 of one."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def spread(values: np.ndarray, form: str) -> str:
    """Mean, and with several seeds the standard deviation."""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(values.mean())} ± {form.format(values.std(ddof=1)).lstrip('+')}"


def colors_of(rules: list[str]) -> dict[str, str]:
    spare = iter(SPARE_COLORS * 3)
    return {rule: COLORS.get(rule) or next(spare) for rule in dict.fromkeys(rules)}


def draw_front(rows: list[dict[str, Any]], part: str, file: Path) -> None:
    """Reward against what the winners paid: the mean, and the worst noise level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True)
    for row, weights in enumerate(("raw", "ema")):
        # Plain DPO would take nine tenths of every axis: the table has it.
        shown = [point for point in points(rows, part, weights, "off_policy", "stress") if point.rule != "DPO"]
        colors = colors_of([point.rule for point in shown])
        for column, paid in enumerate(("winner", "worst")):
            ax = axes[row][column]
            for rule, color in colors.items():
                mine = [point for point in shown if point.rule == rule]
                x, y = ([getattr(p, name).mean() for p in mine] for name in (paid, "oracle"))
                spreads = [[deviation(getattr(p, name)) for p in mine] for name in (paid, "oracle")]
                ax.errorbar(
                    x, y, xerr=spreads[0], yerr=spreads[1], marker="o", capsize=2, color=color, label=rule, alpha=0.85
                )
                for point, at in zip(mine, zip(x, y, strict=True), strict=True):
                    if rule != "SFT":
                        ax.annotate(f"{point.strength:g}", at, xytext=(4, 4), textcoords="offset points", fontsize=7)
            ax.set_xscale("symlog", linthresh=0.003 if paid == "winner" else 0.1)
            ax.set_xlabel("winner change, mean" if paid == "winner" else "winner change, worst noise level, relative")
            ax.set_title("raw weights" if weights == "raw" else f"averaged weights (EMA {EMA_DECAY})")
            ax.axvline(0, color="black", linewidth=0.6)
            ax.grid(alpha=0.2)
        axes[row][0].set_ylabel("oracle score")
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)


def draw_levels(rows: list[dict[str, Any]], part: str, strengths: dict[str, float], file: Path) -> None:
    """Relative winner change by noise level, one strength of each rule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    for ax, weights in zip(figure.subplots(1, 2, sharey=True), ("raw", "ema"), strict=True):
        shown = points(rows, part, weights, "off_policy", "stress")
        colors = colors_of([point.rule for point in shown])
        middles = (np.arange(LEVELS) + 0.5) / LEVELS
        for point in shown:
            if strengths.get(point.rule) != point.strength:
                continue
            label = f"{point.rule} {point.strength:g}" if point.strength else point.rule
            mean, sd = 100 * point.levels.mean(0), 100 * point.levels.std(0)
            ax.plot(middles, mean, marker="o", color=colors[point.rule], label=label)
            ax.fill_between(middles, mean - sd, mean + sd, color=colors[point.rule], alpha=0.12)
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set(xlabel="noise level (share of noise)", title="raw weights" if weights == "raw" else "averaged weights")
        ax.set_yscale("symlog", linthresh=10)
        ax.grid(alpha=0.2)
    figure.axes[0].set_ylabel("winner change, % of the base model's error")
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)


def report(file: Path, part: str, folder: Path) -> None:
    """Tables of every setting, and the two pictures."""
    rows = list(rows_of(file).values())
    if not rows:
        raise SystemExit(f"There are no runs in {file}. Make some with the command `run`.")
    folder.mkdir(parents=True, exist_ok=True)
    for pairs, push in dict.fromkeys((row["pairs"], row["push"]) for row in rows):
        print(
            f"\n{pairs.replace('_', '-')} pairs, {push}, {part} part\n\n{table(rows, part, pairs, push)}", flush=True
        )
    draw_front(rows, part, folder / "front.png")
    draw_levels(rows, part, SHOWN, folder / "front_levels.png")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--plan", choices=plans(), default="front", help="which runs to make")
    parser.add_argument("--file", type=Path, default=Path("bench_output/front.jsonl"), help="where rows are kept")
    parser.add_argument("--workers", type=int, default=2, help="processes, each with one thread")
    parser.add_argument("--part", choices=PARTS, default="selection", help="on which the report is")
    parser.add_argument("--folder", type=Path, default=Path("bench_output"), help="where the report's pictures go")
    options = parser.parse_args(arguments)
    if options.command == "run":
        make_all(plans()[options.plan], options.file, options.workers)
    else:
        report(options.file, options.part, options.folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

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
from front_trainers import TriedTrainer
from peft import LoraConfig
from transformers import PrinterCallback

from trl_diffusion_sdpo import DiffusionSDPOConfig
from trl_diffusion_sdpo.demo.oracle import oracle_score
from trl_diffusion_sdpo.demo.pairs import eval_pairs, off_policy_pairs, on_policy_pairs
from trl_diffusion_sdpo.demo.pipeline import LATENT_SHAPE, load_base_pipeline, sample_images
from trl_diffusion_sdpo.demo.world import IMAGE_SIZE, captions

LEVELS = 8
STEPS = {"stress": 200, "gentle": 100, "lora": 200, "dmpo": 200, "smallest": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "stress": {"learning_rate": 2e-4, "beta": 100.0},
    "gentle": {"learning_rate": 1e-4, "beta": 500.0},
    "lora": {"learning_rate": 1e-3, "beta": 100.0},
    "dmpo": {"loss_type": "dmpo", "learning_rate": 2e-4, "beta": 100.0},
    "smallest": {
        "learning_rate": 2e-4,
        "beta": 100.0,
        "per_device_train_batch_size": 2,
        "winner_budget_pairs": 2,
        "winner_budget_steps": 1,
    },
}
LORA_RANK = 16
PARTS = ("selection", "final")
PROBE_SEED, HELD_OUT_SEED, SCORE_SEED = 50_000, 30_000, 40_000  # apart from those of training
HELD_OUT_COPIES = 3  # each held-out pair is measured at this many draws of noise and timestep
SAMPLES_PER_PROMPT = 8
# Rows that were measured otherwise do not belong into one table.
HOW = {"held_out": HELD_OUT_SEED, "copies": HELD_OUT_COPIES, "score": SCORE_SEED, "samples": SAMPLES_PER_PROMPT}
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
DECAY = {"lr_scheduler_type": "cosine"}  # to 0 at the last step; without it the rate is constant after its warm-up
LONG, LONGER = {"max_steps": 400}, {"max_steps": 800}
FAST = {"learning_rate": 4e-4}
# The strength of each rule that the picture of noise levels shows.
SHOWN = {
    "SFT": 0.0,
    "output": 0.6,
    "output, range": 0.45,
    "output, decay": 0.8,
    "parameter, decay": 0.8,
    "parameter, decay, longer": 0.9,
}


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        rule (`str`): Name of the rule.
        strength (`float`): What is varied within it.
        settings (`dict[str, Any]`): Fields of `DiffusionSDPOConfig` that make it.
        seed (`int`): Of pairs, noise and samples.
        pairs (`str`): `"off_policy"` or `"on_policy"`, those of training; held-out pairs are drawn images in both.
        push (`str`): A name of `SETTINGS`: how hard, what trains and by which loss; all weights but under `"lora"`.
        tried (`dict[str, Any]`): Arguments of [`TriedTrainer`] that make it.
    """

    rule: str
    strength: float
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    pairs: str = "off_policy"
    push: str = "stress"
    tried: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.rule}|{self.strength:g}|{self.seed}|{self.pairs}|{self.push}"

    def is_made(self, row: dict[str, Any] | None) -> bool:
        """Whether a row is of this run, with the same settings and measured alike."""
        return row is not None and {**asdict(self), "how": HOW} == {
            name: row.get(name) for name in (*asdict(self), "how")
        }


def rule_settings(rule: str, strength: float) -> dict[str, Any]:
    """The configuration of a rule at one strength: a margin mu, a budget, or the weight of a term.

    A rule is named by what makes it, `"parameter, decay"` for instance.
    """
    none = {"safeguard": "none"}
    output = {"safeguard": "output", "safeguard_mu": strength}
    parameter = output | {"safeguard": "parameter"}
    settings = {
        "SFT": {"loss_type": "sft"},
        "DPO": none,
        "no safeguard": none,
        "output": output,
        "parameter": parameter,
        "budget": none | {"winner_budget": strength},
        # Tried, and not taken up: what makes them is in `tried_settings`.
        "winner error": none,
        "reference": none,
        "constant lambda": none,
        "fresh anchor": parameter | {"safeguard_anchor": "error"},
        "trust region": parameter | {"safeguard_mu": 0.6, "winner_budget": 1e6},
        "low pull": {},
        "relative": {},
        # Second parts of a name.
        "range": {"loser_noise_range": UPPER},
        "decay": DECAY,
        "long": LONG,
        "longer": LONGER,
        "fast": FAST,
        "pair": {"safeguard_granularity": "pair"},
        "weighted": {"safeguard_granularity": "weighted"},
        "bucket": {"safeguard_granularity": "bucket"},
        "error": {"safeguard_anchor": "error"},
        "AdamW": {"safeguard_metric": "adamw", "safeguard_anchor": "error"},
        "at mu 0.6": {"safeguard": "parameter", "safeguard_mu": 0.6},
        "in parameter space": {"safeguard": "parameter", "safeguard_mu": 0.1},
    }
    return {name: value for part in rule.split(", ") for name, value in settings[part].items()}


def tried_settings(rule: str, strength: float) -> dict[str, Any]:
    """What [`TriedTrainer`] takes for a rule; nothing for those of the package."""
    tried = {
        "winner error": {"winner_error": strength},
        "reference": {"reference_pull": strength},
        "constant lambda": {"loser_share": strength},
        "fresh anchor": {"fresh_anchor": True},
        "trust region": {"trust_region": strength},
    }.get(rule.split(", ")[0], {})
    if "low pull" in rule:  # the lowest two noise levels are held to the reference
        tried |= {"reference_pull": 1.0, "pull_below": 2 / LEVELS}
    return tried | ({"relative": True} if "relative" in rule else {})


def planned(rules: dict[str, tuple[float, ...]], seeds: range, **settings: str) -> list[Run]:
    return [
        Run(rule, strength, rule_settings(rule, strength), seed, tried=tried_settings(rule, strength), **settings)
        for seed in seeds
        for rule, strengths in rules.items()
        for strength in strengths
    ]


SEEDS = range(3)
# Each rule at three strengths.
FRONT: dict[str, tuple[float, ...]] = {
    "SFT": (0.0,),
    "output": (0.6, 0.45, 0.8),
    "SFT, decay": (0.0,),
    "parameter, decay": (0.6, 0.8, 0.9),
    "output, decay": (0.6, 0.7, 0.8),
    "output, range": (0.3, 0.45, 0.6),
    "parameter": (0.3, 0.6, 0.8),
    "DPO": (0.0,),
    "budget": (0.05, 0.1, 0.3),
    "budget, range": (0.05, 0.1, 0.3),
}
# With twice the steps.
TWICE: dict[str, tuple[float, ...]] = {
    "SFT, long": (0.0,),
    "SFT, decay, long": (0.0,),
    "output, long": (0.6,),
    "parameter, decay, long": (0.7, 0.8, 0.9),
}
# With four times the steps.
FOURFOLD: dict[str, tuple[float, ...]] = {
    "SFT, decay, longer": (0.0,),
    "output, longer": (0.6,),
    "parameter, decay, longer": (0.8, 0.9),
}
# Under other settings; with another loss than DPO's, plain is "no safeguard".
ELSEWHERE: dict[str, tuple[float, ...]] = {
    "SFT": (0.0,),
    "SFT, decay": (0.0,),
    "output": (0.6,),
    "parameter, decay": (0.6, 0.8),
    "DPO": (0.0,),
}
OF_ANOTHER_LOSS = {"no safeguard" if rule == "DPO" else rule: strengths for rule, strengths in ELSEWHERE.items()}
# For a look at whether everything runs.
SMALLEST: dict[str, tuple[float, ...]] = {
    "budget, range": (0.1,),
    "winner error, low pull, decay": (1.0,),
    "fresh anchor": (0.6,),
    "trust region": (0.1,),
}
# What was tried besides: the most promising, on all seeds.
CLOSEST: dict[str, tuple[float, ...]] = {
    "output, low pull, decay": (0.7, 0.8),
    "parameter, low pull, decay": (0.6, 0.7),
}
# And the rest, on one.
EXPLORED: dict[str, tuple[float, ...]] = {
    "winner error, decay": (0.3, 1.0, 3.0),
    "winner error, low pull, decay, long": (1.0,),
    "parameter, decay, fast": (0.8, 0.9),
    "parameter, low pull, decay, fast": (0.8,),
    "reference, at mu 0.6, decay": (0.3, 1.0),
    "constant lambda, decay": (0.3, 0.6),
    "constant lambda, range": (0.3,),
    "parameter, relative, decay": (0.6, 0.8),
    "reference, decay": (0.2, 1.0),
    "fresh anchor, decay": (0.6, 0.8),
    "trust region": (0.1,),
    "parameter, error, decay": (0.8,),
    "budget, decay": (0.05,),
    "output, pair, decay": (0.8,),
    "output, bucket, decay": (0.8,),
    "output, weighted": (0.6,),
    "output, pair": (0.6,),
    "output, bucket": (0.6,),
    "parameter, AdamW": (0.1,),
    "parameter, range": (0.3,),
    "budget, in parameter space": (0.1,),
}


def plans() -> dict[str, list[Run]]:
    """Named lists of runs."""
    on_policy = planned(ELSEWHERE, SEEDS, pairs="on_policy")
    gentle = planned(ELSEWHERE, SEEDS, push="gentle")
    return {
        "front": planned(FRONT, SEEDS),
        "twice": planned(TWICE, SEEDS),
        "fourfold": planned(FOURFOLD, SEEDS),
        "elsewhere": on_policy + gentle,
        "lora": planned(ELSEWHERE, SEEDS, push="lora"),
        "dmpo": planned(OF_ANOTHER_LOSS, SEEDS, push="dmpo"),
        "closest": planned(CLOSEST, SEEDS),
        "explore": planned(EXPLORED, range(1)),
        "smallest": planned(SMALLEST, range(1), push="smallest"),
    }


# ---- One run ------------------------------------------------------------------------------------------------------


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
            seed=run.seed,
            use_cpu=True,
            per_device_eval_batch_size=64,
            save_strategy="no",
            logging_steps=0.2,  # of all steps
            report_to="none",
            disable_tqdm=True,
            verify_images=False,
            dataloader_pin_memory=False,
            **{"max_steps": STEPS[run.push], **SHARED, **SETTINGS[run.push], **run.settings},
        )
        # The probe of a budget: pairs of its own, of all prompts.
        probe = eval_pairs(run.seed + PROBE_SEED, per_prompt=1)
        # SFT has no reference of its own; a copy serves the changes.
        reference = load_base_pipeline() if args.loss_type == "sft" else None
        adapter = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK) if run.push == "lora" else None
        trainer = TriedTrainer(pipeline, reference, args, train, probe, peft_config=adapter, **run.tried)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trained = time.monotonic() - started
        row: dict[str, Any] = {**asdict(run), "key": run.key, "how": HOW, "seconds": trained, "measured": {}}
        row["scale"] = [entry["safeguard/scale"] for entry in trainer.state.log_history if "safeguard/scale" in entry]
        row["budget"] = [entry["budget/scale"] for entry in trainer.state.log_history if "budget/scale" in entry]
        smallest = run.push == "smallest"
        for part, pairs in held_out(run.seed, smallest=smallest).items():
            metrics = trainer.evaluate(pairs)
            scores = {"raw": judged(pipeline, part, run.seed, smallest=smallest)}
            with trainer.average.active(trainer.model):  # an averaged adapter takes the trained one's place
                averaged = pipeline
                if adapter is None:
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
    """A run's row; of one that ended in an error, what it said, so that the others go on."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    try:
        return make(run)
    except Exception as error:
        return {"key": run.key, "error": f"{type(error).__name__}: {error}"}


def make_all(runs: list[Run], file: Path, workers: int) -> None:
    """Make the runs that the file lacks, and append a row for each as soon as it is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    there = rows_of(file)
    missing = [run for run in runs if not run.is_made(there.get(run.key))]
    print(f"{len(runs)} runs, {len(missing)} to make", flush=True)
    started, failed = time.monotonic(), []
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=20) as pool:
        for done, row in enumerate(pool.imap_unordered(work, missing), 1):
            if "error" in row:
                failed.append(row["key"])
                print(f"{done}/{len(missing)} {row['key']} FAILED: {row['error']}", flush=True)
                continue
            with file.open("a", encoding="utf-8") as out:
                out.write(("" if ends_whole(file) else "\n") + json.dumps(row) + "\n")
            raw = row["measured"]["selection"]["raw"]
            passed = time.monotonic() - started
            print(
                f"{done}/{len(missing)} {row['key']}: oracle {raw['oracle']:.3f}, winner {raw['winner']:+.4f}, "
                f"{passed / done * (len(missing) - done) / 60:.0f} min to go",
                flush=True,
            )
    if failed:
        raise SystemExit(f"{len(failed)} of {len(missing)} runs failed and have no row: {', '.join(failed)}.")


# ---- Report -------------------------------------------------------------------------------------------------------

COLORS = {
    "SFT": "#555555",
    "output": "#2471a3",
    "output, range": "#1e8449",
    "parameter": "#c0392b",
    "budget": "#8e44ad",
    "budget, range": "#d68910",
}


@dataclass(frozen=True)
class Point:
    """Runs of one rule and strength over seeds, measured on one part with one kind of weights."""

    rule: str
    strength: float
    seeds: tuple[int, ...]
    oracle: np.ndarray
    winner: np.ndarray
    levels: np.ndarray  # (seeds, levels), relative

    @property
    def worst(self) -> np.ndarray:
        """Largest relative change over the noise levels, of each seed."""
        return np.nanmax(self.levels, axis=1)

    def over(self, other: "Point | None") -> str:
        """How much further than under another rule the winners' error has risen, in points of the base model's error,
        at the level where that is most; means over the seeds that both have."""
        common = set(self.seeds) & set(other.seeds) if other else set()
        if not common:
            return ""
        mine, theirs = (point.levels[[seed in common for seed in point.seeds]].mean(0) for point in (self, other))
        return f"{100 * np.nanmax(mine - theirs):+.0f}"


def points(rows: list[dict[str, Any]], part: str, weights: str, pairs: str, push: str) -> list[Point]:
    """All rules and strengths under one setting, in the order of the rules."""
    kept = [row for row in rows if (row["pairs"], row["push"]) == (pairs, push)]
    found = []
    for rule, strength in dict.fromkeys((row["rule"], row["strength"]) for row in kept):
        runs = [row for row in kept if (row["rule"], row["strength"]) == (rule, strength)]
        mine, seeds = [row["measured"][part][weights] for row in runs], tuple(row["seed"] for row in runs)
        levels = np.array([[np.nan if x is None else x for x in one["winner_levels"]] for one in mine])
        oracle, winner = (np.array([one[name] for one in mine]) for name in ("oracle", "winner"))
        found.append(Point(rule, strength, seeds, oracle, winner, levels))
    return sorted(found, key=lambda point: (point.rule, point.strength))


def tables(rows: list[dict[str, Any]], part: str, pairs: str, push: str) -> str:
    """Markdown: reward, winner change, the largest relative change over the noise levels, and by how much it exceeds
    that of supervised tuning where that is most: of plain supervised tuning, and of that with the rule's own steps and
    schedule. Raw weights, and averaged ones."""
    head = (
        "| rule | strength | seeds | oracle | winner change | worst level | over SFT | over SFT alike "
        "| oracle, EMA | winner change, EMA | worst level, EMA |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    planned_rules, tried = [head], [head]
    found = {weights: points(rows, part, weights, pairs, push) for weights in ("raw", "ema")}
    tuned = {point.rule: point for point in found["raw"] if point.rule.split(", ")[0] == "SFT"}
    for raw, ema in zip(*found.values(), strict=True):
        alike = ", ".join(["SFT", *(name for name in raw.rule.split(", ") if name in ("decay", "long", "longer"))])
        cells = [raw.rule, f"{raw.strength:g}" if raw.strength else "", str(len(raw.seeds)), *measures(raw)]
        cells += [raw.over(tuned.get("SFT")), raw.over(tuned.get(alike)), *measures(ema)]
        table = planned_rules if raw.rule in {*FRONT, *TWICE, *FOURFOLD, *OF_ANOTHER_LOSS} else tried
        table.append("| " + " | ".join(cells) + " |")
    title = f"{pairs.replace('_', '-')} pairs, {push}, {part} part"
    shown = ((title, planned_rules), (f"{title}, tried besides", tried))
    return "\n\n".join(f"{name}\n\n" + "\n".join(lines) for name, lines in shown if len(lines) > 1)


def measures(point: Point) -> list[str]:
    worst = f"{100 * point.worst.mean():+.0f}%"
    return [spread(point.oracle, "{:.3f}"), spread(point.winner, "{:+.4f}"), worst]


def deviation(values: np.ndarray) -> float:
    """Standard deviation over seeds; 0 of one."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def spread(values: np.ndarray, form: str) -> str:
    """Mean, and with several seeds the standard deviation."""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(values.mean())} ± {form.format(values.std(ddof=1)).lstrip('+')}"


def look(rule: str) -> dict[str, str]:
    """Colour by what the rule does to the losers, line by the schedule, marker by the number of steps."""
    first, *more = rule.split(", ")
    lasting = [name for name in more if name in ("long", "longer")]
    kind = ", ".join([first, *(name for name in more if name not in ("decay", *lasting))])
    style = ":" if lasting else "--" if "decay" in more else "-"
    marker = {"long": "s", "longer": "^"}[lasting[0]] if lasting else "o"
    return {"color": COLORS[kind], "linestyle": style, "marker": marker}


def draw_front(rows: list[dict[str, Any]], part: str, file: Path) -> None:
    """Reward against what the winners paid: the mean, and the worst noise level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9.6), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True)
    for row, weights in enumerate(("raw", "ema")):
        # Plain DPO would take nine tenths of every axis: the table has it, as it has what was tried on one seed.
        shown = [point for point in points(rows, part, weights, "off_policy", "stress") if in_picture(point.rule)]
        for column, paid in enumerate(("winner", "worst")):
            ax = axes[row][column]
            for rule in dict.fromkeys(point.rule for point in shown):
                mine = [point for point in shown if point.rule == rule]
                x, y = ([getattr(p, name).mean() for p in mine] for name in (paid, "oracle"))
                spreads = [[deviation(getattr(p, name)) for p in mine] for name in (paid, "oracle")]
                drawn = look(rule) | {"capsize": 2, "alpha": 0.8, "label": rule}
                ax.errorbar(x, y, xerr=spreads[0], yerr=spreads[1], **drawn)
                for point, at in zip(mine, zip(x, y, strict=True), strict=True):
                    if point.strength:
                        ax.annotate(f"{point.strength:g}", at, xytext=(4, 4), textcoords="offset points", fontsize=7)
            ax.set_xscale("symlog", linthresh=0.003 if paid == "winner" else 0.1)
            ax.set_xlabel("winner change, mean" if paid == "winner" else "winner change, worst noise level, relative")
            ax.set_title("raw weights" if weights == "raw" else f"averaged weights (EMA {EMA_DECAY})")
            ax.axvline(0, color="black", linewidth=0.6)
            ax.grid(alpha=0.2)
        axes[row][0].set_ylabel("oracle score")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.savefig(file, dpi=110)


def in_picture(rule: str) -> bool:
    return rule != "DPO" and rule in {*FRONT, *TWICE, *FOURFOLD}


def draw_levels(rows: list[dict[str, Any]], part: str, strengths: dict[str, float], file: Path) -> None:
    """Relative winner change by noise level, one strength of each rule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    for ax, weights in zip(figure.subplots(1, 2, sharey=True), ("raw", "ema"), strict=True):
        shown = points(rows, part, weights, "off_policy", "stress")
        middles = (np.arange(LEVELS) + 0.5) / LEVELS
        for point in shown:
            if strengths.get(point.rule) != point.strength:
                continue
            label = f"{point.rule} {point.strength:g}" if point.strength else point.rule
            mean, sd = 100 * point.levels.mean(0), 100 * np.apply_along_axis(deviation, 0, point.levels)
            ax.plot(middles, mean, label=label, **look(point.rule))
            ax.fill_between(middles, mean - sd, mean + sd, color=look(point.rule)["color"], alpha=0.12)
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set(xlabel="noise level (share of noise)", title="raw weights" if weights == "raw" else "averaged weights")
        ax.set_yscale("symlog", linthresh=10)
        ax.grid(alpha=0.2)
    figure.axes[0].set_ylabel("winner change, % of the base model's error")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    figure.savefig(file, dpi=110)


def report(file: Path, part: str, folder: Path) -> None:
    """Tables of every setting, and the two pictures."""
    rows = list(rows_of(file).values())
    if not rows:
        raise SystemExit(f"There are no runs in {file}. Make some with the command `run`.")
    other = [row["key"] for row in rows if row.get("how") != HOW]
    if other:
        raise SystemExit(
            f"All rows must be measured alike; {len(other)} in {file} were not: {other[0]}. Make them anew."
        )
    runs = {run.key: run for planned_runs in plans().values() for run in planned_runs}
    strange = [row["key"] for row in rows if not (row["key"] in runs and runs[row["key"]].is_made(row))]
    if strange:
        print(f"Left out, as no plan makes them: {', '.join(strange)}.")
        rows = [row for row in rows if row["key"] not in strange]
    folder.mkdir(parents=True, exist_ok=True)
    for pairs, push in dict.fromkeys((row["pairs"], row["push"]) for row in rows):
        print(f"\n{tables(rows, part, pairs, push)}", flush=True)
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

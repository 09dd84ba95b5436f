"""The front of reward against damage: what rules for the loser's gradient gain, and what they cost the winners.

Every run tunes the demo's model of the embedded world on its pairs, by the public trainer, and is measured twice, with
its raw weights and with their average: the oracle's score of samples, and the change of the winners' and losers'
errors on held-out pairs, in all and at each noise level. Prompts and held-out pairs come in two parts: rules and
strengths are chosen on one, and the table of the other is made once.

Runs are rows of a JSON-lines file. A second call makes those that are missing; several processes share the work.

    python benchmarks/front.py run --plan explore --workers 2
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
STEPS = {"stress": 200, "gentle": 100}
SETTINGS = {"stress": {"learning_rate": 2e-4, "beta": 100.0}, "gentle": {"learning_rate": 1e-4, "beta": 500.0}}
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
UPPER = [0.62, 1.0]  # noise levels of timesteps 500 and above


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
        "budget, parameter": budget | {"safeguard": "parameter", "safeguard_mu": 0.1},
    }[rule]


def planned(rules: dict[str, tuple[float, ...]], seeds: range, **settings: str) -> list[Run]:
    return [
        Run(rule, strength, rule_settings(rule, strength), seed, **settings)
        for seed in seeds
        for rule, strengths in rules.items()
        for strength in strengths
    ]


EXPLORED: dict[str, tuple[float, ...]] = {
    "budget": (0.1, 0.3),
    "output": (0.6,),
    "output, range": (0.45,),
    "budget, range": (0.1,),
    "budget, output": (0.1, 0.3),
    "parameter": (0.3,),
    "SFT": (0.0,),
    "budget, bucket": (0.1,),
    "budget, parameter": (0.1,),
    "output, bucket": (0.6,),
}


def plans() -> dict[str, list[Run]]:
    """Named lists of runs."""
    return {"explore": planned(EXPLORED, range(1))}


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


def held_out(seed: int) -> dict[str, Dataset]:
    """Held-out pairs of each part's prompts, several times over."""
    pairs = eval_pairs(seed + HELD_OUT_SEED, per_prompt=4)
    found = {}
    for part, prompts in parts_of_prompts().items():
        rows = [row for row, prompt in enumerate(pairs["prompt"]) if prompt in set(prompts)]
        found[part] = concatenate_datasets([pairs.select(rows)] * HELD_OUT_COPIES)
    return found


def judged(pipeline: Any, part: str, seed: int) -> float:
    """The oracle's mean score of samples for a part's prompts, from equal latents for every run of a seed."""
    prompts = [prompt for prompt in parts_of_prompts()[part] for _ in range(SAMPLES_PER_PROMPT)]
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
            logging_steps=STEPS[run.push] // 5,
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
        for part, pairs in held_out(run.seed).items():
            metrics = trainer.evaluate(pairs)
            scores = {"raw": judged(pipeline, part, run.seed)}
            averaged = load_base_pipeline()
            averaged.register_modules(unet=trainer.average.kept.module)
            scores["ema"] = judged(averaged, part, run.seed)
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
                out.write(json.dumps(row) + "\n")
            raw = row["measured"]["selection"]["raw"]
            passed = time.monotonic() - started
            print(
                f"{done}/{len(missing)} {row['key']}: oracle {raw['oracle']:.3f}, winner {raw['winner']:+.4f}, "
                f"{passed / done * (len(missing) - done) / 60:.0f} min to go",
                flush=True,
            )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run"])
    parser.add_argument("--plan", choices=plans(), default="explore")
    parser.add_argument("--file", type=Path, default=Path("bench_output/front.jsonl"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    make_all(plans()[options.plan], options.file, options.workers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

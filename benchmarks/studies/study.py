"""Train the rows of a plan on the embedded world, measure them all the same way, and print a table.

A plan is a YAML file beside this script. Each of its rows is trained once for each seed from the demo's base model, or
samples the weights of another row with preference guidance. Measured are the oracle's score of generated images, their
diversity and Frechet distance from the world's drawings, without classifier-free guidance and at the best scale, and
the change of the errors on held-out pairs. The best scale is chosen on one half of the prompts; all numbers are of the
other half. Finished rows are kept in a JSON-lines file, so a second call makes the missing ones only.

    python benchmarks/studies/study.py methods
    python benchmarks/studies/study.py methods --rows base sigmoid --seeds 8
    python benchmarks/studies/study.py methods --report
"""

import argparse
import contextlib
import functools
import json
import logging
import re
import statistics
import tempfile
import warnings
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from datasets import Dataset, concatenate_datasets
from diffusers.utils import logging as diffusers_logging
from image_measures import ImageMeter
from pair_kinds import corner_changes, pairs_of_kind
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer, preference_guidance
from trl_diffusion_sdpo.tools.demo.oracle import oracle
from trl_diffusion_sdpo.tools.demo.pairs import eval_pairs
from trl_diffusion_sdpo.tools.demo.pipeline import LATENT_SHAPE, generate_images, load_base_pipeline
from trl_diffusion_sdpo.tools.demo.world import IMAGE_SIZE, captions
from trl_diffusion_sdpo.tools.guidance.guide import Form

HERE = Path(__file__).parent
BASE = "base"  # the row that is not trained
# Offsets of the seed, so that held-out pairs and initial noise differ from those of training.
HELD_OUT_SEED = 30_000
HELD_OUT_COPIES = 3  # draws of noise and timestep for each held-out pair
IMAGE_SEEDS = {"selection": 90_000, "final": 100_000}
# What a row may have beside fields of `DiffusionSDPOConfig`.
ROW_KEYS = ("of", "guidance", "reference", "weights_scale", "lora_rank", "averaged", "pairs", "masked")
OWN_PAIRS = 216  # held-out pairs of a row's own kind, at most


def load_plan(name: str) -> dict[str, Any]:
    """Read a plan by its name or path."""
    file = Path(name) if name.endswith(".yaml") else HERE / f"{name}.yaml"
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in HERE.glob("*.yaml")))
        raise ValueError(f"There is no plan {name!r}. The plans are {names}.")
    plan = yaml.safe_load(file.read_text(encoding="utf-8"))
    for row, settings in plan["rows"].items():
        for key in ("of", "reference"):
            if settings.get(key, BASE) not in (*plan["rows"], BASE):
                raise ValueError(f"`{key}` of row {row!r} must be another row, got {settings[key]!r}.")
        form = settings.get("guidance", {}).get("form", "conditional")
        if form not in get_args(Form):
            raise ValueError(f"`form` of row {row!r} must be one of {', '.join(get_args(Form))}, got {form!r}.")
    return plan


class Study:
    """One plan, with the weights of its trained rows in a folder."""

    def __init__(self, plan: dict[str, Any], weights: Path):
        self.plan = plan
        self.weights = weights
        texts = [caption.text for caption in captions()]
        shown = slice(None, plan.get("prompts"))
        self.prompts = {"selection": texts[::2][shown], "final": texts[1::2][shown]}

    def measure(self, name: str, seed: int) -> dict[str, Any]:
        """Train a row if it must be trained, and return its measurements."""
        settings = self.plan["rows"][name]
        source = settings.get("of", name)
        pipeline = load_base_pipeline()
        if source != BASE:
            kind = "averaged" if settings.get("averaged") else "trained"
            tuned = self.trained(source, seed, kind)
            scale = settings.get("weights_scale", 1.0)
            base = pipeline.unet.state_dict()
            pipeline.unet.load_state_dict({key: torch.lerp(base[key], tuned[key], scale) for key in base})
        context = self.guidance(settings, seed)
        best = self.scales[0]
        if len(self.scales) > 1:
            scores = {
                scale: self.images(pipeline, "selection", seed, scale, context)["score"] for scale in self.scales
            }
            best = max(scores, key=scores.__getitem__)
        measured = {
            "plain": self.images(pipeline, "final", seed, 1.0, context),
            "best": {"scale": best, **self.images(pipeline, "final", seed, best, context)},
            "errors": self.errors(pipeline, seed, self.held_out(seed)),
        }
        if self.plan.get("own_errors"):
            measured["own_errors"] = self.errors(pipeline, seed, self.held_out(seed, settings))
        return measured

    @property
    def scales(self) -> list[float]:
        """Scales of classifier-free guidance from which each row's best is chosen; 1 is none."""
        return self.plan.get("guidance_scales", [1.0, 2.0, 3.0, 5.0])

    # ---- Training -------------------------------------------------------------------------------------------------

    def trained(self, name: str, seed: int, kind: str) -> dict[str, torch.Tensor]:
        """Return the weights of a row, which is trained first if it was not."""
        folder = self.weights / re.sub(r"\W+", "_", f"{name}_{seed}")
        if not (folder / "trained.safetensors").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as output:
                trainer = self.trainer(self.plan["rows"][name], seed, output)
                trainer.train()
                if trainer.average is not None:
                    with trainer.average.active(trainer.denoiser) as averaged:
                        save_file(merged(averaged), folder / "averaged.safetensors")
                save_file(merged(trainer.denoiser), folder / "trained.safetensors")
        return load_file(folder / f"{kind}.safetensors")

    def trainer(self, row: dict[str, Any], seed: int, output: str) -> DiffusionSDPOTrainer:
        """Build the trainer of a row."""
        pipeline = load_base_pipeline()
        own = {key: value for key, value in row.items() if key not in ROW_KEYS}
        pairs = self.pairs(row, seed, self.plan.get("per_prompt", 14))
        pairs = pairs.select(range(min(len(pairs), self.plan.get("max_pairs", len(pairs)))))
        args = self.arguments(seed, output, **{**self.plan["shared"], **own})
        rank = row.get("lora_rank")
        adapter = None if rank is None else LoraConfig(r=rank, lora_alpha=rank)
        trainer = DiffusionSDPOTrainer(pipeline, None, args, pairs, peft_config=adapter)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def pairs(self, row: dict[str, Any], seed: int, per_prompt: int) -> Dataset:
        """Return the pairs of a row. Unless its `masked` is false, they have the masks of their kind."""
        pairs = made_pairs(row.get("pairs", self.plan["pairs"]), seed, per_prompt)
        return pairs if row.get("masked", True) or "mask" not in pairs.column_names else pairs.remove_columns("mask")

    def held_out(self, seed: int, row: dict[str, Any] | None = None) -> Dataset:
        """Return held-out pairs of the final prompts: off-policy ones, or of the kind of a row, without masks."""
        seed += HELD_OUT_SEED
        if row is None:
            pairs = eval_pairs(seed, per_prompt=4)
        else:
            pairs = self.pairs({**row, "masked": False}, seed, self.plan.get("per_prompt", 14))
        final = set(self.prompts["final"])
        pairs = pairs.select([index for index, prompt in enumerate(pairs["prompt"]) if prompt in final])
        return pairs if row is None else pairs.select(range(min(len(pairs), OWN_PAIRS)))

    @staticmethod
    def arguments(seed: int, output: str, **settings: Any) -> DiffusionSDPOConfig:
        fixed = {
            "resolution": IMAGE_SIZE,
            "per_device_eval_batch_size": 64,
            "use_cpu": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "verify_images": "none",
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": False,
        }
        return DiffusionSDPOConfig(output, seed=seed, **{**fixed, **settings})

    # ---- Measuring ------------------------------------------------------------------------------------------------

    def guidance(self, row: dict[str, Any], seed: int) -> Any:
        """Return the context in which a row's pipeline generates: preference guidance, if the row asks for it."""
        if "guidance" not in row:
            return contextlib.nullcontext
        reference = load_base_pipeline().unet
        if row.get("reference", BASE) != BASE:
            reference.load_state_dict(self.trained(row["reference"], seed, "trained"))
        return functools.partial(preference_guidance, reference=reference, **row["guidance"])

    def images(self, pipeline: Any, part: str, seed: int, scale: float, context: Any) -> dict[str, float]:
        """Score the images of a half of the prompts; of the final half, measure them too."""
        prompts = [prompt for prompt in self.prompts[part] for _ in range(self.plan["images_per_prompt"][part])]
        generator = torch.Generator().manual_seed(IMAGE_SEEDS[part] + seed)
        latents = torch.randn(len(prompts), *LATENT_SHAPE, generator=generator)
        with torch.no_grad():
            images = generate_images(pipeline, prompts, latents, guidance_scale=scale, context=context)
        measured = {"score": float(oracle(images, prompts).double().mean())}
        if part == "selection":
            return measured
        if self.plan.get("corner"):
            with torch.no_grad():
                before = generate_images(load_base_pipeline(), prompts, latents, guidance_scale=scale)
            measured |= corner_changes(images, before)
        return {**measured, **asdict(meter(tuple(prompts))(images))}

    def errors(self, pipeline: Any, seed: int, pairs: Dataset) -> dict[str, float]:
        """Return the changes of the errors on held-out pairs, against the base model."""
        pairs = concatenate_datasets([pairs] * HELD_OUT_COPIES)
        with tempfile.TemporaryDirectory() as output:
            args = self.arguments(seed, output, safeguard="none")
            trainer = DiffusionSDPOTrainer(pipeline, load_base_pipeline(), args, pairs, pairs)
            trainer.remove_callback(PrinterCallback)
            metrics = trainer.evaluate()
        return {
            name.removeprefix("eval_errors/"): value
            for name, value in metrics.items()
            if name.startswith(("eval_errors/winner_change", "eval_errors/loser_change", "eval_errors/accuracy"))
        }


@functools.cache
def made_pairs(kind: str, seed: int, per_prompt: int) -> Dataset:
    """Return pairs of a kind by the base model. Some kinds take seconds."""
    return pairs_of_kind(kind, load_base_pipeline(), seed, per_prompt)


@functools.cache
def meter(prompts: tuple[str, ...]) -> ImageMeter:
    """Return the meter of images of these prompts; fitting one takes seconds."""
    return ImageMeter(prompts)


def merged(denoiser: Any) -> dict[str, torch.Tensor]:
    """Return a denoiser's weights, with its LoRA merged into them."""
    if getattr(denoiser, "peft_config", None):
        denoiser.fuse_lora()
        denoiser.unload_lora()
    # The trainer averages a wrapper around the denoiser.
    tensors = {name.removeprefix("denoiser."): tensor for name, tensor in denoiser.state_dict().items()}
    return {name: tensor.detach().float().contiguous().clone() for name, tensor in tensors.items()}


# ---- Rows and table ------------------------------------------------------------------------------------------------


def read_rows(file: Path) -> dict[str, dict[str, Any]]:
    """Read finished rows by their keys; the line that a kill cut short is skipped."""
    rows = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows[row["key"]] = row
    return rows


def is_current(plan: dict[str, Any], name: str, row: dict[str, Any] | None) -> bool:
    """Return whether a finished row was made with the plan's settings of today."""
    return row is not None and row["settings"] == plan["rows"][name] and row["shared"] == protocol(plan)


def protocol(plan: dict[str, Any]) -> dict[str, Any]:
    """Return what all rows of a plan share."""
    return {key: value for key, value in plan.items() if key not in ("about", "rows", "seeds")}


def run(plan: dict[str, Any], names: list[str], seeds: list[int], file: Path, weights: Path) -> None:
    """Measure what is missing, and append each row when it is finished."""
    study = Study(plan, weights)
    file.parent.mkdir(parents=True, exist_ok=True)
    made = read_rows(file)
    wanted = [(name, seed) for seed in seeds for name in names]
    missing = [(name, seed) for name, seed in wanted if not is_current(plan, name, made.get(f"{name}|{seed}"))]
    for name, seed in tqdm(missing, unit="row"):
        facts = {"key": f"{name}|{seed}", "name": name, "seed": seed, "settings": plan["rows"][name]}
        row = {**facts, "shared": protocol(plan), **study.measure(name, seed)}
        with file.open("a", encoding="utf-8") as out:
            out.write("\n" + json.dumps(row) + "\n")
        winner = row["errors"]["winner_change"]
        tqdm.write(f"{row['key']}: {row['best']['score']:.3f} at {row['best']['scale']:g}, winners {winner:+.4f}")


def table(plan: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    """Return the means over seeds as a Markdown table, best score first."""
    by_name = defaultdict(list)
    for row in rows.values():
        if row["name"] in plan["rows"] and is_current(plan, row["name"], row):
            by_name[row["name"]].append(row)
    extra = extra_columns(plan)
    columns = ["row", "seeds", "score", "score at best guidance", "diversity", "Frechet", "winners' error"]
    columns += ["losers' error", *extra]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, made in sorted(by_name.items(), key=lambda item: -mean(item[1], "best", "score")):
        best = [row["best"]["score"] for row in made]
        spread = f" ± {statistics.stdev(best):.3f}" if len(best) > 1 else ""
        scales = ", ".join(sorted({f"{row['best']['scale']:g}" for row in made}))
        cells = [
            f"{name} | {len(made)} | {mean(made, 'plain', 'score'):.3f}",
            f"{statistics.mean(best):.3f}{spread} ({scales})",
            f"{mean(made, 'best', 'diversity'):.3f} | {mean(made, 'best', 'frechet'):.3f}",
            f"{mean(made, 'errors', 'winner_change'):+.4f} | {mean(made, 'errors', 'loser_change'):+.4f}",
            *(f"{mean(made, *place):.3g}" for place in extra.values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def extra_columns(plan: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the columns that only some plans have, with the places of their numbers in a finished row."""
    if plan.get("corner"):
        return {"red": ("plain", "red"), "outside": ("plain", "outside")}
    if plan.get("own_errors"):
        return {
            "winners, share": ("errors", "winner_change_relative"),
            "own winners, share": ("own_errors", "winner_change_relative"),
            "own accuracy": ("own_errors", "accuracy"),
        }
    return {}


def mean(rows: list[dict[str, Any]], part: str, name: str) -> float:
    return statistics.mean(row[part][name] for row in rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="name of a plan beside this script, or the path of a YAML file")
    parser.add_argument("--rows", nargs="+", help="these rows only")
    parser.add_argument("--seeds", nargs="+", type=int, help="these seeds only, such as in a second process")
    parser.add_argument("--file", type=Path, help="file of the finished rows; bench_output/PLAN.jsonl if unset")
    parser.add_argument("--report", action="store_true", help="print the table of the finished rows, train nothing")
    options = parser.parse_args(arguments)
    try:
        plan = load_plan(options.plan)
    except ValueError as error:
        parser.error(str(error))
    unknown = set(options.rows or ()) - set(plan["rows"])
    if unknown:
        parser.error(f"the plan has no rows {', '.join(sorted(unknown))}")
    file = options.file or Path(f"bench_output/{Path(options.plan).stem}.jsonl")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    logging.getLogger("trl_diffusion_sdpo").setLevel(logging.ERROR)
    if not options.report:
        run(plan, options.rows or list(plan["rows"]), options.seeds or plan["seeds"], file, file.with_suffix(""))
    print(table(plan, read_rows(file)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

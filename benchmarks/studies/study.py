"""Train the rows of a plan on the embedded world, measure them all the same way, and print a table.

A plan is a YAML file beside this script. Each of its rows is trained once for each seed from the world's base model, or
samples the weights of another row with preference guidance. Measured are the oracle's score of generated images, their
diversity and Frechet distance from the world's drawings, without classifier-free guidance and at the best scale, and
the change of the errors on held-out pairs, off-policy ones and those of the row's own kind. The best scale is chosen on
one half of the prompts; all numbers are of the other half. Finished rows are kept in results/PLAN.jsonl, and trained
weights in bench_output, so a second call makes the missing rows only. A row of other settings or another base model is
made again; one of other versions is kept, and named.

    python benchmarks/studies/study.py rules
    python benchmarks/studies/study.py rules --rows base "off_policy, DPO" --seeds 0
    python benchmarks/studies/study.py rules --report
"""

import argparse
import contextlib
import functools
import hashlib
import json
import logging
import statistics
import sys
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
from pair_kinds import corner_changes, pairs_of_kind, single_images
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tables import accuracy, diversity, frechet, markdown, number, plain, score, share
from tqdm.auto import tqdm
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer, preference_guidance
from trl_diffusion_sdpo.data.data_report import evenly_spaced
from trl_diffusion_sdpo.tools.demo import pipeline as small_unet
from trl_diffusion_sdpo.tools.demo.oracle import oracle
from trl_diffusion_sdpo.tools.demo.pairs import eval_pairs
from trl_diffusion_sdpo.tools.demo.world import IMAGE_SIZE, captions
from trl_diffusion_sdpo.tools.guidance.guide import Form
from trl_diffusion_sdpo.utils.identity import describe_pipeline, describe_software, differences, listed, short_hash

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))  # the benchmarks, which share `constant_lambda`
BASE = "base"  # the row that is not trained
# Offsets of the seed, so that held-out pairs and initial noise differ from those of training.
HELD_OUT_SEED = 30_000
HELD_OUT_COPIES = 3  # draws of noise and timestep for each held-out pair
IMAGE_SEEDS = {"selection": 90_000, "final": 100_000}
# What a row may have beside fields of `DiffusionSDPOConfig`: first what its training depends on.
TRAINING_KEYS = ("lora_rank", "pairs", "masked", "constant_lambda", "online", "rounds", "single_images", "pairs_used")
SAMPLING_KEYS = ("of", "guidance", "reference", "weights_scale", "classifier")
OWN_PER_PROMPT = 4  # held-out pairs of a row's own kind for each prompt


def load_plan(name: str) -> dict[str, Any]:
    """Read a plan by its name or path. With `kinds`, each row is made once for each kind of pairs."""
    file = Path(name) if name.endswith(".yaml") else HERE / f"{name}.yaml"
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in HERE.glob("*.yaml")))
        raise ValueError(f"There is no plan {name!r}. The plans are {names}.")
    plan = yaml.safe_load(file.read_text(encoding="utf-8"))
    if "kinds" in plan:
        rows = plan["rows"].items()
        named = {f"{kind}, {row}": {"pairs": kind, **settings} for kind in plan["kinds"] for row, settings in rows}
        plan["rows"] = {BASE: {}, **named, **plan.get("more_rows", {})}
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
        self.model = small_unet
        if plan.get("model", "unet") == "transformer":
            import small_transformer

            self.model = small_transformer
        texts = [caption.text for caption in captions()]
        shown = slice(None, plan.get("prompts"))
        self.prompts = {"selection": texts[::2][shown], "final": texts[1::2][shown]}

    def measure(self, name: str, seed: int) -> dict[str, Any]:
        """Train a row if it must be trained, and return its measurements."""
        settings = self.plan["rows"][name]
        source = settings.get("of", name)
        pipeline = self.load_base()
        if source != BASE:
            tuned = self.trained(source, seed)
            scale = settings.get("weights_scale", 1.0)
            base = denoiser_of(pipeline).state_dict()
            denoiser_of(pipeline).load_state_dict({key: torch.lerp(base[key], tuned[key], scale) for key in base})
        context = self.guidance(settings, seed)
        scores = {scale: self.images(pipeline, "selection", seed, scale, context)["score"] for scale in self.scales}
        best = max(scores, key=scores.__getitem__)
        errors = self.errors(pipeline, seed, self.held_out(seed))
        own = errors
        if settings.get("pairs", "off_policy") != "off_policy":
            own = self.errors(pipeline, seed, self.held_out(seed, settings))
        return {
            "plain": self.images(pipeline, "final", seed, 1.0, context),
            "best": {"scale": best, **self.images(pipeline, "final", seed, best, context)},
            "errors": errors,
            "own_errors": own,
        }

    @property
    def scales(self) -> list[float]:
        """Scales of classifier-free guidance from which each row's best is chosen; 1 is none."""
        return self.plan.get("guidance_scales", [1.0, 2.0, 3.0, 5.0])

    @functools.cached_property
    def made_with(self) -> dict[str, Any]:
        """What the rows depend on beside their settings: the base model and the versions of libraries."""
        return {"base": short_hash(describe_pipeline(self.load_base())), "software": describe_software()}

    def load_base(self) -> Any:
        """Return the pipeline from which every row starts."""
        load = small_unet.load_base_pipeline if self.model is small_unet else self.model.load_base
        return load()

    # ---- Training -------------------------------------------------------------------------------------------------

    def trained(self, name: str, seed: int) -> dict[str, torch.Tensor]:
        """Return the weights of a row, which is trained first if no plan has trained these settings."""
        row = {key: value for key, value in self.plan["rows"][name].items() if key not in SAMPLING_KEYS}
        shared = {key: self.plan.get(key) for key in ("model", "pairs", "per_prompt", "max_pairs", "shared")}
        shared |= {key: self.plan[key] for key in ("train_prompts",) if key in self.plan}
        facts = json.dumps([row, shared, seed, self.made_with["base"]], sort_keys=True)
        folder = self.weights / hashlib.sha256(facts.encode()).hexdigest()[:16]
        if not (folder / "trained.safetensors").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "settings.json").write_text(facts, encoding="utf-8")
            with tempfile.TemporaryDirectory() as output:
                save_file(merged(self.train(row, seed, output)), folder / "unfinished.safetensors")
            (folder / "unfinished.safetensors").rename(folder / "trained.safetensors")
        return load_file(folder / "trained.safetensors")

    def train(self, row: dict[str, Any], seed: int, output: str) -> torch.nn.Module:
        """Train a row and return its denoiser."""
        trainer = self.trainer(row, seed, output)
        trainer.train()
        return trainer.denoiser

    def trainer(
        self, row: dict[str, Any], seed: int, output: str, pipeline: Any = None, pairs: Dataset | None = None
    ) -> DiffusionSDPOTrainer:
        """Build the trainer of a row, which starts from a pipeline, by default the base."""
        own = {key: value for key, value in row.items() if key not in (*TRAINING_KEYS, *SAMPLING_KEYS)}
        if pairs is None:
            pairs = self.pairs(row, seed, self.plan.get("per_prompt", 14))
            pairs = self.only(self.plan["train_prompts"], pairs) if "train_prompts" in self.plan else pairs
            pairs = pairs.select(range(min(len(pairs), self.plan.get("max_pairs", len(pairs)))))
            pairs = pairs.select(evenly_spaced(len(pairs), row.get("pairs_used", len(pairs))))
        if row.get("single_images"):
            pairs = single_images(pairs)
        args = self.arguments(seed, output, **{**self.plan["shared"], **own})
        rank = row.get("lora_rank")
        adapter = None if rank is None else LoraConfig(r=rank, lora_alpha=rank)
        trainer_class = DiffusionSDPOTrainer
        if "constant_lambda" in row:
            from constant_lambda import constant_lambda

            forward = constant_lambda(row["constant_lambda"])
            trainer_class = type("ConstantTrainer", (DiffusionSDPOTrainer,), {"pair_forward_class": forward})
        trainer = trainer_class(pipeline or self.load_base(), None, args, pairs, peft_config=adapter)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def pairs(self, row: dict[str, Any], seed: int, per_prompt: int) -> Dataset:
        """Return the pairs of a row. Unless its `masked` is true, they have no masks."""
        pairs = made_pairs(row.get("pairs", self.plan["pairs"]), seed, per_prompt)
        return pairs if row.get("masked") or "mask" not in pairs.column_names else pairs.remove_columns("mask")

    def held_out(self, seed: int, row: dict[str, Any] | None = None) -> Dataset:
        """Return held-out pairs of the final prompts: off-policy ones, or of the kind of a row, without masks."""
        seed += HELD_OUT_SEED
        if row is None:
            pairs = eval_pairs(seed, per_prompt=4)
        else:
            pairs = self.pairs({**row, "masked": False}, seed, OWN_PER_PROMPT)
        return self.only("final", pairs)

    def only(self, part: str, pairs: Dataset) -> Dataset:
        """Return the pairs of one half of the prompts."""
        prompts = set(self.prompts[part])
        return pairs.select([index for index, prompt in enumerate(pairs["prompt"]) if prompt in prompts])

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
        reference = denoiser_of(self.load_base())
        if row.get("reference", BASE) != BASE:
            reference.load_state_dict(self.trained(row["reference"], seed))
        return functools.partial(preference_guidance, reference=reference, **row["guidance"])

    def images(self, pipeline: Any, part: str, seed: int, scale: float, context: Any) -> dict[str, float]:
        """Score the images of a half of the prompts; of the final half, measure them too."""
        prompts = [prompt for prompt in self.prompts[part] for _ in range(self.plan["images_per_prompt"][part])]
        generator = torch.Generator().manual_seed(IMAGE_SEEDS[part] + seed)
        latents = torch.randn(len(prompts), *self.model.LATENT_SHAPE, generator=generator)
        with torch.no_grad():
            images = self.model.generate_images(pipeline, prompts, latents, guidance_scale=scale, context=context)
        measured = {"score": float(oracle(images, prompts).double().mean())}
        if part == "selection":
            return measured
        if self.plan.get("corner"):
            with torch.no_grad():
                before = self.model.generate_images(self.load_base(), prompts, latents, guidance_scale=scale)
            measured |= corner_changes(images, before)
        return {**measured, **asdict(meter(tuple(prompts))(images))}

    def errors(self, pipeline: Any, seed: int, pairs: Dataset) -> dict[str, float]:
        """Return the changes of the errors on held-out pairs, against the base model."""
        pairs = concatenate_datasets([pairs] * HELD_OUT_COPIES)
        with tempfile.TemporaryDirectory() as output:
            args = self.arguments(seed, output, safeguard="none")
            trainer = DiffusionSDPOTrainer(pipeline, self.load_base(), args, pairs, pairs)
            trainer.remove_callback(PrinterCallback)
            metrics = trainer.evaluate()
        return {
            name.removeprefix("eval_errors/"): value
            for name, value in metrics.items()
            if name.startswith(("eval_errors/winner_change", "eval_errors/loser_change", "eval_errors/accuracy"))
        }


@functools.cache
def made_pairs(kind: str, seed: int, per_prompt: int) -> Dataset:
    """Return pairs of a kind, those of the UNet's world. Some kinds take seconds."""
    return pairs_of_kind(kind, small_unet.load_base_pipeline(), seed, per_prompt)


@functools.cache
def meter(prompts: tuple[str, ...]) -> ImageMeter:
    """Return the meter of images of these prompts; fitting one takes seconds."""
    return ImageMeter(prompts)


def denoiser_of(pipeline: Any) -> Any:
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def merged(denoiser: Any) -> dict[str, torch.Tensor]:
    """Return a denoiser's weights, with its LoRA merged into them."""
    if getattr(denoiser, "peft_config", None):
        denoiser.fuse_lora()
        denoiser.unload_lora()
    return {name: tensor.detach().float().contiguous().clone() for name, tensor in denoiser.state_dict().items()}


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
    """Return whether a finished row was made with the plan's settings of today. [`run`] compares the base model too."""
    return row is not None and row["settings"] == plan["rows"][name] and row.get("protocol") == protocol(plan)


def protocol(plan: dict[str, Any]) -> dict[str, Any]:
    """Return what all rows of a plan share."""
    return {key: value for key, value in plan.items() if key not in ("about", "rows", "more_rows", "kinds", "seeds")}


def finished_rows(plan: dict[str, Any], file: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the finished rows of today's plan by their names, one for each seed, in the order of the plan."""
    by_name = defaultdict(list)
    rows = read_rows(file)
    for name in plan["rows"]:
        for seed in plan["seeds"]:
            row = rows.get(f"{name}|{seed}")
            if row is not None and is_current(plan, name, row):
                by_name[name].append(row)
    return by_name


def run(study: Study, names: list[str], seeds: list[int], file: Path) -> None:
    """Measure what is missing, and append each row when it is finished."""
    plan = study.plan
    file.parent.mkdir(parents=True, exist_ok=True)
    made = read_rows(file)
    if file.is_file() and not file.read_text(encoding="utf-8").endswith("\n"):
        with file.open("a", encoding="utf-8") as out:
            out.write("\n")  # a kill cut the last line short
    wanted = [(name, seed) for seed in seeds for name in names]
    kept = [made[f"{name}|{seed}"] for name, seed in wanted if is_current(plan, name, made.get(f"{name}|{seed}"))]
    kept = [row for row in kept if row["made_with"]["base"] == study.made_with["base"]]
    others = {found for row in kept for found in differences(row["made_with"], study.made_with)}
    if others:
        tqdm.write(f"Some rows are of other versions ({listed(sorted(others))}). Delete them to make them again.")
    missing = [(name, seed) for name, seed in wanted if f"{name}|{seed}" not in {row["key"] for row in kept}]
    for name, seed in tqdm(missing, unit="row"):
        facts = {"key": f"{name}|{seed}", "name": name, "seed": seed, "settings": plan["rows"][name]}
        facts |= {"protocol": protocol(plan), "made_with": study.made_with}
        row = {**facts, **rounded(study.measure(name, seed))}
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        winner = row["own_errors"]["winner_change_relative"]
        tqdm.write(f"{row['key']}: {row['best']['score']:.3f} at {row['best']['scale']:g}, winners {winner:+.1%}")


def rounded(value: Any) -> Any:
    """Return measurements with five digits, more than their errors allow."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return the means over seeds as a Markdown table, best score first."""
    lines = []
    for name, made in sorted(rows.items(), key=lambda item: -statistics.mean(map(score, item[1]))):
        scales = ", ".join(sorted({f"{row['best']['scale']:g}" for row in made}))
        scores = [f"{number(made)} ({scales})", number(made, plain), number(made, diversity), number(made, frechet)]
        lines.append([name, str(len(made)), *scores, share(made), accuracy(made)])
    columns = ["row", "seeds", "score at best guidance", "without guidance", "diversity", "Frechet"]
    return markdown([*columns, "winners' error", "accuracy"], lines)


def main(arguments: list[str] | None = None, study_class: type[Study] = Study) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="name of a plan beside this script, or the path of a YAML file")
    parser.add_argument("--rows", nargs="+", help="these rows only")
    parser.add_argument("--seeds", nargs="+", type=int, help="these seeds only, such as in a second process")
    parser.add_argument("--file", type=Path, help="file of the finished rows; results/PLAN.jsonl if unset")
    parser.add_argument("--weights", type=Path, default=Path("bench_output/weights"), help="folder of trained weights")
    parser.add_argument("--report", action="store_true", help="print the table of the finished rows, train nothing")
    options = parser.parse_args(arguments)
    try:
        plan = load_plan(options.plan)
    except ValueError as error:
        parser.error(str(error))
    unknown = set(options.rows or ()) - set(plan["rows"])
    if unknown:
        parser.error(f"the plan has no rows {', '.join(sorted(unknown))}")
    file = options.file or HERE / f"results/{Path(options.plan).stem}.jsonl"
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    logging.getLogger("trl_diffusion_sdpo").setLevel(logging.ERROR)
    if not options.report:
        study = study_class(plan, options.weights)
        run(study, options.rows or list(plan["rows"]), options.seeds or plan["seeds"], file)
    print(table(finished_rows(plan, file)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

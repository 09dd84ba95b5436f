"""Preference guidance as users sample: what it adds to classifier-free guidance, and what it costs.

The demo's model of the embedded world is trained by several rules, and sampled with classifier-free guidance, guided
from the reference or a negative model, and with scaled weights. Beside the oracle's score stand the diversity of the
images, their distance from the world's drawings, their saturation, and the change of the winners' errors.

Settings (scales, classifier-free scale) are chosen on the selection part of the prompts, one for all seeds; the report
is of the other prompts and other noise. Trained weights are kept in a folder, measurements are rows of a JSON-lines
file; a second call makes what is missing.

    python benchmarks/guided_front.py train
    python benchmarks/guided_front.py measure --part selection
    python benchmarks/guided_front.py measure --part final
    python benchmarks/guided_front.py errors
    python benchmarks/guided_front.py grid
    python benchmarks/guided_front.py report
"""

import argparse
import contextlib
import functools
import json
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from front import ends_with_newline, parts_of_prompts
from front_report import rows_of
from guided_plan import BASE, IMAGE_SEEDS, INTERVALS, NEGATIVE, PARTS, SAMPLES_PER_PROMPT, Kind, Plan, Sampling, plans
from guided_report import (
    BASE_KIND,
    GUIDED_KIND,
    LOOSE_KIND,
    LOW_KIND,
    RECIPE_KIND,
    choices,
    final_settings,
    plot_grid,
    report,
    winner_models,
)
from guided_training import RAW, Weights, errors, is_trained, scaled, train, weights_of

from trl_diffusion_sdpo import preference_guidance
from trl_diffusion_sdpo.demo.image_measures import DRAWINGS_PER_PROMPT, ImageMeter
from trl_diffusion_sdpo.demo.oracle import oracle_score
from trl_diffusion_sdpo.demo.pipeline import LATENT_SHAPE, load_base_pipeline
from trl_diffusion_sdpo.demo.world import IMAGE_SIZE

GRID_ROWS = 8


class Sampler:
    """Generates and measures the images of settings, from trained weights in a folder."""

    def __init__(self, plan: Plan, root: Path):
        self.plan, self.root = plan, root
        pipeline = load_base_pipeline()
        parts = {**pipeline.components, "scheduler": DDIMScheduler.from_config(pipeline.scheduler.config)}
        self.pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        self.pipeline.set_progress_bar_config(disable=True)
        self.reference = load_base_pipeline().unet
        self.base: Weights = {name: tensor.clone() for name, tensor in self.reference.state_dict().items()}
        self.predictions = 0  # of images, by policy and reference
        for module in (self.pipeline.unet, self.reference):
            module.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.predictions += len(args[0] if args else kwargs["sample"])

    def is_ready(self, kind: Kind, seed: int) -> bool:
        """Whether all weights that a kind needs are trained."""
        needed = {kind.model} - {BASE} | ({NEGATIVE} if kind.form in ("npo", "negative") else set())
        return all(is_trained(self.root, self.plan.models[name].run(seed)) for name in needed)

    @functools.lru_cache(maxsize=16)  # noqa: B019  (it lives as long as the program)
    def weights(self, model: str, seed: int, kind: str) -> Weights:
        """The weights of a model."""
        return self.base if model == BASE else weights_of(self.root, self.plan.models[model].run(seed), kind)

    def images(self, sampling: Sampling, prompts: list[str], latents: torch.Tensor) -> np.ndarray:
        """Images `(N, 32, 32, 3)`, uint8, one for each prompt and latent."""
        setting, kind, seed = sampling.setting, sampling.setting.kind, sampling.seed
        policy = self.weights(kind.model, seed, kind.weights)
        if kind.form == "weights":
            policy = scaled(self.base, policy, setting.scale)
        self.pipeline.unet.load_state_dict(policy)
        is_negative = kind.form in ("npo", "negative")
        self.reference.load_state_dict(self.weights(NEGATIVE, seed, RAW) if is_negative else self.base)
        guided: Any = contextlib.nullcontext()
        if kind.form not in ("plain", "weights"):
            form: Any = {"prediction": "conditional", "negative": "conditional"}.get(kind.form, kind.form)
            scale = None if form == "npo" else setting.scale
            interval: Any = INTERVALS[kind.interval]
            guided = preference_guidance(self.pipeline, scale, reference=self.reference, form=form, interval=interval)
        with torch.no_grad(), guided:
            images = self.pipeline(
                prompts,
                height=IMAGE_SIZE,
                width=IMAGE_SIZE,
                latents=latents,
                num_inference_steps=kind.steps,
                guidance_scale=setting.guidance,
                output_type="np",
            ).images
        return np.rint(255 * images).astype(np.uint8)

    def measure(self, sampling: Sampling) -> dict[str, Any]:
        """A row: score, diversity, distance and saturation of the images, and how much was predicted for them."""
        prompts, latents = self.noise(sampling.part, sampling.seed)
        before = self.predictions
        images = self.images(sampling, prompts, latents)
        predictions = (self.predictions - before) / len(prompts)
        found = {"score": float(oracle_score(images, prompts).mean()), **asdict(self.meter(prompts)(images))}
        return rounded(found | {"predictions": predictions})

    def meter(self, prompts: list[str]) -> ImageMeter:
        return meter_of(tuple(prompts), 4 if self.plan.is_smallest else DRAWINGS_PER_PROMPT)

    def noise(self, part: str, seed: int) -> tuple[list[str], torch.Tensor]:
        """Prompts and latents of a part, the same for every setting of a seed."""
        samples = 2 if self.plan.is_smallest else SAMPLES_PER_PROMPT[part]
        shown = parts_of_prompts()[part][: 2 if self.plan.is_smallest else None]
        prompts = [prompt for prompt in shown for _ in range(samples)]
        generator = torch.Generator().manual_seed(IMAGE_SEEDS[part] + seed)
        return prompts, randn_tensor((len(prompts), *LATENT_SHAPE), generator)


@functools.cache
def meter_of(prompts: tuple[str, ...], drawings_per_prompt: int) -> ImageMeter:
    return ImageMeter(prompts, drawings_per_prompt)


# ---- The rows ------------------------------------------------------------------------------------------------------


def how(plan: Plan) -> dict[str, Any]:
    """Rows with another measurement cannot be in one table."""
    return {"samples": SAMPLES_PER_PROMPT, "image_seeds": IMAGE_SEEDS, "smallest": plan.is_smallest}


def rounded(value: Any) -> Any:
    """Numbers in a row with six places."""
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return round(value, 6) if isinstance(value, float) else value


def append(file: Path, row: dict[str, Any]) -> None:
    """Append a row, after a newline where an earlier call was stopped in the middle of a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(("" if ends_with_newline(file) else "\n") + json.dumps(row) + "\n")


def measure_all(plan: Plan, samplings: Iterable[Sampling], root: Path, file: Path) -> None:
    """Measure what the file lacks, as far as the weights are there."""
    there = {key for key, row in rows_of(file).items() if row.get("how") == how(plan)}
    missing = [sampling for sampling in samplings if sampling.key not in there]
    sampler = Sampler(plan, root)
    ready = [sampling for sampling in missing if sampler.is_ready(sampling.setting.kind, sampling.seed)]
    print(f"{len(ready)} rows to measure, {len(missing) - len(ready)} without trained weights", flush=True)
    started = time.monotonic()
    for done, sampling in enumerate(ready, 1):
        facts = {"part": sampling.part, "seed": sampling.seed, **sampling.setting.facts()}
        row = {"key": sampling.key, **facts, **sampler.measure(sampling), "how": how(plan)}
        append(file, row)
        if done % 20 == 0 or done == len(ready):
            left = (time.monotonic() - started) / done * (len(ready) - done) / 60
            print(f"{done}/{len(ready)} {row['key']}: {row['score']:.3f}, {left:.0f} min to go", flush=True)


def measure_errors(plan: Plan, root: Path, file: Path) -> None:
    """The winners' errors of the saved weights, and of scaled ones, on the final part's held-out pairs."""
    sampler, there = Sampler(plan, root), rows_of(file)
    for model, kind, scale in winner_models(plan):
        for seed in plan.seeds(Kind(model)):
            key = f"errors|{seed}|{model}|{kind}|{scale:g}"
            if key in there or not sampler.is_ready(Kind(model), seed):
                continue
            weights = scaled(sampler.base, sampler.weights(model, seed, kind), scale)
            found = rounded(errors(weights, "final", seed, smallest=plan.is_smallest))
            append(file, {"key": key, "seed": seed, "model": model, "weights": kind, "scale": scale, **found})
            print(f"{key}: winner {found['winner']:+.4f}", flush=True)


def make_grid(plan: Plan, root: Path, file: Path, picture: Path) -> None:
    """Images of equal noise by each of some models at its best setting."""
    sampler, chosen = Sampler(plan, root), choices(list(rows_of(file).values()))
    seed = plan.seeds(RECIPE_KIND)[0]
    prompts, latents = sampler.noise("final", seed)
    shown = list(range(0, len(prompts), -(-len(prompts) // GRID_ROWS)))
    prompts, columns = [prompts[row] for row in shown], []
    for kind in (BASE_KIND, Kind("DPO"), LOOSE_KIND, RECIPE_KIND, GUIDED_KIND, LOW_KIND):
        if kind in chosen:
            setting = chosen[kind].best
            images = sampler.images(Sampling(setting, "final", seed), prompts, latents[shown])
            scale = f"scale {setting.scale:g}, " if kind.form == "prediction" else ""
            title = "\n".join([*kind.label.split(", "), f"{scale}guidance {setting.guidance:g}"])
            columns.append((title, images, oracle_score(images, prompts)))
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot_grid(columns, prompts, picture)


def samplings(plan: Plan, part: str, file: Path, with_curves: bool) -> list[Sampling]:
    """All rows of a part, seed by seed; of the final part, those of the chosen settings."""
    settings = (
        plan.settings if part == "selection" else final_settings(plan, list(rows_of(file).values()), with_curves)
    )
    rows = [Sampling(setting, part, seed) for setting in settings for seed in plan.seeds(setting.kind)]
    return sorted(rows, key=lambda row: row.seed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "measure", "errors", "grid", "report"])
    parser.add_argument("--plan", choices=plans(), default="main", help="what to train and to measure")
    parser.add_argument("--part", choices=PARTS, default="selection", help="prompts to measure")
    parser.add_argument("--weights", type=Path, default=Path("bench_output/guided"), help="folder of trained weights")
    parser.add_argument("--file", type=Path, default=Path("bench_output/guided_front.jsonl"), help="file of the rows")
    parser.add_argument("--folder", type=Path, default=Path("bench_output"), help="folder of the plots")
    parser.add_argument("--curves", action="store_true", help="measure all points of the plotted curves too")
    parser.add_argument("--seeds", type=int, nargs="+", help="measure these only, such as in a second process")
    options = parser.parse_args(arguments)
    plan = plans()[options.plan]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if options.command == "train":
        for run in plan.runs():
            if not is_trained(options.weights, run):
                train(run, options.weights)
                print(f"{run.key} is trained", flush=True)
    elif options.command == "measure":
        rows = samplings(plan, options.part, options.file, options.curves)
        rows = [row for row in rows if not options.seeds or row.seed in options.seeds]
        measure_all(plan, rows, options.weights, options.file)
    elif options.command == "errors":
        measure_errors(plan, options.weights, options.file)
    elif options.command == "grid":
        make_grid(plan, options.weights, options.file, options.folder / "guidance_grid.png")
    else:
        report(options.file, options.folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

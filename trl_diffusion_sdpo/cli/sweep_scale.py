"""`trl-diffusion-sdpo sweep-scale`: evaluates a run between its base (scale 0) and its tuned weights (scale 1) and
beyond, generates images at each scale, prints a table, and can save the weights at one scale."""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..utils.files import SWEEP_FOLDER, write_atomically
from . import EXIT_OK
from .errors import reading_data
from .options import OneLineParser
from .scorers import scorer_named

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

    from ..saving.interpolation import SavedRun, ScaledWeights
    from ..trainer import DiffusionSDPOTrainer

SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
PRECISIONS = ("no", "bf16", "fp16")
PROMPTS = 8  # if none are named
FORMS = ("weights", "prediction")  # scale the weights, or scale the prediction by guidance
SWEEP_FILE, IMAGES_FOLDER = "sweep.json", "images"


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        description=(
            "Evaluate a run at several scales from the base it started from (0) over its tuned weights (1) to beyond, "
            "and generate images at each: by the weights, and by preference guidance in the prediction. Writes the "
            "numbers, images and a recommended scale."
        ),
    )
    add = parser.add_argument
    add("--run", required=True, metavar="FOLDER", help="Output folder of the run, or one of its checkpoints.")
    add("--model_name_or_path", metavar="ID", help="The run's base, if it has moved; the recorded one if unset.")
    add("--dataset_name", required=True, metavar="ID", help="Preference pairs, as `train` takes them.")
    add("--dataset_config", metavar="NAME", help="Configuration of a Hub data set.")
    add("--dataset_test_split", default="test", metavar="NAME", help="Split to evaluate on (default: test).")
    add("--dataset_format", metavar="NAME", help="Name of the preference format; detected by columns if unset.")
    add("--max_pairs", type=int, metavar="N", help="Evaluate the first N pairs only.")
    listed = " ".join(f"{scale:g}" for scale in SCALES)
    add("--scales", type=float, nargs="+", default=list(SCALES), help=f"Scales to evaluate (default: {listed}).")
    add("--average", action="store_true", help="Sweep the averaged weights of `ema_decay`.")
    add("--bake", type=float, metavar="SCALE", help="Write the weights at this scale to --baked_dir.")
    add("--baked_dir", metavar="FOLDER", help="Folder for the weights of --bake.")
    add("--output_dir", metavar="FOLDER", help="Folder of numbers and images; `scale_sweep` in the run's if unset.")
    add("--per_device_eval_batch_size", type=int, default=8, metavar="N", help="Pairs in a batch (default: 8).")
    add("--mixed_precision", choices=PRECISIONS, help="Autocast of the predictions; the run's if unset.")
    add("--model_revision", metavar="NAME", help="Branch, tag or commit of the base.")
    add("--dtype", metavar="NAME", help="Dtype in which the base is loaded, as in the run (default: float32).")
    add("--use_cpu", action="store_true", help="Run on the CPU.")
    add("--no_images", action="store_true", help="Evaluate the pairs only.")
    add("--prompts", nargs="+", metavar="TEXT", help="Prompts of the images; if unset, `sample_prompts` of the run.")
    add("--seed", type=int, metavar="N", help="Seed of the images' noise; the run's if unset.")
    add("--sample_guidance_scale", type=float, metavar="G", help="Classifier-free guidance; the run's if unset.")
    add("--sample_inference_steps", type=int, metavar="N", help="Denoising steps; the run's if unset.")
    add(
        "--scorer",
        metavar="NAME",
        help="Scorer of the images, such as `hpsv2.1`, or your own `module:function`. It takes a list of PIL images "
        "and a list of prompts, and returns a number for each, larger for better.",
    )
    return parser


def run(arguments: list[str], prog: str) -> int:
    options = make_parser(prog).parse_args(arguments)
    _check(options)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    sweep(options)
    return EXIT_OK


def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Evaluate all scales, generate and score images, recommend a scale, and save the weights of `--bake`.

    Returns:
        `list[dict[str, Any]]`: A row for each scale.

    Raises:
        `ValueError`: If folder, base, data, scorer or settings do not fit together.
    """
    from ..reporting.recommended_scale import recommend, sweep_row, sweep_table  # seconds
    from ..saving.interpolation import ScaledWeights, check_free_folder, read_run

    run = read_run(options.run, average=options.average)
    if options.baked_dir is not None:
        check_free_folder(Path(options.baked_dir), run)
    scorer = None if options.scorer is None else scorer_named(options.scorer)
    trainer = _make_trainer(options, run)
    sampler = None if options.no_images else Sampler(options, run, trainer)
    folder, weights = Path(trainer.args.output_dir), ScaledWeights(trainer.weight_files, run)
    rows: list[dict[str, Any]] = []
    scores: dict[str, dict[float, list[float]]] = {}
    for scale in sorted({*options.scales}):
        with weights.active(scale):
            rows.append(sweep_row(scale, trainer.evaluate(), trainer.run_facts))
        for form in () if sampler is None else FORMS:
            images = sampler.generate(weights, form, scale, folder / IMAGES_FOLDER)
            if scorer is not None:
                scores.setdefault(form, {})[scale] = scorer(images, sampler.prompts).tolist()
    recommended = recommend(
        rows,
        scores,
        scorer=options.scorer,
        guidance_scale=None if sampler is None else sampler.guidance_scale,
        is_negative=run.setup.get("swap_labels") is True,
    )
    _write(run, folder, rows, scores, recommended | {"of": weights.fingerprint})
    print(f"{sweep_table(rows)}\n\n{recommended['sentence']}\nThe numbers and images are in {folder}.")
    if options.bake is not None:
        weights.save(Path(options.baked_dir), options.bake)
        print(f"The weights at scale {options.bake:g} are in {options.baked_dir}.")
    return rows


def _check(options: argparse.Namespace) -> None:
    """Raise `ValueError` on options that are wrong for every run."""
    scales = [*options.scales, *([] if options.bake is None else [options.bake])]
    wrong = [scale for scale in scales if not (math.isfinite(scale) and scale >= 0)]
    if wrong:
        raise ValueError(f"Scales must be finite numbers of at least 0, got {wrong[0]}. 0 is the base, 1 the tuned.")
    if (options.bake is None) != (options.baked_dir is None):
        raise ValueError("`--bake SCALE` and `--baked_dir FOLDER` belong together; got one of them.")
    if options.no_images and options.scorer is not None:
        raise ValueError("`--scorer` scores images, and `--no_images` generates none. Leave one of them out.")
    if options.sample_guidance_scale is not None and not math.isfinite(options.sample_guidance_scale):
        raise ValueError(f"`--sample_guidance_scale` must be a finite number, got {options.sample_guidance_scale}.")
    if options.prompts is not None and not all(prompt.strip() for prompt in options.prompts):
        raise ValueError("`--prompts` must not be empty; got an empty prompt.")
    for name in ("max_pairs", "per_device_eval_batch_size", "sample_inference_steps"):
        value = vars(options)[name]
        if value is not None and value < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {value}.")


def _make_trainer(options: argparse.Namespace, run: SavedRun) -> DiffusionSDPOTrainer:
    """Return a trainer with the run's evaluation settings. The base is its policy and its reference."""
    from transformers import PrinterCallback
    from trl import ScriptArguments

    from ..models.loading import load_model
    from ..saving.starting_point import base_of_run, starting_point
    from ..trainer import DiffusionSDPOConfig, DiffusionSDPOTrainer
    from ..trainer.config.declaring import EVALUATION
    from ..trainer.diffusion_sdpo_config import settings_with
    from .pair_arguments import load_split

    origin = {"revision": options.model_revision, "dtype": options.dtype}
    named = options.model_name_or_path
    start = base_of_run(run.folder) if named is None else starting_point(named)  # without its LoRA
    loaded = load_model(start.pipeline, model_init_kwargs=start.with_recorded(origin), denoiser_folder=start.denoiser)
    run.check_base(loaded.denoiser)
    precision = options.mixed_precision or run.setup.get("mixed_precision", "no")
    default_folder = SWEEP_FOLDER + ("_ema" if run.is_average else "")
    # With `max_pairs`, only the evaluated pairs are decoded.
    data: dict[str, Any] = {} if options.max_pairs is None else {"verify_images": "none"}
    args = DiffusionSDPOConfig(
        output_dir=options.output_dir or str(run.folder / default_folder),
        per_device_eval_batch_size=options.per_device_eval_batch_size,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=options.use_cpu,
        learning_rate=0.0,  # nothing trains here
        dataset_format=options.dataset_format,
        report_to="none",
        disable_tqdm=True,
        **data,
        **run.evaluation_settings(settings_with(EVALUATION)),
    )
    script_args = ScriptArguments(dataset_name=options.dataset_name, dataset_config=options.dataset_config)
    with reading_data(options.dataset_name):
        pairs = load_split(script_args, options.dataset_test_split)
    trainer = DiffusionSDPOTrainer(loaded.pipeline, None, args, None, pairs, peft_config=run.lora)
    trainer.remove_callback(PrinterCallback)
    if options.max_pairs is not None:
        trainer.eval_dataset = cast(Any, trainer.eval_dataset).first(options.max_pairs)
    return trainer


def _write(
    run: SavedRun, folder: Path, rows: Sequence[dict[str, Any]], scores: dict[str, Any], recommended: dict[str, Any]
) -> None:
    """Write the sweep's file, and the recommendation into the metadata of the run's model card."""
    from ..saving.model_card import recommend_scale

    content = {"rows": list(rows), "scores": scores, "recommended": recommended}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SWEEP_FILE, json.dumps(content, indent=2).encode() + b"\n")
    recommend_scale(run.folder, recommended, average=run.is_average)


# ---- Images --------------------------------------------------------------------------------------------------------


class Sampler:
    """Generator of a sweep's images. Options override the run's sampling settings.

    Args:
        trainer ([`~trl_diffusion_sdpo.DiffusionSDPOTrainer`]): Its denoiser is the base.

    Raises:
        `ValueError`: If there are no prompts, or too few for a scorer.
    """

    def __init__(self, options: argparse.Namespace, run: SavedRun, trainer: DiffusionSDPOTrainer):
        from ..reporting.recommended_scale import FEWEST_IMAGES
        from ..reporting.sample_images import SampleImagesCallback, call_options
        from ..saving.resuming import stored_settings

        stored = stored_settings(run.folder)  # empty for a run from the Hub
        given = {
            "guidance_scale": options.sample_guidance_scale,
            "num_inference_steps": options.sample_inference_steps,
        }
        sample_kwargs = {**(stored.get("sample_kwargs") or {})}
        sample_kwargs |= {name: value for name, value in given.items() if value is not None}
        self.guidance_scale: float | None = sample_kwargs.get("guidance_scale")
        self.prompts: list[str] = options.prompts or stored.get("sample_prompts") or _first_prompts(trainer)
        if options.scorer is not None and len(self.prompts) < FEWEST_IMAGES:
            raise ValueError(
                f"Scores of fewer than {FEWEST_IMAGES} prompts do not count, and there are {len(self.prompts)}. Name "
                f"{FEWEST_IMAGES} or more with `--prompts`, or leave `--scorer` out."
            )
        self._trainer, self._is_full = trainer, run.lora is None
        self._callback = SampleImagesCallback(
            trainer.family.pipeline,
            self.prompts,
            every_n_steps=None,
            call_options=call_options(trainer.family, sample_kwargs),
            seed=trainer.args.seed if options.seed is None else options.seed,
            resolution=cast(Any, trainer.args.resolution),
            denoiser_name=trainer.family.denoiser_name,
            frozen=trainer.frozen_components,
        )

    def generate(self, weights: ScaledWeights, form: str, scale: float, folder: Path) -> list[Any]:
        """Generate an image of each prompt at a scale, and write a labelled grid of them into a folder."""
        from ..engines.engine_settings import training_autocast
        from ..reporting.sample_images import labelled_grid

        autocast, within, reference = training_autocast(self._trainer.args), None, None
        if form == "prediction":
            # Guidance needs the base beside the tuned weights. For a LoRA, the base is the model with the LoRA off.
            reference = copy.deepcopy(self._trainer.denoiser).eval() if self._is_full else None
            within = functools.partial(_guided, scale, reference, autocast)
        with weights.active(1.0 if form == "prediction" else scale):
            images = self._callback.generate(autocast, within=within)
        folder.mkdir(parents=True, exist_ok=True)
        labelled_grid(images, self.prompts).save(folder / f"{form}-{scale:g}.png")
        return images


@contextlib.contextmanager
def _guided(
    scale: float, reference: nn.Module | None, autocast: contextlib.AbstractContextManager, pipeline: DiffusionPipeline
) -> Iterator[None]:
    """Return preference guidance of a pipeline. A separate reference computes in the tuned model's precision."""
    from ..guidance import preference_guidance
    from ..reporting.sample_images import in_training_precision

    same = contextlib.nullcontext() if reference is None else in_training_precision(reference, autocast)
    # Distilled models are allowed, because the sweep is how a user finds out whether guidance helps them.
    with same, preference_guidance(pipeline, scale, reference=reference, allow_distilled=True):
        yield


def _first_prompts(trainer: DiffusionSDPOTrainer) -> list[str]:
    """Return the first prompts of the evaluated pairs that are not empty."""
    pairs = cast(Any, trainer.eval_dataset)
    prompts = [prompt for prompt in sorted(pairs.first(10 * PROMPTS).prompts(of_losers=False)) if prompt.strip()]
    if not prompts:
        raise ValueError("Images need prompts, and those of the first pairs are empty. Name some with `--prompts`.")
    return prompts[:PROMPTS]

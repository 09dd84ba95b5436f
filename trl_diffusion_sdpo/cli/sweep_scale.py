"""`trl-diffusion-sdpo sweep-scale`: evaluates weights of a run between reference (scale 0) and policy (scale 1), writes
the results as JSON, table and plot, and can save the weights at one scale."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..utils.files import SWEEP_FOLDER
from ..utils.import_utils import require
from . import EXIT_OK, sweep_images
from .errors import reading_data
from .options import OneLineParser

if TYPE_CHECKING:
    import datasets
    from transformers import TrainerCallback

    from ..saving.interpolation import SavedRun, ScaledWeights
    from ..trainer import DiffusionSDPOConfig, DiffusionSDPOTrainer

SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
PRECISIONS = ("no", "bf16", "fp16")
DEFAULT_FOLDERS = {False: SWEEP_FOLDER, True: f"{SWEEP_FOLDER}_ema"}  # in the run's folder, by --average


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        description=(
            "Evaluate a run at several scales from the base it started from (0) over its tuned weights (1) to beyond, "
            "and generate images at each: by the weights, and by preference guidance in the prediction. Writes the "
            "numbers, plots and images, and a recommended scale, also into the run's model card. A second call makes "
            "only what is missing."
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
    add("--output_dir", metavar="FOLDER", help="Folder of numbers and plot; `scale_sweep` in the run's if unset.")
    add("--per_device_eval_batch_size", type=int, default=8, metavar="N", help="Pairs in a batch (default: 8).")
    add("--mixed_precision", choices=PRECISIONS, help="Autocast of the predictions; the run's if unset.")
    add("--model_revision", metavar="NAME", help="Branch, tag or commit of the base.")
    add("--dtype", metavar="NAME", help="Dtype in which the base is loaded, as in the run (default: float32).")
    add("--use_cpu", action="store_true", help="Run on the CPU.")
    sweep_images.add_options(add)
    return parser


def run(arguments: list[str], prog: str) -> int:
    options = make_parser(prog).parse_args(arguments)
    _check(options)
    require("plots", "Plotting a sweep over scales")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    sweep(options)
    return EXIT_OK


def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Evaluate the missing scales, plot all of them, generate the missing images, recommend a scale, and save the
    weights of `--bake`. Returns all rows.

    Raises:
        ValueError: On a folder, base, data, scorer or settings that do not fit together.
    """
    from ..saving.interpolation import ScaledWeights, check_free_folder, read_run  # seconds

    run = read_run(options.run, average=options.average)
    if options.baked_dir is not None:
        check_free_folder(Path(options.baked_dir), run)
    scorer = None if options.scorer is None else sweep_images.load_scorer(options.scorer)
    sweep_images.named_prompts(options, run)  # which may be too few
    trainer = _make_trainer(options, run)
    prompts = [] if options.no_images else sweep_images.find_prompts(options, run, trainer.eval_dataset)
    weights = ScaledWeights(trainer.weight_files, run)
    settings = _settings(options, run, trainer, weights)
    rows = _evaluate(trainer, weights, options.scales, settings)
    images = {} if options.no_images else sweep_images.make(options, run, trainer, weights, prompts, rows, scorer)
    _recommend(trainer, run, weights, rows, settings, images)
    if options.bake is not None:
        weights.save(Path(options.baked_dir), options.bake)
        print(f"The weights at scale {options.bake:g} are in {options.baked_dir}.")
    return rows


def _check(options: argparse.Namespace) -> None:
    """Raise `ValueError` on options that are wrong whatever the run is."""
    scales = [*options.scales, *([] if options.bake is None else [options.bake])]
    wrong = [scale for scale in scales if not (math.isfinite(scale) and scale >= 0)]
    if wrong:
        raise ValueError(f"Scales must be finite numbers of at least 0, got {wrong[0]}. 0 is the base, 1 the tuned.")
    if (options.bake is None) != (options.baked_dir is None):
        raise ValueError("`--bake SCALE` and `--baked_dir FOLDER` belong together; got one of them.")
    for name in ("max_pairs", "per_device_eval_batch_size"):
        value = vars(options)[name]
        if value is not None and value < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {value}.")
    sweep_images.check(options)


def _make_trainer(options: argparse.Namespace, run: SavedRun) -> DiffusionSDPOTrainer:
    """A trainer of the base, which is also the reference, with the run's evaluation settings."""
    from transformers import PrinterCallback

    from ..models.loading import load_model
    from ..saving.starting_point import base_of_run, starting_point
    from ..trainer import DiffusionSDPOTrainer

    origin = {"revision": options.model_revision, "dtype": options.dtype}
    named = options.model_name_or_path
    start = base_of_run(run.folder) if named is None else starting_point(named)  # without its LoRA
    settings = start.with_recorded(origin)
    loaded = load_model(start.pipeline, model_init_kwargs=settings, denoiser_folder=start.denoiser)
    run.check_base(loaded.denoiser)
    args, pairs = _make_args(options, run), _load_pairs(options)
    trainer = DiffusionSDPOTrainer(loaded.pipeline, None, args, None, pairs, peft_config=run.lora)
    trainer.remove_callback(PrinterCallback)
    if options.max_pairs is not None:
        trainer.eval_dataset = cast(Any, trainer.eval_dataset).first(options.max_pairs)
    return trainer


def _make_args(options: argparse.Namespace, run: SavedRun) -> DiffusionSDPOConfig:
    from ..trainer import DiffusionSDPOConfig

    precision = options.mixed_precision or run.setup.get("mixed_precision", "no")
    # With `max_pairs`, only the evaluated pairs are decoded.
    data: dict[str, Any] = {} if options.max_pairs is None else {"verify_images": "none"}
    return DiffusionSDPOConfig(
        output_dir=options.output_dir or str(run.folder / DEFAULT_FOLDERS[run.is_average]),
        per_device_eval_batch_size=options.per_device_eval_batch_size,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=options.use_cpu,
        learning_rate=0.0,  # nothing trains here
        dataset_format=options.dataset_format,
        report_to="none",
        disable_tqdm=True,  # `_evaluate` shows one bar for all scales
        **data,
        **_evaluation_settings(run),
    )


def _evaluation_settings(run: SavedRun) -> dict[str, Any]:
    from ..trainer.config.declaring import EVALUATION
    from ..trainer.diffusion_sdpo_config import settings_with

    return run.evaluation_settings(settings_with(EVALUATION))


def _load_pairs(options: argparse.Namespace) -> datasets.Dataset:
    from trl import ScriptArguments

    from .pair_arguments import load_split

    script_args = ScriptArguments(dataset_name=options.dataset_name, dataset_config=options.dataset_config)
    with reading_data(options.dataset_name):
        return load_split(script_args, options.dataset_test_split)


def _settings(
    options: argparse.Namespace, run: SavedRun, trainer: DiffusionSDPOTrainer, weights: ScaledWeights
) -> dict[str, Any]:
    """The settings that all rows of one file share."""
    used = {name: trainer.args.to_dict()[name] for name in (*_evaluation_settings(run), "beta", "resolution")}
    names = ("dataset_name", "dataset_config", "dataset_test_split", "dataset_format")
    return {
        "weights": weights.fingerprint,
        "base": run.setup["weights_before_training"],
        "average": run.is_average,
        **{name: vars(options)[name] for name in names},
        "pairs": len(cast(Any, trainer.eval_dataset)),
        "mixed_precision": trainer.args.mixed_precision,
        **used,
    }


def _evaluate(
    trainer: DiffusionSDPOTrainer, weights: ScaledWeights, scales: Sequence[float], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Evaluate the scales that the output folder lacks, writing each at once; then plot all."""
    from tqdm.auto import tqdm

    from ..reporting import scale_sweep

    folder = Path(trainer.args.output_dir)
    file = folder / scale_sweep.SWEEP_FILE
    rows = scale_sweep.read_sweep(file, settings)
    missing = sorted(set(scales) - {row["scale"] for row in rows})
    steps = len(missing) * len(trainer.get_eval_dataloader())
    with tqdm(total=steps, desc="Scales", unit="batch", disable=not missing) as bar:
        trainer.add_callback(_batch_callback(bar.update))
        for scale in missing:
            bar.set_postfix_str(f"scale {scale:g}")
            with weights.active(scale):
                rows.append(scale_sweep.sweep_row(scale, trainer.evaluate()))
            rows.sort(key=lambda row: row["scale"])
            scale_sweep.write_sweep(file, settings, rows)
    scale_sweep.plot_scale_sweep(rows, trainer.args.num_noise_bins, folder / scale_sweep.PLOT_FILE)
    print(f"{scale_sweep.sweep_table(rows)}\n\nThe numbers and the plot are in {folder}.")
    return rows


def _recommend(
    trainer: DiffusionSDPOTrainer,
    run: SavedRun,
    weights: ScaledWeights,
    rows: Sequence[dict[str, Any]],
    settings: dict[str, Any],
    images: dict[str, Any],
) -> None:
    """Recommend a scale: on the terminal, in the sweep's file, in the run's set-up file and on its model card."""
    from ..reporting import scale_sweep
    from ..reporting.recommended_scale import recommend
    from ..saving.run_card import CARD_FILE, update_recommended_scales
    from ..saving.setup import RECOMMENDED, SETUP_FILE, recommended_scales, record_recommended_scale

    is_negative = run.setup.get("swap_labels") is True
    recommended = recommend(rows, is_negative=is_negative, **images).facts() | {"of": weights.fingerprint}
    folder = Path(trainer.args.output_dir).absolute()
    earlier = recommended_scales(run.setup).get(RECOMMENDED[run.is_average], {})
    if earlier.get("of") == weights.fingerprint and earlier.get("scorer") and not recommended["scorer"]:
        recommended = earlier
        print("The recommendation of an earlier sweep is kept, as it has scores of these weights, and this one none:")
    else:
        recommended |= _for_the_card(trainer, run, recommended, folder if images else None)
    scale_sweep.write_sweep(folder / scale_sweep.SWEEP_FILE, settings, rows, recommended)
    print(recommended["sentence"])
    record_recommended_scale(run.folder, recommended, average=run.is_average)
    has_card = update_recommended_scales(run.folder)
    print(f"It is in {run.folder / SETUP_FILE}" + (f" and {run.folder / CARD_FILE}." if has_card else "."))


def _for_the_card(
    trainer: DiffusionSDPOTrainer, run: SavedRun, recommended: dict[str, Any], folder: Path | None
) -> dict[str, Any]:
    """What the model card's code and paragraph need besides the scales; `folder` has grids of images, if any."""
    from ..guidance.preference_guidance import is_distilled

    family = trainer.family
    found: dict[str, Any] = {}
    if recommended["scorer"]:  # the arguments by which the scored images differ from those of the card's call
        plain = family.generation_kwargs(None)
        guided = family.generation_kwargs(recommended["guidance_scale"])
        found["distilled"] = is_distilled(family)  # its guidance has to be asked for
        found["call"] = {name: value for name, value in guided.items() if plain.get(name) != value}
    if run.lora is None:  # guidance needs the base's denoiser
        found["reference"] = {"repository": _public_base(run), "subfolder": family.denoiser_name}
    if folder is not None and folder.is_relative_to(run.folder.absolute()):  # the card can show them
        grids = [folder / name for name in sweep_images.GRID_FILES.values()]
        found["grids"] = [grid.relative_to(run.folder.absolute()).as_posix() for grid in grids]
    return found


def _public_base(run: SavedRun) -> str:
    """Repository or folder with the denoiser that the run started from, as its model card names it."""
    from ..saving.model_card import base_for_loading
    from ..saving.starting_point import recorded_base_of

    base = recorded_base_of(run.folder)
    return base_for_loading(None if base is None else base["denoiser"] or base["pipeline"])


def _batch_callback(on_batch: Callable[[], Any]) -> TrainerCallback:
    """A callback that calls `on_batch` after each evaluated batch."""
    from transformers import TrainerCallback

    class BatchCallback(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any):
            on_batch()

    return BatchCallback()

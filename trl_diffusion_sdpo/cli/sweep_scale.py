"""`trl-diffusion-sdpo sweep-scale`: evaluate what a run saved at several scales between its base and its weights, and
write one of them."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..import_utils import require
from .options import OneLineParser
from .scale_sweep import PICTURE_FILE, SWEEP_FILE, plot_scale_sweep, read_sweep, sweep_row, sweep_table, write_sweep

if TYPE_CHECKING:
    import datasets
    from transformers import TrainerCallback

    from ..artifacts.interpolation import SavedRun, ScaledWeights
    from ..models.loading import LoadedModel
    from ..trainer import DiffusionSDPOConfig, DiffusionSDPOTrainer

EXIT_OK = 0
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
PRECISIONS = ("no", "bf16", "fp16")
DEFAULT_FOLDERS = {False: "scale_sweep", True: "scale_sweep_ema"}  # below the run's, by --average


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        description=(
            "Evaluate what a run saved at several scales: 0 is the base that the run began with, 1 its tuned weights. "
            "Writes the numbers, and a picture of margin and accuracy against what became of the winners. A second "
            "call evaluates only the scales that are missing."
        ),
    )
    add = parser.add_argument
    add("--run", required=True, metavar="FOLDER", help="What the run saved: its output folder or a checkpoint.")
    add("--model_name_or_path", required=True, metavar="ID", help="The run's base, a Hub id or folder.")
    add("--dataset_name", required=True, metavar="ID", help="Preference pairs, as `train` takes them.")
    add("--dataset_config", metavar="NAME", help="Configuration of a Hub data set.")
    add("--dataset_test_split", default="test", metavar="NAME", help="Split to evaluate on (default: test).")
    add("--dataset_format", metavar="NAME", help="Name of the preference format; detected by columns if unset.")
    add("--max_pairs", type=int, metavar="N", help="Evaluate the first N pairs only.")
    listed = " ".join(f"{scale:g}" for scale in SCALES)
    add("--scales", type=float, nargs="+", default=list(SCALES), help=f"Scales to evaluate (default: {listed}).")
    add("--average", action="store_true", help="Sweep the average of the weights that `ema_decay` kept.")
    add("--bake", type=float, metavar="SCALE", help="Write the weights at this scale into --baked_dir.")
    add("--baked_dir", metavar="FOLDER", help="Where to.")
    add("--output_dir", metavar="FOLDER", help="For numbers and picture; `scale_sweep` in the run's folder if unset.")
    add("--per_device_eval_batch_size", type=int, default=8, metavar="N", help="Pairs in a batch (default: 8).")
    add("--mixed_precision", choices=PRECISIONS, help="Autocast of the predictions; the run's if unset.")
    add("--model_revision", metavar="NAME", help="Branch, tag or commit of the base.")
    add("--dtype", metavar="NAME", help="In which the base is loaded, as in the run (default: float32).")
    add("--use_cpu", action="store_true", help="Leave accelerators alone.")
    return parser


def run(arguments: list[str], prog: str) -> int:
    options = make_parser(prog).parse_args(arguments)
    _check(options)
    require("plots", "Drawing a sweep over scales")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    sweep(options)
    return EXIT_OK


def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Evaluate the scales that are missing, then draw all, and write the one to be baked.

    Returns:
        `list[dict]`: The rows of all scales evaluated so far, as [`~trl_diffusion_sdpo.evaluation.sweep_row`] has them.

    Raises:
        ValueError: On a folder, a base, data or settings that cannot act together.
    """
    from ..artifacts.interpolation import ScaledWeights, check_free_folder, read_run, save_scaled  # seconds

    run = read_run(options.run, average=options.average)
    if options.baked_dir is not None:
        check_free_folder(Path(options.baked_dir), run)
    loaded = _load_base(options, run)
    trainer = _make_trainer(options, run, loaded)
    name = trainer.family.denoiser_name
    weights = ScaledWeights(trainer.denoiser, name, trainer.adapter, run.weights)
    rows = _evaluate(trainer, weights, options.scales, _settings(options, run, trainer, weights))
    if options.bake is not None:
        given = {"pipeline": trainer.pipeline, "denoiser_name": name, "adapter": trainer.adapter}
        save_scaled(Path(options.baked_dir), run=run, scale=options.bake, weights=weights, **given)
        print(f"The weights at scale {options.bake:g} are in {options.baked_dir}.")
    return rows


def _check(options: argparse.Namespace) -> None:
    """Raise `ValueError` on options that no folder and no model would make good."""
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


def _load_base(options: argparse.Namespace, run: SavedRun) -> LoadedModel:
    from ..models.loading import load_model

    origin = {"revision": options.model_revision, "dtype": options.dtype}
    loaded = load_model(options.model_name_or_path, model_init_kwargs=origin)
    run.check_base(loaded.denoiser)
    return loaded


def _make_trainer(options: argparse.Namespace, run: SavedRun, loaded: LoadedModel) -> DiffusionSDPOTrainer:
    """Around the base, which is the reference, too; it measures as the run did."""
    from transformers import PrinterCallback

    from ..trainer import DiffusionSDPOTrainer

    args, pairs = _make_args(options, run), _load_pairs(options)
    trainer = DiffusionSDPOTrainer(loaded.pipeline, None, args, None, pairs, peft_config=run.lora)
    trainer.remove_callback(PrinterCallback)
    if options.max_pairs is not None:
        trainer.eval_dataset = trainer.eval_dataset.first(options.max_pairs)
    return trainer


def _make_args(options: argparse.Namespace, run: SavedRun) -> DiffusionSDPOConfig:
    from ..trainer import DiffusionSDPOConfig

    precision = options.mixed_precision or run.setup.get("mixed_precision", "no")
    # Of the first pairs, only those are decoded that are evaluated.
    data = {} if options.max_pairs is None else {"verify_images": "none"}
    return DiffusionSDPOConfig(
        output_dir=options.output_dir or str(run.folder / DEFAULT_FOLDERS[run.of_average]),
        per_device_eval_batch_size=options.per_device_eval_batch_size,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=options.use_cpu,
        learning_rate=0.0,  # nothing trains here
        dataset_format=options.dataset_format,
        report_to="none",
        disable_tqdm=True,  # one bar over all scales in place of one for each
        **data,
        **run.evaluation_settings(),
    )


def _load_pairs(options: argparse.Namespace) -> datasets.Dataset:
    from trl import ScriptArguments

    from .pair_arguments import load_split

    script_args = ScriptArguments(dataset_name=options.dataset_name, dataset_config=options.dataset_config)
    return load_split(script_args, options.dataset_test_split)


def _settings(
    options: argparse.Namespace, run: SavedRun, trainer: DiffusionSDPOTrainer, weights: ScaledWeights
) -> dict[str, Any]:
    """What rows of one file have in common."""
    used = {name: trainer.args.to_dict()[name] for name in (*run.evaluation_settings(), "beta", "resolution")}
    return {
        "weights": weights.fingerprint,
        "base": run.setup["weights_before_training"],
        "average": run.of_average,
        "dataset_name": options.dataset_name,
        "dataset_config": options.dataset_config,
        "dataset_test_split": options.dataset_test_split,
        "dataset_format": options.dataset_format,
        "pairs": len(trainer.eval_dataset),
        "mixed_precision": trainer.args.mixed_precision,
        **used,
    }


def _evaluate(
    trainer: DiffusionSDPOTrainer, weights: ScaledWeights, scales: Sequence[float], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Add the scales that are missing to what the output folder holds, each as soon as it is evaluated; then draw."""
    from tqdm.auto import tqdm

    folder = Path(trainer.args.output_dir)
    file = folder / SWEEP_FILE
    rows = read_sweep(file, settings)
    missing = sorted(set(scales) - {row["scale"] for row in rows})
    steps = len(missing) * len(trainer.get_eval_dataloader())
    with tqdm(total=steps, desc="Scales", unit="batch", disable=not missing) as bar:
        trainer.add_callback(_tell_of_batches(bar.update))
        for scale in missing:
            bar.set_postfix_str(f"scale {scale:g}")
            with weights.active(scale):
                rows.append(sweep_row(scale, trainer.evaluate()))
            rows.sort(key=lambda row: row["scale"])
            write_sweep(file, settings, rows)
    plot_scale_sweep(rows, trainer.args.num_noise_bins, folder / PICTURE_FILE)
    print(f"{sweep_table(rows)}\n\nThe numbers and the picture are in {folder}.")
    return rows


def _tell_of_batches(done: Callable[[], Any]) -> TrainerCallback:
    """A callback that tells that a batch is evaluated."""
    from transformers import TrainerCallback

    class BatchCallback(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any):
            done()

    return BatchCallback()

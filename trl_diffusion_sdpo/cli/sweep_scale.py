"""`trl-diffusion-sdpo sweep-scale`: evaluates weights of a run between reference (scale 0) and policy (scale 1), writes
the results as JSON, table and plot, and can save the weights at one scale."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..import_utils import require
from . import EXIT_OK
from .errors import reading_data
from .options import OneLineParser

if TYPE_CHECKING:
    import datasets
    from transformers import TrainerCallback

    from ..artifacts.interpolation import SavedRun, ScaledWeights
    from ..trainer import DiffusionSDPOConfig, DiffusionSDPOTrainer

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
PRECISIONS = ("no", "bf16", "fp16")
DEFAULT_FOLDERS = {False: "scale_sweep", True: "scale_sweep_ema"}  # in the run's folder, by --average
SWEEP_FILE, PLOT_FILE = "sweep.json", "sweep.png"
# Key of a row -> its metric, and its heading in the table.
VALUES = {
    "margin": ("rewards/margins", "margin"),
    "accuracy": ("rewards/accuracies", "accuracy"),
    "winner_change": ("errors/winner_change", "winner change"),
    "loser_change": ("errors/loser_change", "loser change"),
}
_WINNER_AT = "errors/winner_change_relative@"


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        description=(
            "Evaluate a run at several scales between the base it started from (0) and its tuned weights (1). Writes "
            "the numbers, and a plot of margin and accuracy against the change of the winners' error. A second call "
            "evaluates only the missing scales."
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
    return parser


def run(arguments: list[str], prog: str) -> int:
    options = make_parser(prog).parse_args(arguments)
    _check(options)
    require("plots", "Plotting a sweep over scales")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    sweep(options)
    return EXIT_OK


def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Evaluate the missing scales, plot all of them, and save the weights of `--bake`. Returns all rows.

    Raises:
        ValueError: On a folder, base, data or settings that do not fit together.
    """
    from ..artifacts.interpolation import ScaledWeights, check_free_folder, read_run  # seconds

    run = read_run(options.run, average=options.average)
    if options.baked_dir is not None:
        check_free_folder(Path(options.baked_dir), run)
    trainer = _make_trainer(options, run)
    weights = ScaledWeights(trainer.weight_files, run)
    rows = _evaluate(trainer, weights, options.scales, _settings(options, run, trainer, weights))
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


def _make_trainer(options: argparse.Namespace, run: SavedRun) -> DiffusionSDPOTrainer:
    """A trainer of the base, which is also the reference, with the run's evaluation settings."""
    from transformers import PrinterCallback

    from ..models.loading import load_model
    from ..runs.starting_point import base_of_run, starting_point
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
    from ..settings.declaring import EVALUATION
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

    folder = Path(trainer.args.output_dir)
    file = folder / SWEEP_FILE
    rows = read_sweep(file, settings)
    missing = sorted(set(scales) - {row["scale"] for row in rows})
    steps = len(missing) * len(trainer.get_eval_dataloader())
    with tqdm(total=steps, desc="Scales", unit="batch", disable=not missing) as bar:
        trainer.add_callback(_batch_callback(bar.update))
        for scale in missing:
            bar.set_postfix_str(f"scale {scale:g}")
            with weights.active(scale):
                rows.append(sweep_row(scale, trainer.evaluate()))
            rows.sort(key=lambda row: row["scale"])
            write_sweep(file, settings, rows)
    plot_scale_sweep(rows, trainer.args.num_noise_bins, folder / PLOT_FILE)
    print(f"{sweep_table(rows)}\n\nThe numbers and the plot are in {folder}.")
    return rows


def _batch_callback(on_batch: Callable[[], Any]) -> TrainerCallback:
    """A callback that calls `on_batch` after each evaluated batch."""
    from transformers import TrainerCallback

    class BatchCallback(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any):
            on_batch()

    return BatchCallback()


def sweep_row(scale: float, metrics: Mapping[str, float], prefix: str = "eval") -> dict[str, Any]:
    """The metrics of `evaluate`, with a reference, at one scale as a row of the sweep.

    Returns:
        `dict[str, Any]`: `scale`, `margin`, `accuracy`, `winner_change`, `loser_change`, `winner_change_relative` (to
        the reference's error), and `winner_change_relative_at`, the same by noise bin.
    """
    row: dict[str, Any] = {"scale": scale}
    row |= {key: metrics[f"{prefix}_{metric}"] for key, (metric, _) in VALUES.items()}
    before = metrics[f"{prefix}_errors/winner"] - row["winner_change"]
    row["winner_change_relative"] = row["winner_change"] / before if before else 0.0
    start = f"{prefix}_{_WINNER_AT}"
    bins = {name.removeprefix(start): value for name, value in metrics.items() if name.startswith(start)}
    row["winner_change_relative_at"] = {noise_bin: bins[noise_bin] for noise_bin in sorted(bins, key=int)}
    return row


def read_sweep(file: str | Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier sweep, which this one continues; none if there is no file.

    Raises:
        ValueError: If the file is not of a sweep, or of one with other settings.
    """
    file = Path(file)
    if not file.is_file():
        return []
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        rows, theirs = stored["rows"], stored["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no sweep. Remove it, or write to another folder.") from error
    ours = json.loads(json.dumps(dict(settings)))
    differing = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if differing:
        listed = "; ".join(f"{name} was {theirs.get(name)!r}, is {ours.get(name)!r}" for name in differing)
        raise ValueError(f"{file} is of a sweep with other settings: {listed}. Write to another folder, or remove it.")
    return rows


def write_sweep(file: str | Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows with their settings, atomically."""
    file = Path(file)
    draft = file.with_name(f"{file.name}.new")
    draft.write_text(json.dumps({"settings": dict(settings), "rows": list(rows)}, indent=2) + "\n", encoding="utf-8")
    draft.replace(file)


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table for the terminal."""
    heads = ["scale", *(head for _, head in VALUES.values()), "winner change, %", "in the worst noise bin, %"]
    lines = [heads]
    for row in rows:
        worst = max(row["winner_change_relative_at"].values(), default=math.nan)
        shares = [f"{100 * share:+.3f}" for share in (row["winner_change_relative"], worst)]
        lines.append([f"{row['scale']:g}", *(f"{row[key]:.5g}" for key in VALUES), *shares])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def plot_scale_sweep(rows: Sequence[Mapping[str, Any]], num_noise_bins: int, file: str | Path) -> None:
    """Plot margin and accuracy of one or more rows against the winners' change: overall, and for each noise bin.

    The accuracy at scale 0 is left out: all margins are 0 there, and none is above 0.
    """
    from matplotlib import colormaps  # seconds to import, and an extra
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: row["scale"])
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for (overall, by_bin), metric in zip(panels, ("margin", "accuracy"), strict=True):
        shown = [row for row in rows if metric == "margin" or row["scale"] > 0]
        overall.plot([row["winner_change"] for row in shown], [row[metric] for row in shown], marker="o")
        for row in shown:
            at = (row["winner_change"], row[metric])
            overall.annotate(f"{row['scale']:g}", at, (5, 5), textcoords="offset points")
        for noise_bin in range(num_noise_bins):
            points = [
                (100 * row["winner_change_relative_at"][str(noise_bin)], row[metric])
                for row in shown
                if str(noise_bin) in row["winner_change_relative_at"]
            ]
            if points:
                label = f"{noise_bin / num_noise_bins:.3g} to {(noise_bin + 1) / num_noise_bins:.3g}"
                colour = colormaps["viridis"](noise_bin / max(1, num_noise_bins - 1))
                by_bin.plot(*zip(*points, strict=True), marker=".", color=colour, linewidth=1.2, label=label)
        overall.set_ylabel(metric)
        for panel in (overall, by_bin):
            panel.axvline(0, color="black", linewidth=0.8)
            panel.grid(alpha=0.25)
    panels[0, 0].set_title("all noise levels; the numbers are scales")
    panels[0, 1].set_title("winners' change in each noise bin")
    panels[1, 0].set_xlabel("change of the winners' error")
    panels[1, 1].set_xlabel("change of the winners' error, % of the reference's")
    if panels[0, 1].lines[:-1]:
        panels[0, 1].legend(title="noise level", frameon=False, fontsize="small")
    figure.savefig(file, dpi=120)

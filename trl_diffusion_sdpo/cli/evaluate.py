"""`trl-diffusion-sdpo evaluate`: images of several models, their scores, win rates and a report."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from . import EXIT_OK
from .errors import reading_data
from .options import OneLineParser
from .scorers import load_scorers, mapping_option

if TYPE_CHECKING:
    from ..evaluation import Candidate
    from ..evaluation.images import ImageSettings

LAYOUTS = ("geneval", "dpg", "t2i-compbench", "hpsv2")
DTYPES = ("float32", "bfloat16", "float16")
# The protocol of the Diffusion-SDPO authors. Their guidance of 7.5 counts from 0, and that of diffusers from 1.
AUTHORS = {"num_inference_steps": 50, "guidance_scale": 8.5}


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        description=(
            "Compare models: generate images of the same prompts from the same noise, score them, and write win rates "
            "against the first model and a report. A second call goes on where the first ended. Under `accelerate "
            "launch -m trl_diffusion_sdpo evaluate` all processes share the work."
        ),
    )
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        required=True,
        metavar="NAME=MODEL",
        help="Models, the base first: a Hub id, a folder of a pipeline or a run's output folder. `NAME=MODEL+LORA` "
        "puts a LoRA on it, and `NAME=MODEL@SCALE` scales what training changed.",
    )
    add(
        "--scales",
        type=float,
        nargs="+",
        default=[],
        metavar="SCALE",
        help="Evaluate each model after the base at these scales: 1 is the tuned model, larger scales go further. The "
        "report recommends one, and a run's model card gets it.",
    )
    add(
        "--form",
        choices=["guidance", "weights"],
        default="guidance",
        help="Scale the predictions by preference guidance, or the weights (default: guidance).",
    )
    add(
        "--interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="Noise levels at which guidance acts, such as 0 0.62; all if unset.",
    )
    add("--prompts", required=True, metavar="FILE", help="Prompts: a .txt, .json, .jsonl or .csv file, or a data set.")
    add("--prompt_column", metavar="NAME", help="Column of the prompts; `prompt`, `caption` or `text` if unset.")
    add("--prompt_split", default="test", metavar="NAME", help="Split of a data set of prompts (default: test).")
    add("--max_prompts", type=int, metavar="N", help="Use the first N prompts only.")
    add(
        "--scorers",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Scorers, such as pickscore hpsv2.1 image_reward, or your own `module:function`. Without any, the report "
        "only shows images.",
    )
    add(
        "--scorer_settings",
        type=mapping_option,
        default={},
        metavar="JSON",
        help='Such as {"hpsv2.1": {"batch_size": 4}}.',
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        metavar="N",
        help="One image of each prompt for each (default: 0).",
    )
    add(
        "--protocol",
        choices=["authors"],
        help="`authors`: 50 steps, guidance 8.5, the noise of a seed for all prompts.",
    )
    add(
        "--layout",
        choices=LAYOUTS,
        help="Also arrange the images as this benchmark reads them, in a folder of its name. `--prompts` is then the "
        "benchmark's own file.",
    )
    add("--call_kwargs", type=mapping_option, default={}, metavar="JSON", help="Arguments of the pipelines' calls.")
    add("--batch_size", type=int, default=4, metavar="N", help="Images generated at once (default: 4).")
    add("--dtype", choices=DTYPES, default="float32", help="Dtype of the pipelines (default: float32).")
    add("--device", metavar="NAME", help="Device of pipelines and scorers; the fastest there is if unset.")
    add(
        "--output_dir", required=True, metavar="FOLDER", help="Folder of images, scores, results.json and report.html."
    )
    return parser


def run(arguments: list[str], prog: str) -> int:
    options = make_parser(prog).parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    from accelerate import PartialState

    from ..evaluation import evaluate_models
    from ..evaluation.prompts import read_prompts
    from ..evaluation.report import REPORT_FILE, scale_sentence, verdict_sentence

    # Processes that are done wait for the slowest one. The default of ten minutes is too short for that.
    state = PartialState(cpu=options.device == "cpu", timeout=timedelta(days=1))
    device = options.device or str(state.device)
    candidates = _candidates(options)
    with reading_data(options.prompts):
        listed = read_prompts(options.prompts, column=options.prompt_column, split=options.prompt_split)
    if options.max_prompts is not None:
        listed = listed.first(options.max_prompts)
    scorers = load_scorers(options.scorers, options.scorer_settings)
    settings = _image_settings(options, device)
    evaluation = evaluate_models(candidates, listed, scorers, options.output_dir, settings, options.layout)
    if state.is_main_process:
        for comparison in evaluation.comparisons:
            print(verdict_sentence(comparison, evaluation.models[0]))
        for sweep in evaluation.sweeps:
            for scorer in evaluation.scores:
                print(scale_sentence(sweep, scorer))
        for note in evaluation.notes:
            print(note)
        print(f"The report is {options.output_dir}/{REPORT_FILE}.")
        if options.layout:
            print(f"The images for {options.layout} are in {options.output_dir}/{options.layout}.")
    state.wait_for_everyone()  # a launcher ends the other processes when the first has exited
    state.destroy_process_group()  # otherwise its threads can abort the process while Python exits
    return EXIT_OK


def _candidates(options: argparse.Namespace) -> list[Candidate]:
    from ..evaluation.scales import at_scales

    interval = options.interval and tuple(options.interval)
    candidates = [replace(candidate_of(text), form=options.form, interval=interval) for text in options.models]
    if not options.scales:
        return candidates
    base, *others = candidates
    return [base, *(one for other in others for one in at_scales(other, options.scales))]


def candidate_of(text: str) -> Candidate:
    """Read `NAME=MODEL`, `NAME=MODEL+LORA` or either with `@SCALE` at its end.

    Raises:
        `ValueError`: If there is no name, or the scale is no number.
    """
    from ..evaluation import Candidate

    name, equals, model = text.partition("=")
    if not equals or not model:
        raise ValueError(f"`--models` must be NAME=MODEL, got {text!r}.")
    model, _, scale = model.partition("@")
    model, _, lora = model.partition("+")
    try:
        number = float(scale) if scale else None
    except ValueError as error:
        raise ValueError(f"The scale after @ must be a number, got {scale!r} in {text!r}.") from error
    return Candidate(name, model, lora or None, number)


def _image_settings(options: argparse.Namespace, device: str) -> ImageSettings:
    import torch

    from ..evaluation.images import ImageSettings

    authors = options.protocol == "authors"
    return ImageSettings(
        seeds=tuple(options.seeds),
        noise="shared" if authors else "prompt",
        call_kwargs={**(AUTHORS if authors else {}), **options.call_kwargs},
        batch_size=options.batch_size,
        dtype=getattr(torch, options.dtype),
        device=device,
    )

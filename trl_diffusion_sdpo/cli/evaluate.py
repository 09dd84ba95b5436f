"""`trl-diffusion-sdpo evaluate`: images of several models, their scores, win rates and a report."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from . import EXIT_OK
from .images import add_image_options, candidate_of, finish, image_settings, listed_prompts, load_scorers
from .options import OneLineParser

if TYPE_CHECKING:
    from ..evaluation import Candidate
    from ..evaluation.images import ImageSettings

LAYOUTS = ("geneval", "dpg", "t2i-compbench", "hpsv2")
# The protocol of the Diffusion-SDPO authors. Their guidance of 7.5 counts from 0, and that of diffusers from 1.
AUTHORS = {"num_inference_steps": 50, "guidance_scale": 8.5}


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        description=(
            "Compare models: generate images of the same prompts from the same noise, score them, and write win rates "
            "against the first model and a report. Without scorers, the report only shows images. A second call goes "
            "on where the first ended. Under `accelerate launch -m trl_diffusion_sdpo evaluate` all processes share "
            "the work."
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
    form = "Scale the predictions by preference guidance, or the weights (default: guidance)."
    add("--form", choices=["guidance", "weights"], default="guidance", help=form)
    interval = "Noise levels at which guidance acts, such as 0 0.62; all if unset."
    add("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=interval)
    seeds = "One image of each prompt for each (default: 0)."
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help=seeds)
    protocol = "`authors`: 50 steps, guidance 8.5, the noise of a seed for all prompts."
    add("--protocol", choices=["authors"], help=protocol)
    add(
        "--layout",
        choices=LAYOUTS,
        help="Also arrange the images as this benchmark reads them, in a folder of its name. `--prompts` is then the "
        "benchmark's own file.",
    )
    add_image_options(parser, prompt_split="test", is_prompts_required=True)
    output = "Folder of images, scores, results.json and report.html."
    add("--output_dir", required=True, metavar="FOLDER", help=output)
    return parser


def run(arguments: list[str], prog: str) -> int:
    options = make_parser(prog).parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    from accelerate import PartialState

    from ..evaluation import evaluate_models
    from ..evaluation.report import REPORT_FILE, scale_sentence, verdict_sentence

    # Processes that are done wait for the slowest one. The default of ten minutes is too short for that.
    state = PartialState(cpu=options.device == "cpu", timeout=timedelta(days=1))
    candidates = _candidates(options)
    prompts = listed_prompts(options)
    scorers = load_scorers(options.scorers, options.scorer_settings)
    settings = _image_settings(options, options.device or str(state.device))
    evaluation = evaluate_models(candidates, prompts, scorers, options.output_dir, settings, options.layout)
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
    finish(state)
    return EXIT_OK


def _candidates(options: argparse.Namespace) -> list[Candidate]:
    from ..evaluation.scales import at_scales

    interval = options.interval and tuple(options.interval)
    candidates = [replace(candidate_of(text), form=options.form, interval=interval) for text in options.models]
    if not options.scales:
        return candidates
    base, *tuned = candidates
    return [base, *(scaled for candidate in tuned for scaled in at_scales(candidate, options.scales))]


def _image_settings(options: argparse.Namespace, device: str) -> ImageSettings:
    if options.protocol != "authors":
        return image_settings(options, device, options.seeds)
    call_kwargs = {**AUTHORS, **options.call_kwargs}
    return image_settings(options, device, options.seeds, noise="shared", call_kwargs=call_kwargs)

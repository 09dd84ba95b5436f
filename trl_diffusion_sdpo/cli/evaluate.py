"""`trl-diffusion-sdpo evaluate`: generate images with several models, score them, and write win rates and a report."""

from __future__ import annotations

import argparse
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from ..utils.errors import UserError
from . import EXIT_OK
from .images import add_image_options, candidate_of, finish, image_settings, listed_prompts, load_scorers, show_log
from .options import OneLineParser

if TYPE_CHECKING:
    from ..tools.evaluation import Candidate
    from ..tools.evaluation.images import ImageSettings

# How the Diffusion-SDPO authors generate images. No guidance is scale 0 in their code and 1 in diffusers, so their 7.5
# is 8.5 here.
AUTHORS = {"num_inference_steps": 50, "guidance_scale": 8.5}


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=prog,
        description=(
            "Compare models: generate images for the same prompts from the same noise, score them, and write a report "
            "with each model's win rate against the first. Without scorers, it only shows the images. After an "
            "interruption, run the same command again to continue. For several GPUs: `accelerate launch -m "
            "trl_diffusion_sdpo evaluate`."
        ),
    )
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        required=True,
        metavar="NAME=MODEL",
        help="Models, the base model first. MODEL is a Hub id, the folder of a pipeline or the output folder of a run. "
        "`NAME=MODEL+LORA` adds a LoRA. `NAME=MODEL@SCALE` multiplies its difference from the base model by SCALE.",
    )
    add(
        "--scales",
        type=float,
        nargs="+",
        default=[],
        metavar="SCALE",
        help="Evaluate each tuned model with its difference from the base model multiplied by each SCALE: 1 is the "
        "tuned model, larger scales move further away from the base. The report recommends one, and so does the model "
        "card if the model is a training run.",
    )
    form = "What a scale multiplies: the change of predictions (`guidance`, the default) or of weights."
    add("--form", choices=["guidance", "weights"], default="guidance", help=form)
    interval = "Lowest and highest noise level at which preference guidance acts, such as 0 0.62; all levels if unset."
    add("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=interval)
    seeds = "Seeds of the images, one image of each prompt per seed (default: 0)."
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help=seeds)
    protocol = (
        "`authors` generates as the Diffusion-SDPO authors do: 50 Euler steps, guidance 8.5, the same noise for all "
        "prompts, SDXL's empty negative prompt encoded, networks in bfloat16 (or `--dtype`) and the VAE in float32."
    )
    add("--protocol", choices=["authors"], help=protocol)
    add_image_options(parser, prompt_split="test", is_prompts_required=True)
    parser.set_defaults(dtype=None)
    output = "Folder for images, scores, results.json and report.html."
    add("--output_dir", required=True, metavar="FOLDER", help=output)
    return parser


def run(arguments: list[str], prog: str) -> int:
    options = make_parser(prog).parse_args(arguments)
    show_log()
    from accelerate import PartialState

    from ..tools.evaluation import evaluate_models
    from ..tools.evaluation.report import REPORT_FILE, scale_sentence, verdict_sentence

    # Processes wait for the slowest, which can take longer than the default timeout of ten minutes.
    state = PartialState(cpu=options.device == "cpu", timeout=timedelta(days=1))
    candidates = _candidates(options)
    prompts = listed_prompts(options)
    settings = _image_settings(options, options.device or str(state.device))
    scorers = load_scorers(options.scorers, options.scorer_settings)
    evaluation = evaluate_models(candidates, prompts, scorers, options.output_dir, settings)
    if state.is_main_process:
        for comparison in evaluation.comparisons:
            print(verdict_sentence(comparison, evaluation.models[0]))
        for sweep in evaluation.sweeps:
            for scorer in evaluation.scores:
                print(scale_sentence(sweep, scorer))
        for note in evaluation.notes:
            print(note)
        print(f"The report is in {options.output_dir}/{REPORT_FILE}.")
    finish(state)
    return EXIT_OK


def _candidates(options: argparse.Namespace) -> list[Candidate]:
    from ..tools.evaluation.scales import at_scales

    interval = options.interval and tuple(options.interval)
    candidates = [replace(candidate_of(text), form=options.form, interval=interval) for text in options.models]
    if not options.scales:
        return candidates
    base, *tuned = candidates
    if not tuned:
        raise UserError("`--scales` scales the models after the first, the base, and got the base alone. Add one.")
    return [base, *(scaled for candidate in tuned for scaled in at_scales(candidate, options.scales))]


def _image_settings(options: argparse.Namespace, device: str) -> ImageSettings:
    if options.protocol is None:
        return image_settings(options, device, options.seeds)
    options.dtype = options.dtype or "bfloat16"
    call_kwargs = {**AUTHORS, **options.call_kwargs}
    return image_settings(
        options, device, options.seeds, noise="shared", call_kwargs=call_kwargs, protocol=options.protocol
    )

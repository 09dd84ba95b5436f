"""The options of all commands that generate and score images, and what reads them."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..utils.errors import UserError
from .errors import reading_data
from .train_parser import is_first_process

if TYPE_CHECKING:
    from accelerate import PartialState

    from ..tools.evaluation import Candidate
    from ..tools.evaluation.images import ImageSettings
    from ..tools.evaluation.prompts import PromptList
    from ..tools.rewards import Scorer

DTYPES = ("float32", "bfloat16", "float16")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def add_image_options(parser: argparse.ArgumentParser, *, prompt_split: str, is_prompts_required: bool) -> None:
    """Add the options for prompts, scorers and generated images."""
    add = parser.add_argument
    prompts = "Prompts: a .txt, .json, .jsonl or .csv file, or the Hub id of a data set."
    add("--prompts", required=is_prompts_required, metavar="FILE", help=prompts)
    add("--prompt_column", metavar="NAME", help="Column of the prompts. Default: `prompt`, `caption` or `text`.")
    split = f"Split to read if the prompts are a data set (default: {prompt_split})."
    add("--prompt_split", default=prompt_split, metavar="NAME", help=split)
    add("--max_prompts", type=int, metavar="N", help="Use only the first N prompts.")
    scorers = "Scorers, such as `pickscore hpsv2.1 image_reward`, or your own function as `module:function`."
    add("--scorers", nargs="+", default=[], metavar="NAME", help=scorers)
    settings = 'Settings of each scorer by its name, such as {"hpsv2.1": {"batch_size": 4}}.'
    add("--scorer_settings", type=mapping_option, default={}, metavar="JSON", help=settings)
    add("--call_kwargs", type=mapping_option, default={}, metavar="JSON", help="Arguments of the pipelines' call.")
    add("--batch_size", type=int, default=4, metavar="N", help="Images per call of the pipeline (default: 4).")
    add("--dtype", choices=DTYPES, default="float32", help="Dtype of the pipelines (default: float32).")
    add("--device", metavar="NAME", help="Device for pipelines and scorers. Default: a GPU if there is one, else cpu.")


def show_log() -> None:
    """Print this package's log in the first process, and warnings in all processes."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if is_first_process():
        logging.getLogger(__package__.partition(".")[0]).setLevel(logging.INFO)


def mapping_option(text: str) -> dict[str, Any]:
    """Parse a JSON object."""
    try:
        mapping = json.loads(text)
    except (ValueError, RecursionError):  # numbers and brackets by the thousand too
        mapping = None
    if not isinstance(mapping, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text[:200]!r}")
    return mapping


def listed_prompts(options: argparse.Namespace) -> PromptList:
    """Return the prompts in the file or data set of `--prompts`."""
    from ..tools.evaluation.prompts import read_prompts

    with reading_data(options.prompts):
        prompts = read_prompts(options.prompts, column=options.prompt_column, split=options.prompt_split)
    return prompts if options.max_prompts is None else prompts.first(options.max_prompts)


def image_settings(options: argparse.Namespace, device: str, seeds: Sequence[int], **more: Any) -> ImageSettings:
    """Return the settings for generating images from the options, overridden by `more`."""
    import torch

    from ..tools.evaluation.images import ImageSettings

    settings = {
        "call_kwargs": options.call_kwargs,
        "batch_size": options.batch_size,
        "dtype": getattr(torch, options.dtype or "float32"),
        "device": device,
    }
    return ImageSettings(seeds=tuple(seeds), **{**settings, **more})


def candidate_of(text: str) -> Candidate:
    """Return the model that `NAME=MODEL` or `NAME=MODEL+LORA` describes. Both forms may end with `@SCALE`."""
    from ..tools.evaluation import Candidate

    name, _, source = text.partition("=")
    if not source:
        raise UserError(
            f"Each entry of `--models` must be NAME=MODEL, got {text!r}. Put a name and `=` before the model."
        )
    # Paths may contain `@` and `+`: take the first reading whose parts are existing paths or Hub ids.
    readings = list(_readings(source))
    model, lora, scale = next((one for one in readings if all(map(_is_model, filter(None, one[:2])))), readings[-1])
    try:
        number = float(scale) if scale else None
    except ValueError as error:
        raise UserError(f"The scale after `@` must be a number, got {scale!r} in {text!r}. Correct it.") from error
    return Candidate(name, model, lora or None, number)


def _readings(source: str) -> Iterator[tuple[str, str, str]]:
    """Yield each reading of `MODEL+LORA@SCALE` as model, LoRA and scale. The last two may be empty."""
    head, _, scale = source.rpartition("@")
    for rest, number in ((source, ""), (head, scale)) if head else ((source, ""),):
        yield rest, "", number
        for place in (index for index, letter in enumerate(rest) if letter == "+"):
            yield rest[:place], rest[place + 1 :], number


def _is_model(source: str) -> bool:
    return os.path.exists(source) or _HUB_ID.fullmatch(source) is not None


def scorer_named(name: str, **settings: Any) -> Scorer:
    """Load a scorer by name, or the user's `module:function`, also from the working directory."""
    from ..tools.rewards import load_scorer

    import_from_working_directory()
    return load_scorer(name, **settings)


def import_from_working_directory() -> None:
    """Put the working directory at the start of `sys.path`."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def load_scorers(names: Sequence[str], settings: Mapping[str, Any]) -> list[Scorer]:
    """Load the scorers of `--scorers` with their `--scorer_settings`."""
    for name, values in settings.items():
        if name not in names or not isinstance(values, dict):
            raise UserError(
                f"`--scorer_settings` must map names of `--scorers` to settings, got {name!r}: {values!r}. "
                'Example: {"hpsv2.1": {"batch_size": 4}}.'
            )
    return [scorer_named(name, **settings.get(name, {})) for name in names]


def finish(state: PartialState) -> None:
    """Wait until all processes are done, then destroy the process group."""
    state.wait_for_everyone()  # a launcher kills the others when the first one has exited
    state.destroy_process_group()  # its threads can crash Python at exit

"""Options of the commands that generate and score images, and what these commands read from them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import reading_data

if TYPE_CHECKING:
    from accelerate import PartialState

    from ..evaluation import Candidate
    from ..evaluation.images import ImageSettings
    from ..evaluation.prompts import PromptList
    from ..rewards import Scorer

DTYPES = ("float32", "bfloat16", "float16")


def add_image_options(parser: argparse.ArgumentParser, *, prompt_split: str, is_prompts_required: bool) -> None:
    """Add the options of prompts, scorers and generated images."""
    add = parser.add_argument
    prompts = "Prompts: a .txt, .json, .jsonl or .csv file, or a data set."
    add("--prompts", required=is_prompts_required, metavar="FILE", help=prompts)
    add("--prompt_column", metavar="NAME", help="Column of the prompts; `prompt`, `caption` or `text` if unset.")
    split = f"Split of a data set of prompts (default: {prompt_split})."
    add("--prompt_split", default=prompt_split, metavar="NAME", help=split)
    add("--max_prompts", type=int, metavar="N", help="Use the first N prompts only.")
    scorers = "Scorers, such as pickscore hpsv2.1 image_reward, or your own `module:function`."
    add("--scorers", nargs="+", default=[], metavar="NAME", help=scorers)
    settings = 'Settings of scorers by name, such as {"hpsv2.1": {"batch_size": 4}}.'
    add("--scorer_settings", type=mapping_option, default={}, metavar="JSON", help=settings)
    add("--call_kwargs", type=mapping_option, default={}, metavar="JSON", help="Arguments of the pipelines' calls.")
    add("--batch_size", type=int, default=4, metavar="N", help="Images generated at once (default: 4).")
    add("--dtype", choices=DTYPES, default="float32", help="Dtype of the pipelines (default: float32).")
    add("--device", metavar="NAME", help="Device of pipelines and scorers; the fastest there is if unset.")


def mapping_option(text: str) -> dict[str, Any]:
    """Read an option that is a mapping in JSON."""
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError:
        mapping = None
    if not isinstance(mapping, dict):
        raise argparse.ArgumentTypeError(f"must be a mapping in JSON, got {text!r}")
    return mapping


def listed_prompts(options: argparse.Namespace) -> PromptList:
    """Read the prompts that the options name."""
    from ..evaluation.prompts import read_prompts

    with reading_data(options.prompts):
        prompts = read_prompts(options.prompts, column=options.prompt_column, split=options.prompt_split)
    return prompts if options.max_prompts is None else prompts.first(options.max_prompts)


def image_settings(options: argparse.Namespace, device: str, seeds: Sequence[int], **more: Any) -> ImageSettings:
    """Return how images are generated. `more` overrides the options."""
    import torch

    from ..evaluation.images import ImageSettings

    settings = {
        "call_kwargs": options.call_kwargs,
        "batch_size": options.batch_size,
        "dtype": getattr(torch, options.dtype),
        "device": device,
    }
    return ImageSettings(seeds=tuple(seeds), **{**settings, **more})


def candidate_of(text: str) -> Candidate:
    """Read `NAME=MODEL`, `NAME=MODEL+LORA` or either with `@SCALE` at its end."""
    from ..evaluation import Candidate

    name, _, model = text.partition("=")
    if not model:
        raise ValueError(f"`--models` must be NAME=MODEL, got {text!r}.")
    model, _, scale = model.partition("@")
    model, _, lora = model.partition("+")
    try:
        number = float(scale) if scale else None
    except ValueError as error:
        raise ValueError(f"The scale after @ must be a number, got {scale!r} in {text!r}.") from error
    return Candidate(name, model, lora or None, number)


def scorer_named(name: str, **settings: Any) -> Scorer:
    """Load a scorer by its name or as `module:function`. Modules in the working directory are importable."""
    from ..rewards import load_scorer

    import_from_working_directory()
    return load_scorer(name, **settings)


def import_from_working_directory() -> None:
    """Make modules in the working directory importable."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def load_scorers(names: Sequence[str], settings: Mapping[str, Any]) -> list[Scorer]:
    """Load the scorers of `--scorers` with the settings of `--scorer_settings`."""
    for name, values in settings.items():
        if name not in names or not isinstance(values, dict):
            raise ValueError(
                f"`--scorer_settings` must map names of `--scorers` to their settings, got {name!r}: {values!r}. "
                'Write it such as {"hpsv2.1": {"batch_size": 4}}.'
            )
    return [scorer_named(name, **settings.get(name, {})) for name in names]


def finish(state: PartialState) -> None:
    """End all processes together."""
    state.wait_for_everyone()  # a launcher ends the other processes when the first has exited
    state.destroy_process_group()  # otherwise its threads can abort the process while Python exits

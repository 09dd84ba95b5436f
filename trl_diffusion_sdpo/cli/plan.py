"""`trl-diffusion-sdpo plan`: compute the memory and FLOPs of a training run without loading weights."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from . import EXIT_OK
from .options import OneLineParser, option_name, take_options
from .train_parser import read_given

if TYPE_CHECKING:
    from ..planning.prepare import PlannedSettings


def make_parser(prog: str | None = None) -> OneLineParser:
    """Return a parser for the options that only `plan` has. All other options of `plan` are those of `train`."""
    parser = OneLineParser(
        prog=prog,
        usage="%(prog)s --model_name_or_path ID [--config FILE.yaml] [--OPTION VALUE ...]",
        description="Compute the memory and the FLOPs of a training run without loading weights. The command takes all "
        "options of `train` and those below. It measures nothing and needs no GPU.",
    )
    parser.add_argument(
        "--plan_device", choices=["cuda", "cpu"], default="cuda", help="type of device to plan for (default: cuda)"
    )
    parser.add_argument(
        "--only_this", action="store_true", help="plan only these settings, without the table of other settings"
    )
    parser.add_argument(
        "--plan_pairs", type=int, default=100_000, help="number of training pairs for which hours are computed"
    )
    parser.add_argument(
        "--tflops",
        type=float,
        help="TFLOP/s that training reaches, for computing hours (default: 25, the highest in published trainings)",
    )
    parser.add_argument("--json", type=Path, help="JSON file to write all numbers to")
    return parser


def run(arguments: list[str], prog: str) -> int:
    own, words = make_parser(prog).parse_known_args(arguments)
    with _without_warnings():  # the trainer would repeat its warnings for each plan
        planned = planned_settings(words, prog, own.plan_device)
        plan = planned.plan()
        from ..planning import report

        tflops = own.tflops or report.PUBLISHED_TFLOPS
        print(report.report(plan, tflops=tflops, pairs=own.plan_pairs, processes=planned.engine.processes))
        if not own.only_this:
            plans = {name: planned.plan(**changes) for name, changes in planned.tunings().items()}
            print(f"\n{report.side_by_side(plans)}")
    if own.json is not None:
        own.json.write_text(json.dumps(report.as_json(plan), indent=1) + "\n", encoding="utf-8")
    return EXIT_OK


def planned_settings(words: list[str], prog: str | None, device: str) -> PlannedSettings:
    """Parse options of `train` into the settings of a plan.

    Args:
        device (`str`): Type of device to plan for. Unless it is `"cpu"`, plans use bf16 if neither `bf16` nor `fp16` is
            set.
    """
    from ..planning.prepare import PlannedSettings  # imported late because it takes seconds
    from ..planning.sharding import engine_of
    from .train import parse

    file, accelerate_config, _ = read_given(words)
    taken, words = take_options(words, "accelerate_config", "num_processes")
    names = {option_name(word) for word in words} | set(file)
    words = [*words, "--use_cpu", "true"]  # a plan puts nothing onto a device
    if device != "cpu" and not names & {"bf16", "fp16", "no_bf16"}:
        words += ["--bf16", "true"]
    _, training, model = parse(words, prog)
    if not model.model_name_or_path:
        raise ValueError(
            "`--model_name_or_path` must be the Hub id or folder of a diffusers pipeline, got none. Set it."
        )
    if training.deepspeed or training.fsdp:
        raise ValueError(
            "A plan reads sharding settings from `--accelerate_config` and `--num_processes`, got `--deepspeed` or "
            "`--fsdp`. Use the packaged accelerate configuration with the same sharding."
        )
    count = taken["num_processes"] or file.get("num_processes")
    return PlannedSettings(training, model, engine_of(accelerate_config, count), device)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)

"""`trl-diffusion-sdpo plan`: the peak memory of a training run, computed without loading weights."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..utils.errors import UserError
from . import EXIT_OK
from .kept_options import answer_early
from .options import OneLineParser, option_name, take_options
from .train_parser import read_given

if TYPE_CHECKING:
    from ..tools.planning.prepare import PlannedSettings


def make_parser(prog: str | None = None) -> OneLineParser:
    """Return a parser for `--help`. `plan` has the options of `train`."""
    return OneLineParser(
        prog=prog,
        usage="%(prog)s --model_name_or_path ID [--config FILE.yaml] [--OPTION VALUE ...]",
        description="Compute the peak memory of a training run on a GPU, for your settings and for LoRA, QLoRA and "
        "full tuning. Takes the options of `train` except `--deepspeed` and `--fsdp`. Loads no weights, measures "
        "nothing and needs no GPU.",
    )


def run(arguments: list[str], prog: str) -> int:
    _, words = make_parser(prog).parse_known_args(arguments)
    logging.disable(logging.WARNING)  # the trainer would repeat its warnings for each plan
    try:
        planned = planned_settings(words, prog, "cuda")
        from ..tools.planning.plan import table

        print(f"All numbers are computed. None is measured.\n\n{table(planned.plans())}")
    finally:
        logging.disable(logging.NOTSET)
    return EXIT_OK


def planned_settings(words: list[str], prog: str | None, device: str) -> PlannedSettings:
    """Parse options of `train` into the settings of the run to plan.

    Args:
        device (`str`): Device to plan for, `"cuda"` (in bf16 unless `bf16` or `fp16` is set) or `"cpu"`.
    """
    file, accelerate_config, _ = read_given(words)
    taken, words = take_options(words, "accelerate_config", "num_processes")
    answer_early(words, prog)
    from ..tools.planning.planned_engine import planned_engine
    from ..tools.planning.prepare import PlannedSettings  # takes seconds
    from .train import parse

    names = {option_name(word) for word in words} | set(file)
    words = [*words, "--use_cpu", "true"]  # planning puts no tensors onto a GPU
    if device != "cpu" and not names & {"bf16", "fp16", "no_bf16"}:
        words += ["--bf16", "true"]
    _, training, model = parse(words, prog)
    if not model.model_name_or_path:
        raise UserError(
            "`--model_name_or_path` must be the Hub id or folder of a diffusers pipeline, got none. Set it."
        )
    if training.deepspeed or training.fsdp:
        raise UserError(
            "A plan reads sharding from `--accelerate_config` and `--num_processes`, got `--deepspeed` or `--fsdp`. "
            "Use the packaged accelerate configuration with the same sharding."
        )
    count = taken["num_processes"] or file.get("num_processes")
    return PlannedSettings(training, model, planned_engine(accelerate_config, count), device)

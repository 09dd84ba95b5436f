"""`trl-diffusion-sdpo train`: trains with the arguments of a YAML file and of the command line, in this process or
under accelerate."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.import_utils import require
from . import EXIT_INTERRUPTED, EXIT_OK, launch
from .errors import reading_arguments, reading_data
from .images import import_from_working_directory
from .options import option_name, refuse_unknown
from .train_parser import check_adapter_options, check_together, is_first_process, make_parser, read_given

if TYPE_CHECKING:
    from trl import ModelConfig

    from ..trainer import DiffusionSDPOConfig, DiffusionSDPOTrainer
    from .pair_arguments import PairArguments


logger = logging.getLogger(__name__)

# Options of TRL's dataclasses that apply to language models only.
_WITHOUT_EFFECT = {"attn_implementation": None, "ignore_bias_buffers": False, "lora_task_type": "CAUSAL_LM"}


def run(arguments: list[str], prog: str, *, command: str = "train", act: Callable[..., int] | None = None) -> int:
    """Run a command with the options of this one.

    Args:
        act (`Callable`, *optional*): Takes the parsed arguments and returns the exit code; `train` by default.
    """
    launched = launch.LAUNCHED_VARIABLE in os.environ
    settings, accelerate_config, typed = read_given(arguments)
    if not launched and is_first_process() and not {"-h", "--help"} & set(typed):
        print(f"{prog}: loading the libraries.", file=sys.stderr, flush=True)  # the next line takes seconds
    parser = make_parser(prog)
    in_file, others = parser.words_of(settings)
    words = [*in_file, *typed]
    values, rest = parser.parse_known_args(words)
    if not launched:
        launcher = None
        if accelerate_config is None:
            _refuse_others(rest, others, parser.names())
        else:
            launcher = launch.launch_words(str(accelerate_config), others, rest, parser.names())
        check_together(vars(values), parser.names_in(words))
        if launcher is not None:
            return launch.start(launcher, command, arguments)
    return (act or train)(*_dataclasses(parser, words))


def parse(arguments: list[str], prog: str | None = None) -> tuple[PairArguments, DiffusionSDPOConfig, ModelConfig]:
    """Parse the arguments into dataclasses."""
    settings, accelerate_config, typed = read_given(arguments)
    parser = make_parser(prog)
    in_file, others = parser.words_of(settings)
    words = [*in_file, *typed]
    values, rest = parser.parse_known_args(words)
    if accelerate_config is not None:  # a launcher has started this process, or nothing is to be started
        others = {name: value for name, value in others.items() if name not in launch.launch_options()}
    _refuse_others(rest, others, parser.names())
    check_adapter_options(vars(values), parser.names_in(words))
    return _dataclasses(parser, words)


def _dataclasses(parser: Any, words: list[str]) -> tuple[PairArguments, DiffusionSDPOConfig, ModelConfig]:
    with reading_arguments():
        parsed = parser.parse_args_into_dataclasses(words, look_for_args_file=False, return_remaining_strings=True)
    return parsed[:3]


def _refuse_others(words: list[str], keys: dict[str, Any], options: list[str]) -> None:
    """Raise `ValueError` on unknown options. The message names the nearest option, or how to set the launcher's
    options."""
    if not words and not keys:
        return
    launchers = {*launch.launch_options()} & {*(option_name(word) for word in words), *keys}
    if launchers:
        listed = ", ".join(f"`--{name}`" for name in sorted(launchers))
        raise ValueError(f"Options of `accelerate launch` need `--accelerate_config`; got {listed} without it.")
    refuse_unknown([*words, *(f"--{key}" for key in keys)], options)


def train(script_args: PairArguments, training_args: DiffusionSDPOConfig, model_args: ModelConfig) -> int:
    """Load, train, save, and publish with `push_to_hub`.

    Returns:
        `int`: The exit code: 0, or 130 if the run was interrupted and has written a checkpoint.
    """
    from ..saving.interrupts import CheckpointOnInterrupt, resume_hint  # takes seconds

    interrupt = CheckpointOnInterrupt()
    trainer = build_trainer(script_args, training_args, model_args, interrupt)
    with trainer.run_folder.locked(all_processes=True):  # holds the lock until the last file is written
        try:
            trainer.train(resume_from_checkpoint=resume_point(training_args.resume_from_checkpoint))
        finally:
            interrupt.restore_handlers()
        if interrupt.interrupted:
            how = "To resume, run the same command with\n  --resume_from_checkpoint true"
            hint = resume_hint(trainer.args, trainer.state.global_step, how)
            trainer.accelerator.print(f"\nInterrupted; {hint}")
        elif training_args.push_to_hub:
            trainer.push_to_hub()  # saves first
            trainer.accelerator.print(f"Published as {trainer.hub_model_id}.")
        else:
            trainer.save_model(training_args.output_dir)
        if not interrupt.interrupted:
            trainer.accelerator.print(f"The tuned weights are in {training_args.output_dir}.")
    trainer.accelerator.wait_for_everyone()  # a launcher may end the other processes when the first has exited
    trainer.accelerator.end_training()
    return EXIT_INTERRUPTED if interrupt.interrupted else EXIT_OK


def build_trainer(
    script_args: PairArguments, training_args: DiffusionSDPOConfig, model_args: ModelConfig, *callbacks: Any
) -> DiffusionSDPOTrainer:
    """Load the data and return the trainer of these arguments."""
    from trl import get_peft_config, get_quantization_config

    from ..trainer import DiffusionSDPOTrainer  # takes seconds: after the arguments are checked
    from .pair_arguments import public_name

    if model_args.load_in_4bit or model_args.load_in_8bit:
        require("quantization", "A quantized base")

    if training_args.sample_scorers:
        import_from_working_directory()
    train_dataset, eval_dataset = load_data(script_args, training_args, model_args)
    trainer = DiffusionSDPOTrainer(
        model_args.model_name_or_path,
        None,
        training_args,
        train_dataset,
        eval_dataset,
        callbacks=list(callbacks),
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.dataset_name = public_name(script_args)
    return trainer


def load_data(script_args: PairArguments, training_args: DiffusionSDPOConfig, model_args: ModelConfig) -> tuple:
    """Return the pairs for training and for evaluation. Also complete `training_args.model_init_kwargs`."""
    from .pair_arguments import load_datasets  # takes seconds

    # Log the trainer's choices and the dropped pairs on the main process.
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    package = __package__.partition(".")[0]
    logging.getLogger(package).setLevel(logging.INFO if training_args.should_log else logging.WARNING)
    settings = {**vars(script_args), **vars(model_args)}
    for name, default in _WITHOUT_EFFECT.items():
        if settings[name] != default:
            logger.warning("`%s=%s` has no effect on a diffusers pipeline.", name, settings[name])
    init_kwargs = training_args.model_init_kwargs or {}
    if not isinstance(init_kwargs, dict):
        raise ValueError(f"`model_init_kwargs` must be a JSON object, got {init_kwargs!r}.")
    # `model_init_kwargs` override TRL's model arguments.
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        **init_kwargs,
    }
    with reading_data(script_args.dataset_name):
        return load_datasets(script_args, training_args)


def resume_point(value: str | bool | None) -> str | bool | None:
    """Return `resume_from_checkpoint` for `Trainer.train`. The setting is a folder, `True` for the newest checkpoint,
    `"latest"` for the newest checkpoint if there is one, or `None` for a new start.
    """
    from ..saving.checkpoints import LATEST, meaning  # takes seconds

    point = meaning(value)
    if isinstance(point, str) and point != LATEST and not Path(point).is_dir():
        raise ValueError(
            f"`resume_from_checkpoint` must be `true`, `{LATEST}` or a checkpoint's folder, and there is no folder "
            f"{point}."
        )
    return point

"""`trl-diffusion-sdpo train`: train with options from a YAML file and the command line, in this process or in processes
that accelerate launches."""

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

# Options of TRL's dataclasses that apply to language models only -> their defaults.
_WITHOUT_EFFECT = {"attn_implementation": None, "ignore_bias_buffers": False, "lora_task_type": "CAUSAL_LM"}


def run(arguments: list[str], prog: str, *, command: str = "train", act: Callable[..., int] | None = None) -> int:
    """Parse the options of `train`, and run `train` or another command with them.

    Args:
        command (`str`): Name of the command, which accelerate runs again in the processes that it starts.
        act (`Callable`, *optional*): Function that runs the command: it takes the parsed options and returns the
            exit code. If unset, [`train`] is used.
    """
    launched = launch.LAUNCHED_VARIABLE in os.environ
    settings, accelerate_config, typed = read_given(arguments)
    if not launched and is_first_process() and not {"-h", "--help"} & set(typed):
        print(f"{prog}: loading libraries.", file=sys.stderr, flush=True)  # the next line takes seconds
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
    """Parse options from the command line and the YAML file into dataclasses."""
    settings, accelerate_config, typed = read_given(arguments)
    parser = make_parser(prog)
    in_file, others = parser.words_of(settings)
    words = [*in_file, *typed]
    values, rest = parser.parse_known_args(words)
    if accelerate_config is not None:  # options of `accelerate launch` are not for this process
        others = {name: value for name, value in others.items() if name not in launch.launch_options()}
    _refuse_others(rest, others, parser.names())
    check_adapter_options(vars(values), parser.names_in(words))
    return _dataclasses(parser, words)


def _dataclasses(parser: Any, words: list[str]) -> tuple[PairArguments, DiffusionSDPOConfig, ModelConfig]:
    with reading_arguments():
        parsed = parser.parse_args_into_dataclasses(words, look_for_args_file=False, return_remaining_strings=True)
    return parsed[:3]


def _refuse_others(words: list[str], keys: dict[str, Any], options: list[str]) -> None:
    """Raise `ValueError` for unknown options. The message suggests the most similar option. For an option of
    `accelerate launch`, the message says that `--accelerate_config` is missing."""
    if not words and not keys:
        return
    launchers = {*launch.launch_options()} & {*(option_name(word) for word in words), *keys}
    if launchers:
        listed = ", ".join(f"`--{name}`" for name in sorted(launchers))
        raise ValueError(
            f"Options of `accelerate launch` need `--accelerate_config`, got {listed} without it. Add "
            "`--accelerate_config`, or leave these options out."
        )
    refuse_unknown([*words, *(f"--{key}" for key in keys)], options)


def train(script_args: PairArguments, training_args: DiffusionSDPOConfig, model_args: ModelConfig) -> int:
    """Load model and data, train, and save the tuned weights. With `push_to_hub`, also upload them.

    Returns:
        `int`: The exit code: 0, or 130 if the run was interrupted and has written a checkpoint.
    """
    from ..saving.interrupts import CheckpointOnInterrupt, resume_hint  # slow import

    interrupt = CheckpointOnInterrupt()
    trainer = build_trainer(script_args, training_args, model_args, interrupt)
    with trainer.run_folder.locked(all_processes=True):  # until the last file is written
        try:
            trainer.train(resume_from_checkpoint=resume_point(training_args.resume_from_checkpoint))
        finally:
            interrupt.restore_handlers()
        if interrupt.interrupted:
            how = "To resume, run the same command with\n  --resume_from_checkpoint true"
            hint = resume_hint(trainer.args, trainer.state.global_step, how)
            trainer.accelerator.print(f"\nThe training was interrupted. {hint}")
        elif training_args.push_to_hub:
            trainer.push_to_hub()  # saves before it uploads
            trainer.accelerator.print(f"The tuned weights are on the Hub as {trainer.hub_model_id}.")
        else:
            trainer.save_model(training_args.output_dir)
        if not interrupt.interrupted:
            trainer.accelerator.print(f"The tuned weights are in {training_args.output_dir}.")
    trainer.accelerator.wait_for_everyone()  # a launcher may kill the other processes when the first one has exited
    trainer.accelerator.end_training()
    return EXIT_INTERRUPTED if interrupt.interrupted else EXIT_OK


def build_trainer(
    script_args: PairArguments, training_args: DiffusionSDPOConfig, model_args: ModelConfig, *callbacks: Any
) -> DiffusionSDPOTrainer:
    """Load the data and return a trainer for these options."""
    from trl import get_peft_config, get_quantization_config

    from ..trainer import DiffusionSDPOTrainer  # imported late because it takes seconds
    from .pair_arguments import public_name

    if model_args.load_in_4bit or model_args.load_in_8bit:
        require("quantization", "A quantized base model")

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
    """Return the training pairs and the evaluation pairs. Also write the options for the model's revision and dtype
    into `training_args.model_init_kwargs`."""
    from .pair_arguments import load_datasets  # imported late because it takes seconds

    # Only the main process logs the trainer's automatic choices and the dropped pairs.
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    package = __package__.partition(".")[0]
    logging.getLogger(package).setLevel(logging.INFO if training_args.should_log else logging.WARNING)
    settings = {**vars(script_args), **vars(model_args)}
    for name, default in _WITHOUT_EFFECT.items():
        if settings[name] != default:
            logger.warning("`%s=%s` has no effect on a diffusers pipeline.", name, settings[name])
    init_kwargs = training_args.model_init_kwargs or {}
    if not isinstance(init_kwargs, dict):
        raise ValueError(
            f'`model_init_kwargs` must be a JSON object, got {init_kwargs!r}. Example: {{"variant": "fp16"}}.'
        )
    # Entries of `model_init_kwargs` override TRL's options for the model.
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        **init_kwargs,
    }
    with reading_data(script_args.dataset_name):
        return load_datasets(script_args, training_args)


def resume_point(value: str | bool | None) -> str | bool | None:
    """Return the argument `resume_from_checkpoint` of `Trainer.train` for the option of the same name.

    The result is the folder of a checkpoint, `True` for the newest checkpoint, `"latest"` for the newest checkpoint or
    a new start if there is none, or `None` for a new start.
    """
    from ..saving.checkpoints import LATEST, meaning  # imported late because it takes seconds

    point = meaning(value)
    if isinstance(point, str) and point != LATEST and not Path(point).is_dir():
        raise ValueError(
            f"`resume_from_checkpoint` must be `true`, `{LATEST}` or the folder of a checkpoint, and there is no "
            f"folder {point}. Check the path."
        )
    return point

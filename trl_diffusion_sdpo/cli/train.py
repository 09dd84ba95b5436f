"""`trl-diffusion-sdpo train`: a run from TRL's and the trainer's arguments, in a YAML file and on the command line, in
this process or under accelerate."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..utils.import_utils import require
from . import EXIT_INTERRUPTED, EXIT_OK, launch
from .errors import reading_arguments, reading_data
from .given import Given, read_given, refuse_missing, refuse_unknown_names
from .options import OptionTable, describe, read_table
from .train_help import group_options, help_parser

if TYPE_CHECKING:
    from trl import ModelConfig, TrlParser

    from ..trainer import DiffusionSDPOConfig, DiffusionSDPOTrainer
    from .pair_arguments import PairArguments


# Options of TRL's dataclasses that apply to language models only.
_WITHOUT_EFFECT = {"attn_implementation": None, "ignore_bias_buffers": False, "lora_task_type": "CAUSAL_LM"}


def make_parser(prog: str | None = None) -> TrlParser:
    """The parser of the command, with the arguments of TRL's scripts and [`DiffusionSDPOConfig`]. Takes seconds."""
    from trl import ModelConfig, TrlParser

    from ..trainer.diffusion_sdpo_config import DiffusionSDPOConfig
    from .pair_arguments import PairArguments

    kinds: Any = (PairArguments, DiffusionSDPOConfig, ModelConfig)
    parser = TrlParser(kinds, allow_abbrev=False, **_texts(prog))
    parser.set_defaults(lora_dropout=0.0)  # with dropout, policy and reference would differ before the first step
    return parser


def describe_options() -> OptionTable:
    """The options of the installed versions. Takes seconds."""
    from transformers import TrainingArguments
    from trl import ModelConfig, ScriptArguments

    parser = make_parser()
    options = describe(parser, parser.dataclass_types)
    upstream = {field.name for kind in (ScriptArguments, TrainingArguments, ModelConfig) for field in fields(kind)}
    ours = [name for name in options if name not in upstream]
    groups = group_options(options, _holders(), TrainingArguments)
    return OptionTable(options, launch.launch_options(options), ours, groups)


def _holders() -> dict[str, Sequence[type]]:
    """The dataclasses of the options by the title under which the help lists them."""
    from trl import ModelConfig, ScriptArguments

    from ..trainer.config.data_arguments import DataArguments, RunArguments
    from ..trainer.config.model_arguments import MemoryArguments, PipelineArguments, SampleArguments
    from ..trainer.config.step_arguments import LossArguments, NoiseArguments, WinnerArguments
    from .pair_arguments import PairArguments

    return {
        "Model and data": (PairArguments, ScriptArguments),
        "LoRA and quantization": (ModelConfig,),
        "Loss and safeguard": (LossArguments,),
        "Keeping the winners": (WinnerArguments,),
        "Noise and timesteps": (NoiseArguments,),
        "Images": (DataArguments,),
        "Pipeline and reference": (PipelineArguments,),
        "Memory": (MemoryArguments,),
        "Generated samples": (SampleArguments,),
        "Run": (RunArguments,),
    }


def run(arguments: list[str], prog: str, *, command: str = "train", act: Callable[..., int] | None = None) -> int:
    """Run a command with the options of this one.

    Args:
        act (`Callable`, *optional*): Takes the parsed arguments and returns the exit code; `train` by default.
    """
    arguments = _with_one_config(arguments)
    table = _options_for(arguments, prog)
    given = read_given(arguments, table)
    os.environ.update(given.environment)
    planned = launch.plan(arguments, table.options)
    refuse_missing(given)
    return (act or train)(*_parse(given, prog)) if planned is None else launch.start(planned, command)


def parse(arguments: list[str], prog: str | None = None) -> tuple[PairArguments, DiffusionSDPOConfig, ModelConfig]:
    """Parses the arguments into dataclasses.

    Raises:
        ValueError: If an argument or the YAML file is invalid.
    """
    arguments = _with_one_config(arguments)
    given = read_given(arguments, _options_for(arguments, prog))
    os.environ.update(given.environment)
    return _parse(given, prog)


def _options_for(arguments: list[str], prog: str | None) -> OptionTable:
    """The options; prints them and exits if that is asked for."""
    table = read_table()
    if table is None:
        refuse_unknown_names(arguments)
        table = describe_options()
    if {"-h", "--help"} & set(arguments):
        help_parser(table.options, table.groups, **_texts(prog)).parse_args(["--help"])
    return table


def _parse(given: Given, prog: str | None) -> tuple[PairArguments, DiffusionSDPOConfig, ModelConfig]:
    parser = make_parser(prog)
    parser.set_defaults_with_config(**given.settings)
    with reading_arguments():
        return cast(Any, parser.parse_args_into_dataclasses(given.words, look_for_args_file=False))


def _texts(prog: str | None) -> dict[str, Any]:
    return {
        "prog": prog,
        "usage": "%(prog)s [--config FILE.yaml | EXAMPLE] [--accelerate_config NAME] --model_name_or_path ID "
        "--dataset_name ID [--OPTION VALUE ...]",
        "description": "Tune a pipeline on preference pairs. The command line overrides the YAML file of --config, "
        f"which may be the name of an example: {', '.join(launch.example_configs())}.",
        "epilog": "Dashes may stand for underscores. Options of transformers and TRL that are for language models, or "
        "do nothing here, are not listed. "
        f"--accelerate_config starts the training under accelerate: {', '.join(launch.config_names())}, or "
        "the path of a file; options of `accelerate launch`, such as --num_processes, may follow.",
    }


def train(script_args: PairArguments, training_args: DiffusionSDPOConfig, model_args: ModelConfig) -> int:
    """Load, train, save, and publish with `push_to_hub`.

    Returns:
        `int`: The exit code: 0, or 130 if it was interrupted and has written a checkpoint.
    """
    from ..saving.interrupts import CheckpointOnInterrupt

    interrupt = CheckpointOnInterrupt()
    trainer = build_trainer(script_args, training_args, model_args, interrupt)
    with trainer.run_folder.locked(all_processes=True):  # holds the lock until the last file is written
        try:
            trainer.train(resume_from_checkpoint=resume_point(training_args.resume_from_checkpoint))
        finally:
            interrupt.restore_handlers()
        if interrupt.interrupted:
            _say_how_to_resume(trainer)
        else:
            _finish(trainer, training_args)
    trainer.accelerator.wait_for_everyone()  # a launcher may end the other processes when the first has exited
    trainer.accelerator.end_training()
    return EXIT_INTERRUPTED if interrupt.interrupted else EXIT_OK


def build_trainer(
    script_args: PairArguments, training_args: DiffusionSDPOConfig, model_args: ModelConfig, *callbacks: Any
) -> DiffusionSDPOTrainer:
    """The trainer of these arguments, with the data loaded."""
    from trl import get_peft_config, get_quantization_config

    from ..trainer import DiffusionSDPOTrainer  # takes seconds: after the arguments are checked
    from .pair_arguments import public_name

    if model_args.load_in_4bit or model_args.load_in_8bit:
        require("quantization", "A quantized base")

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
    """The pairs for training and for evaluation; completes `training_args.model_init_kwargs`."""
    from .pair_arguments import load_datasets  # takes seconds

    _show_progress(training_args)
    _warn_of_ignored(script_args, model_args)
    training_args.model_init_kwargs = _init_kwargs(training_args, model_args)
    with reading_data(script_args.dataset_name):
        return load_datasets(script_args, training_args)


def resume_point(value: str | bool | None) -> str | bool | None:
    """`resume_from_checkpoint` for `Trainer.train`: a folder, `True` for the newest checkpoint, `"latest"` for the
    newest if there is one, `None` for a new start.

    Raises:
        ValueError: If the folder does not exist.
    """
    from ..saving.checkpoints import LATEST, meaning  # takes seconds

    point = meaning(value)
    if isinstance(point, str) and point != LATEST and not Path(point).is_dir():
        raise ValueError(
            f"`resume_from_checkpoint` must be `true`, `{LATEST}` or a checkpoint's folder, and there is no folder "
            f"{point}."
        )
    return point


def _with_one_config(arguments: list[str]) -> list[str]:
    """Splits `--config=FILE` into the two words that TRL's parser expects, and refuses a second one."""
    split = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if split.count("--config") > 1 or split[-1:] == ["--config"]:
        raise ValueError("`--config` takes one YAML file, once. Put the settings into one file.")
    return split


def _warn_of_ignored(script_args: PairArguments, model_args: ModelConfig) -> None:
    settings = {**vars(script_args), **vars(model_args)}
    for name, default in _WITHOUT_EFFECT.items():
        if settings[name] != default:
            logging.getLogger(__name__).warning("`%s=%s` has no effect on a diffusers pipeline.", name, settings[name])


def _init_kwargs(training_args: DiffusionSDPOConfig, model_args: ModelConfig) -> dict[str, Any]:
    """Arguments for loading the pipeline; `model_init_kwargs` override TRL's model arguments."""
    given = training_args.model_init_kwargs or {}
    if not isinstance(given, dict):
        raise ValueError(f"`model_init_kwargs` must be a JSON object, got {given!r}.")
    return {"revision": model_args.model_revision, "dtype": model_args.dtype, **given}


def _finish(trainer: DiffusionSDPOTrainer, training_args: DiffusionSDPOConfig) -> None:
    if not training_args.push_to_hub:
        trainer.save_model(training_args.output_dir)
    else:
        trainer.push_to_hub()  # saves first
        trainer.accelerator.print(f"Published as {trainer.hub_model_id}.")
    trainer.accelerator.print(f"The tuned weights are in {training_args.output_dir}.")


def _say_how_to_resume(trainer: DiffusionSDPOTrainer) -> None:
    from ..saving.interrupts import resume_hint  # takes seconds

    how = "To resume, run the same command with\n  --resume_from_checkpoint true"
    hint = resume_hint(trainer.args, trainer.state.global_step, how)
    trainer.accelerator.print(f"\nInterrupted; {hint}")


def _show_progress(training_args: DiffusionSDPOConfig) -> None:
    """Log the trainer's choices and the dropped pairs on the main process."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    package = __package__.partition(".")[0]
    logging.getLogger(package).setLevel(logging.INFO if training_args.should_log else logging.WARNING)

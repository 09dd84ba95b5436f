"""`trl-diffusion-sdpo train`: train with options from a YAML file and the command line, in this process or in those of
accelerate."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..utils.errors import UserError
from ..utils.import_utils import require
from . import EXIT_INTERRUPTED, EXIT_OK, launch
from .errors import reading_data
from .images import import_from_working_directory
from .kept_options import answer_early, keep
from .options import option_name
from .train_parser import HELP, TrainOptions, is_first_process
from .train_parser import make_parser as make_parser  # the docs build imports `make_parser` from here

if TYPE_CHECKING:
    from trl import ModelConfig

    from ..trainer import DiffusionSDPOConfig, DiffusionSDPOTrainer
    from .pair_arguments import PairArguments


logger = logging.getLogger(__name__)


def run(arguments: list[str], prog: str, *, command: str = "train", act: Callable[..., int] | None = None) -> int:
    """Parse the options of `train`, and run it or another command with them.

    Args:
        command (`str`): Command to run in the processes of accelerate.
        act (`Callable`, *optional*): Runs the command: takes the parsed options, returns the exit code. If unset,
            [`train`].
    """
    launched = launch.LAUNCHED_VARIABLE in os.environ
    alone = not launched and is_first_process()
    if alone and answer_early(arguments, prog):
        sys.exit(EXIT_OK)  # as argparse does after its help
    if alone and not HELP & set(arguments):
        print(f"{prog}: loading libraries.", file=sys.stderr, flush=True)  # the next lines take seconds
    if alone:
        keep(make_parser, prog)
    options = TrainOptions.read(arguments, prog)
    if launched:  # accelerate has already read its own options
        return (act or train)(*options.dataclasses())
    launcher = None
    if options.accelerate_config is None:
        options.refuse_others()
    else:
        launcher = launch.launch_words(options.accelerate_config, options.others, options.parser.names())
    values = options.values
    if not values["model_name_or_path"]:
        raise UserError(
            "`--model_name_or_path` must be the Hub id or folder of a diffusers pipeline, got none. Set it."
        )
    if not (values["dataset_name"] or values["datasets"]):
        raise UserError(
            "`--dataset_name` must be the Hub id, folder or file of a preference data set, got none. Set it."
        )
    if launcher is not None:
        return launch.start(launcher, command, arguments)
    return (act or train)(*options.dataclasses())


def parse(arguments: list[str], prog: str | None = None) -> tuple[PairArguments, DiffusionSDPOConfig, ModelConfig]:
    """Parse command line and YAML file into dataclasses."""
    options = TrainOptions.read(arguments, prog)
    if options.accelerate_config is not None:  # ignore the options of `accelerate launch`
        options.others = [word for word in options.others if option_name(word) not in launch.launch_options()]
    options.refuse_others()
    return options.dataclasses()


def train(script_args: PairArguments, training_args: DiffusionSDPOConfig, model_args: ModelConfig) -> int:
    """Load model and data, train, save the tuned weights, and with `push_to_hub` upload them.

    Returns:
        `int`: The exit code: 0, or 130 if the run was interrupted and has written a checkpoint.
    """
    from ..reporting.interrupts import CheckpointOnInterrupt, resume_hint  # slow import

    interrupt = CheckpointOnInterrupt()
    trainer = build_trainer(script_args, training_args, model_args, interrupt)
    with trainer.run_folder.locked(all_processes=True):  # until all files are written
        try:
            trainer.train()
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
    trainer.accelerator.wait_for_everyone()  # a launcher may kill the others when the first one has exited
    trainer.accelerator.end_training()
    return EXIT_INTERRUPTED if interrupt.interrupted else EXIT_OK


def build_trainer(
    script_args: PairArguments, training_args: DiffusionSDPOConfig, model_args: ModelConfig, *callbacks: Any
) -> DiffusionSDPOTrainer:
    """Load the data and return a trainer for these options."""
    from trl import get_quantization_config

    from ..models.adapters import lora_config
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
        peft_config=lora_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.dataset_name = public_name(script_args)
    return trainer


def load_data(script_args: PairArguments, training_args: DiffusionSDPOConfig, model_args: ModelConfig) -> tuple:
    """Return the training and evaluation pairs. Also copy the model's revision and dtype from `model_args` into
    `training_args.model_init_kwargs`."""
    from .pair_arguments import load_datasets  # imported late because it takes seconds

    # Only the main process logs the trainer's choices and the dropped pairs.
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    package = __package__.partition(".")[0]
    logging.getLogger(package).setLevel(logging.INFO if training_args.should_log else logging.ERROR)
    # Entries of `model_init_kwargs` override TRL's options for the model.
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    with reading_data(script_args.dataset_name):
        return load_datasets(script_args, training_args)

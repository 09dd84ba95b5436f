"""`trl-diffusion-sdpo encode`: encodes images and prompts as a run with the same options would, computes the errors of
its reference if they ask for it, and stops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import EXIT_OK
from . import train as training

if TYPE_CHECKING:
    from trl import ModelConfig

    from ..trainer import DiffusionSDPOConfig
    from .pair_arguments import PairArguments


def run(arguments: list[str], prog: str) -> int:
    return training.run(arguments, prog, command="encode", act=encode)


def encode(script_args: PairArguments, training_args: DiffusionSDPOConfig, model_args: ModelConfig) -> int:
    """Encode what is not encoded yet, and say where it is.

    Returns:
        `int`: The exit code.
    """
    training_args.precompute_latents = True
    training_args.push_to_hub, training_args.report_to = False, []  # nothing is trained, tracked or uploaded
    trainer: Any = training.build_trainer(script_args, training_args, model_args)
    done, folder = trainer.encoding.report, trainer.encoding.folder
    new = f"{done.encoded_images} images and {done.encoded_prompts} prompts in {done.seconds:.0f} s"
    rate = f", {done.encoded_images / done.seconds:.1f} images/s" if done.encoded_images else ""
    trainer.accelerator.print(
        f"{done.images} images, with their variants, and {done.prompts} prompts are encoded in {folder}: "
        f"{done.bytes / 2**30:.3g} GiB. Encoded now: {new}{rate}."
    )
    if training_args.precompute_ref_errors:
        trainer.precompute_reference_errors()
        trainer.accelerator.print(f"The errors of the reference are in {trainer.reference_errors_dir}.")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return EXIT_OK

"""`trl-diffusion-sdpo encode`: encodes images and prompts for a run with the same options, without training. With
`precompute_ref_errors`, the command also computes the errors of the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import EXIT_OK
from . import train as training

if TYPE_CHECKING:
    from trl import ModelConfig

    from ..cache.encoding import PairEncoding
    from ..trainer import DiffusionSDPOConfig
    from .pair_arguments import PairArguments


def run(arguments: list[str], prog: str) -> int:
    # Set it first, because the checks of other settings depend on it.
    arguments = [*arguments, "--precompute_latents", "true"]
    return training.run(arguments, prog, command="encode", act=encode)


def encode(script_args: PairArguments, training_args: DiffusionSDPOConfig, model_args: ModelConfig) -> int:
    """Encode the rows that the cache lacks, and print the folder of the cache.

    Returns:
        `int`: The exit code.
    """
    training_args.push_to_hub, training_args.report_to = False, []  # nothing is trained, tracked or uploaded
    processes = training_args.distributed_state
    if not training_args.precompute_ref_errors:
        processes.print(_summary(_encode_alone(script_args, training_args, model_args)))
    else:
        from ..cache.reference_errors import ERRORS  # takes seconds

        trainer: Any = training.build_trainer(script_args, training_args, model_args)
        processes.print(_summary(trainer.encoding))
        trainer.precompute_reference_errors()
        processes.print(f"The errors of the reference are in {trainer.encoding.folder / ERRORS}.")
    processes.wait_for_everyone()
    processes.destroy_process_group()
    return EXIT_OK


def _encode_alone(
    script_args: PairArguments, training_args: DiffusionSDPOConfig, model_args: ModelConfig
) -> PairEncoding:
    """Encode as a trainer's constructor does, without loading the denoiser's weights."""
    from trl import get_peft_config, get_quantization_config

    from ..cache.key import EncoderKey
    from ..engines.processes import peers
    from ..saving.starting_point import starting_point
    from ..trainer.components import load_policy, pair_encoding, place_frozen_components  # takes seconds
    from ..trainer.config.complete import check_resolution, complete_args, copy_and_check_args
    from ..trainer.data_preparation import check_source_column, prepare_pairs

    train_dataset, eval_dataset = training.load_data(script_args, training_args, model_args)
    model, lora = model_args.model_name_or_path, get_peft_config(model_args)
    args, loss = copy_and_check_args(model, None, training_args), training_args.loss_spec
    loaded = load_policy(model, args, None, lora, get_quantization_config(model_args), denoiser=False)
    tunes_lora = lora is not None or starting_point(str(model), args.adapter_name_or_path).adapter is not None
    complete_args(args, loaded.family, loss, full=not tunes_lora)
    check_resolution(args, loaded.family)
    frozen = place_frozen_components(loaded, args)
    key = EncoderKey(frozen, loaded, peers(args))
    encoding = pair_encoding(frozen, key, args)
    evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    for name, dataset in {"train": train_dataset, **evaluated}.items():
        if dataset is not None:
            pairs = prepare_pairs(dataset, args, loss, name=name, training=dataset is train_dataset)
            check_source_column(pairs, loaded.family, args, name=name, training=dataset is train_dataset)
            encoding.add_to(pairs, name, compare=loss.uses_loser)
    return encoding


def _summary(encoding: PairEncoding) -> str:
    done = encoding.report
    return (
        f"{done.images} images, with their variants, and {done.prompts} prompts are encoded in {encoding.folder}: "
        f"{done.bytes / 2**30:.3g} GiB. Encoded now: {done.encoded_images} images and {done.encoded_prompts} prompts."
    )

"""`trl-diffusion-sdpo encode`: encode the images and prompts of a later training run with the same options, and with
`precompute_ref_errors` compute the reference's denoising errors."""

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
    # Before parsing: checks of other options depend on it.
    arguments = [*arguments, "--precompute_latents", "true"]
    return training.run(arguments, prog, command="encode", act=encode)


def encode(script_args: PairArguments, training_args: DiffusionSDPOConfig, model_args: ModelConfig) -> int:
    """Encode all images and prompts that are not in the cache yet, and print its folder.

    Returns:
        `int`: The exit code.
    """
    training_args.push_to_hub = False  # nothing is trained, tracked or uploaded
    training_args.report_to = []
    processes = training_args.distributed_state
    if not training_args.precompute_ref_errors:
        processes.print(_summary(_encode_alone(script_args, training_args, model_args)))
    else:
        from ..cache.reference_errors import ERRORS  # imported late because it takes seconds

        trainer: Any = training.build_trainer(script_args, training_args, model_args)
        processes.print(_summary(trainer.encoding))
        trainer.precompute_reference_errors()
        processes.print(f"The reference's denoising errors are in {trainer.encoding.folder / ERRORS}.")
    processes.wait_for_everyone()
    processes.destroy_process_group()
    return EXIT_OK


def _encode_alone(
    script_args: PairArguments, training_args: DiffusionSDPOConfig, model_args: ModelConfig
) -> PairEncoding:
    """Encode the data as the trainer's constructor would, but without loading the denoiser's weights."""
    from trl import get_quantization_config

    from ..cache.key import EncoderKey
    from ..data.dataset import PreferenceDataset
    from ..engines.processes import peers
    from ..models.adapters import lora_config
    from ..saving.starting_point import starting_point
    from ..trainer.components import load_policy, pair_encoding, place_frozen_components  # slow import
    from ..trainer.config.complete import check_resolution, complete_args, copy_and_check_args
    from ..trainer.run_data import check_source_column, prepare_pairs

    train_dataset, eval_dataset = training.load_data(script_args, training_args, model_args)
    model = model_args.model_name_or_path
    lora = lora_config(model_args)
    args = copy_and_check_args(model, None, training_args)
    loss = training_args.loss_spec
    loaded = load_policy(model, args, None, lora, get_quantization_config(model_args), denoiser=False)
    tunes_lora = lora is not None or starting_point(str(model), args.adapter_name_or_path).adapter is not None
    complete_args(args, loaded.family, full=not tunes_lora)
    check_resolution(args, loaded.family)
    frozen = place_frozen_components(loaded, args)
    key = EncoderKey(frozen, loaded, peers(args))
    encoding = pair_encoding(frozen, key, args)
    evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    threshold = None
    for name, dataset in {"train": train_dataset, **evaluated}.items():
        if dataset is not None:
            is_training = dataset is train_dataset
            pairs = prepare_pairs(dataset, args, loss, name=name, training=is_training, score_threshold=threshold)
            check_source_column(pairs, loaded.family, args, name=name, training=is_training)
            assert isinstance(pairs, PreferenceDataset)  # `precompute_latents` refuses streams
            encoding.add_to(pairs, name)
            threshold = pairs.source.score_threshold if is_training else threshold
    return encoding


def _summary(encoding: PairEncoding) -> str:
    done = encoding.report
    return (
        f"The cache {encoding.folder} has {done.images} images (each random crop and flip counts) and {done.prompts} "
        f"prompts, of which this command encoded {done.encoded_images} and {done.encoded_prompts}."
    )

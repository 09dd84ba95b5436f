"""`trl-diffusion-sdpo train`: TRL's arguments and the trainer's, from a YAML file and the command line, into one
run, in this process or under accelerate."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import yaml
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from ..trainer.diffusion_sdpo_config import DiffusionSDPOConfig
from . import launch

if TYPE_CHECKING:
    from ..trainer import DiffusionSDPOTrainer

EXIT_OK = 0
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

# Files of `Dataset.save_to_disk` and `DatasetDict.save_to_disk`.
_SAVED_DATASET, _SAVED_DATASET_DICT = "state.json", "dataset_dict.json"
_FILE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}

# What TRL's dataclasses offer to language models alone; set, it would be ignored.
_WITHOUT_EFFECT = {"attn_implementation": None, "ignore_bias_buffers": False, "lora_task_type": "CAUSAL_LM"}


def make_parser(prog: str | None = None) -> TrlParser:
    """The parser of the command: the arguments of TRL's scripts with [`DiffusionSDPOConfig`]."""
    parser = TrlParser(
        (ScriptArguments, DiffusionSDPOConfig, ModelConfig),
        prog=prog,
        usage="%(prog)s [--config FILE.yaml] [--accelerate_config NAME] --model_name_or_path ID --dataset_name ID "
        "[--OPTION VALUE ...]",
        description="Tune a pipeline on preference pairs. The command line overrides the YAML file of --config.",
        epilog=f"--accelerate_config starts the training under accelerate: {', '.join(launch.config_names())}, or the "
        "path of a file; options of `accelerate launch`, such as --num_processes, may follow.",
    )
    parser.set_defaults(lora_dropout=0.0)  # dropout would part the policy from its reference at the first step
    return parser


def run(arguments: list[str], prog: str) -> int:
    arguments = _with_one_config(arguments)
    parser = make_parser(prog)
    asks_for_help = {"-h", "--help"} & set(arguments)
    planned = None if asks_for_help else launch.plan(arguments, {action.dest for action in parser._actions})
    if planned is None:
        return train(*parse(arguments, prog))
    _, own = launch.take_option(planned.arguments, "config")
    _refuse_unknown(parser.parse_known_args(own)[1])  # once here, not in every process
    return launch.start(planned, "train")


def parse(arguments: list[str], prog: str | None = None) -> tuple[ScriptArguments, DiffusionSDPOConfig, ModelConfig]:
    """Arguments as dataclasses.

    Raises:
        ValueError: If an argument or the YAML file is not as it must be.
    """
    arguments = _with_one_config(arguments)
    try:
        *parsed, unknown = make_parser(prog).parse_args_and_config(arguments, return_remaining_strings=True)
    except yaml.YAMLError as error:
        raise ValueError(f"The file of `--config` must be YAML: {error}") from error
    _refuse_unknown(_without_options(unknown, launch.keys_used_by_the_launcher()))
    return tuple(parsed)


def train(script_args: ScriptArguments, training_args: DiffusionSDPOConfig, model_args: ModelConfig) -> int:
    """One run: load, train, save, publish if asked.

    Returns:
        `int`: The exit code: 0, or 130 if it was interrupted and has left a checkpoint.
    """
    from ..trainer import DiffusionSDPOTrainer  # seconds: after the arguments are known to be good
    from ..trainer.callbacks import CheckpointOnInterrupt

    _show_progress(training_args)
    _check(script_args, model_args)
    training_args.model_init_kwargs = _init_kwargs(training_args, model_args)
    train_dataset, eval_dataset = load_datasets(script_args, with_eval=training_args.eval_strategy != "no")
    interrupt = CheckpointOnInterrupt()
    trainer = DiffusionSDPOTrainer(
        model_args.model_name_or_path,
        None,
        training_args,
        train_dataset,
        eval_dataset,
        callbacks=[interrupt],
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    try:
        trainer.train(resume_from_checkpoint=resume_point(training_args.resume_from_checkpoint))
    finally:
        interrupt.restore_handlers()
    if interrupt.interrupted:
        _say_how_to_resume(trainer)
    else:
        _finish(trainer, script_args, training_args)
    trainer.accelerator.wait_for_everyone()  # a launcher ends the others when the first is gone: all have written
    trainer.accelerator.end_training()
    return EXIT_INTERRUPTED if interrupt.interrupted else EXIT_OK


def load_datasets(script_args: ScriptArguments, *, with_eval: bool) -> tuple[Any, Any]:
    """The training split, and the evaluation split if it is wanted.

    `dataset_name` is a Hub id, a file (parquet, arrow, JSON, CSV), a folder of such files or of images, or a folder
    that `save_to_disk` wrote.

    Raises:
        ValueError: If there is no such data set or split.
    """
    splits = [script_args.dataset_train_split] + [script_args.dataset_test_split] * with_eval
    loaded = [_load_split(script_args, split) for split in splits]
    return loaded[0], loaded[1] if with_eval else None


def resume_point(value: str | bool | None) -> str | bool | None:
    """`resume_from_checkpoint` as the Trainer takes it: a folder, `True` for the newest, `"latest"` for the newest if
    there is one, `None` for a new start.

    Raises:
        ValueError: If it is a folder that is not there.
    """
    from ..trainer.checkpoint_folders import LATEST, meaning  # seconds

    point = meaning(value)
    if isinstance(point, str) and point != LATEST and not Path(point).is_dir():
        raise ValueError(
            f"`resume_from_checkpoint` must be `true`, `{LATEST}` or a checkpoint's folder, and there is no folder "
            f"{point}."
        )
    return point


def _with_one_config(arguments: list[str]) -> list[str]:
    """With `--config=FILE` in the two words that TRL's parser looks for, at most once."""
    split = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if split.count("--config") > 1 or split[-1:] == ["--config"]:
        raise ValueError("`--config` takes one YAML file, once. Put the settings into one file.")
    return split


def _without_options(words: list[str], names: list[str]) -> list[str]:
    """Without `--name value` for the names, as TRL's parser gives what it does not know of a file."""
    flags = {f"--{name}" for name in names}
    starts = [index for index, word in enumerate(words) if word in flags]
    dropped = {index + offset for index in starts for offset in (0, 1)}
    return [word for index, word in enumerate(words) if index not in dropped]


def _refuse_unknown(words: list[str]) -> None:
    if words:
        raise ValueError(
            f"These arguments are unknown: {' '.join(words)}. `--help` lists those that there are; those of "
            f"`accelerate launch` need `--{launch.OPTION}`."
        )


def _check(script_args: ScriptArguments, model_args: ModelConfig) -> None:
    if not model_args.model_name_or_path:
        raise ValueError("`--model_name_or_path` must be the Hub id or folder of a diffusers pipeline, got none.")
    if not script_args.dataset_name:
        raise ValueError("`--dataset_name` must be the Hub id, folder or file of a preference data set, got none.")
    settings = {**vars(script_args), **vars(model_args)}
    for name, default in _WITHOUT_EFFECT.items():
        if settings[name] != default:
            logging.getLogger(__name__).warning("`%s=%s` has no effect on a diffusers pipeline.", name, settings[name])


def _init_kwargs(training_args: DiffusionSDPOConfig, model_args: ModelConfig) -> dict[str, Any]:
    """How the pipeline is loaded; `model_init_kwargs` win over TRL's model arguments."""
    given = training_args.model_init_kwargs or {}
    if not isinstance(given, dict):
        raise ValueError(f"`model_init_kwargs` must be a JSON object, got {given!r}.")
    return {"revision": model_args.model_revision, "dtype": model_args.dtype, **given}


def _load_split(script_args: ScriptArguments, split: str) -> Any:
    name, streaming = script_args.dataset_name, script_args.dataset_streaming
    path = Path(name).expanduser()
    if (path / _SAVED_DATASET).is_file() or (path / _SAVED_DATASET_DICT).is_file():
        dataset = _load_saved(path, split)
        return dataset.to_iterable_dataset() if streaming else dataset
    if path.is_file():
        builder = _FILE_BUILDERS.get(path.suffix.lower())
        if builder is None:
            raise ValueError(
                f"A data set in one file must end in {', '.join(_FILE_BUILDERS)}; got {name}. Pass its folder instead."
            )
        return datasets.load_dataset(builder, data_files={split: str(path)}, split=split, streaming=streaming)
    source = str(path) if path.is_dir() else name
    return datasets.load_dataset(source, name=script_args.dataset_config, split=split, streaming=streaming)


def _load_saved(path: Path, split: str) -> Any:
    """A split of what `save_to_disk` wrote; a single `Dataset` is the split `train`."""
    saved = datasets.load_from_disk(str(path))
    parts = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if split not in parts:
        raise ValueError(f"The data set {path} must have the split {split!r}; it has {', '.join(parts)}.")
    return parts[split]


def _finish(trainer: "DiffusionSDPOTrainer", script_args: ScriptArguments, training_args: DiffusionSDPOConfig) -> None:
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"The tuned weights are in {training_args.output_dir}.")
    if training_args.push_to_hub:
        is_local = Path(script_args.dataset_name).expanduser().exists()  # a path of this machine tells nobody anything
        trainer.push_to_hub(dataset_name=None if is_local else script_args.dataset_name)
        trainer.accelerator.print(f"They are published as {trainer.hub_model_id}.")


def _say_how_to_resume(trainer: "DiffusionSDPOTrainer") -> None:
    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    trainer.accelerator.print(
        f"\nInterrupted; all that the run needs to go on is in {folder}. To resume, run the same command with\n"
        "  --resume_from_checkpoint true"
    )


def _show_progress(training_args: DiffusionSDPOConfig) -> None:
    """What the trainer chose and dropped, once for all processes."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    package = __package__.partition(".")[0]
    logging.getLogger(package).setLevel(logging.INFO if training_args.should_log else logging.WARNING)

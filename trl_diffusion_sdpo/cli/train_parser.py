"""The parser of `train`, and checks of options that depend on each other."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import UserError
from ..utils.hints import did_you_mean
from .errors import reading_arguments
from .launch import config_names, launch_options
from .options import OneLineParser, none_for_no, option_name, read_yaml, refuse_unknown, take_options

if TYPE_CHECKING:
    from trl import ModelConfig

    from ..trainer import DiffusionSDPOConfig
    from .pair_arguments import PairArguments

# The example configurations, in an installed package and in a clone of the repository.
EXAMPLES = (Path(__file__).parent / "example_configs", Path(__file__).parents[2] / "examples" / "configs")

# Options of transformers and TRL that the parser accepts but `--help` does not list.
HIDDEN = frozenset(
    # options that raise an error if they are set
    "bf16_full_eval fp16_full_eval include_for_metrics include_num_input_tokens_seen label_smoothing_factor "
    "lora_modules_to_save neftune_noise_alpha use_liger_kernel "
    # options that are for language models only
    "attn_implementation average_tokens_across_devices ignore_bias_buffers length_column_name liger_kernel_config "
    "lora_task_type use_cache "
    # without effect: the trainer or the data format determines them
    "do_eval do_predict do_train label_names local_rank logging_nan_inf_filter remove_unused_columns".split()
)
# Prefixes of the options of TRL's `ModelConfig` that need `use_peft`.
ADAPTER_PREFIXES = ("lora_", "use_rslora", "use_dora", "load_in_", "bnb_", "use_bnb_")
HELP = frozenset({"-h", "--help"})
# Titles of the groups of options in `--help`.
MODEL = "Model and data"
OWN = "Diffusion-SDPO"
INHERITED = "Training, from transformers"


def make_parser(prog: str | None = None) -> Any:
    """Return the parser of `train`, with the options of TRL's scripts and of [`DiffusionSDPOConfig`]."""
    from transformers import TrainingArguments
    from trl import ModelConfig, TrlParser

    from ..trainer.config.diffusion_sdpo_config import DiffusionSDPOConfig
    from .pair_arguments import PairArguments

    inherited = {field.name for field in fields(TrainingArguments)}
    own = {field.name for field in fields(DiffusionSDPOConfig)} - inherited

    class TrainParser(OneLineParser, TrlParser):
        """TRL's parser, whose help lists this package's options before those of transformers."""

        _titled: dict[str, Any] = {}  # groups of options, by their titles

        def add_argument(self, *flags: str, **settings: Any) -> argparse.Action:
            if "-h" in flags:
                return super().add_argument(*flags, **settings)
            if not self._titled:
                self._titled = {title: self.add_argument_group(title) for title in (MODEL, OWN, INHERITED)}
            # A flag that is unset by default, such as `bf16`. transformers and TRL have a `string_to_bool` each.
            if getattr(settings.get("type"), "__name__", "") == "string_to_bool":
                settings = {"nargs": "?", "const": True, **settings}
            choices = settings.get("choices") or ()
            if "none" in choices and "nargs" not in settings:
                settings["type"] = none_for_no(choices)
            name = settings.get("dest", flags[0].removeprefix("--"))
            title = OWN if name in own else INHERITED if name in inherited else MODEL
            if title == MODEL:  # in TRL, `datasets` overrides other options; here, `dataset_name` beside it is refused
                settings["help"] = settings["help"].replace("If `datasets` is provided, this will be ignored.", "")
            if name in HIDDEN:
                settings["help"] = argparse.SUPPRESS
            return self._titled[title].add_argument(*flags, **settings)

    kinds: Any = (PairArguments, DiffusionSDPOConfig, ModelConfig)
    parser = TrainParser(
        kinds,
        prog=prog,
        usage="%(prog)s [--config FILE.yaml | EXAMPLE] [--accelerate_config NAME] --model_name_or_path ID "
        "--dataset_name ID [--OPTION VALUE ...]",
        description="Tune a pipeline on preference pairs. Options on the command line override those in the YAML file "
        f"of --config, which can also be an example configuration: {', '.join(example_configs())}.",
        epilog="You may write dashes for underscores. Options of transformers and TRL that are for language models or "
        "have no effect here are not listed. Use --accelerate_config to start several processes by accelerate: one of "
        f"{', '.join(config_names())}, or the path of a configuration. You can then add options of `accelerate "
        "launch`, such as --num_processes.",
    )
    # With dropout, policy and reference model would differ before the first step.
    parser.set_defaults(lora_dropout=0.0)
    return parser


def read_given(arguments: list[str]) -> tuple[dict[str, Any], str | None, list[str]]:
    """Read the YAML file of `--config`, and set the environment variables under its `env`.

    Call it before importing libraries that read them.

    Returns:
        `tuple[dict[str, Any], str | None, list[str]]`: The settings in the file, `accelerate_config` (the command
        line's, else the file's), and the other words of the command line.
    """
    taken, words = take_options(arguments, "config", "accelerate_config")
    settings = {} if taken["config"] is None else read_yaml(config_file(taken["config"]))
    variables = settings.pop("env", {})
    if not isinstance(variables, dict):
        raise UserError(f"`env` in the file of settings must map names to values, got {variables!r}.")
    os.environ.update({name: str(value) for name, value in variables.items()})
    in_file = settings.pop("accelerate_config", None)
    return settings, taken["accelerate_config"] or in_file, words


def example_configs() -> dict[str, Path]:
    """Return the example configurations: name -> path."""
    return {path.stem: path for folder in reversed(EXAMPLES) for path in sorted(folder.glob("*.yaml"))}


def config_file(name: str) -> Path:
    """Return the YAML file of `--config`, given as a path or as the name of an example configuration."""
    path = Path(name).expanduser()
    examples = example_configs()
    if path.is_file():
        return path
    if name not in examples:
        near = did_you_mean(path.stem, examples)
        raise UserError(
            f"`--config` must be a YAML file or one of the example configurations {', '.join(examples)}. There is no "
            f"file {name}.{near}"
        )
    return examples[name]


@dataclass
class TrainOptions:
    """Options of `train` from the command line and the YAML file."""

    parser: Any
    values: dict[str, Any]  # value of each option of `train`
    given: set[str]  # options that the command line or the file sets
    others: list[str]  # words that are no options of `train`, such as those of `accelerate launch`
    accelerate_config: str | None

    @classmethod
    def read(cls, arguments: list[str], prog: str | None) -> TrainOptions:
        """Read the command line and the YAML file that it names."""
        settings, accelerate_config, typed = read_given(arguments)
        parser = make_parser(prog)
        in_file, others = parser.words_of(settings)
        words = [*in_file, *typed]  # the command line comes last, so it overrides the file
        parsed, unknown = parser.parse_known_args(words)
        return cls(parser, vars(parsed), parser.names_in(words), [*others, *unknown], accelerate_config)

    def dataclasses(self) -> tuple[PairArguments, DiffusionSDPOConfig, ModelConfig]:
        """Return the options as dataclasses. Raise `ValueError` if the options do not fit together."""
        check_adapter_options(self.values, self.given)
        with reading_arguments():
            return self.parser.parse_dict(self.values)

    def refuse_others(self) -> None:
        """Raise `ValueError` for a word that is no option of `train`, with the most similar one, or for an option of
        `accelerate launch` with the advice to add `--accelerate_config`."""
        if self.others:
            refuse_launch_options(self.others, launch_options())
        refuse_unknown(self.others, self.parser.names())


def refuse_launch_options(words: list[str], launcher: Collection[str]) -> None:
    """Raise `ValueError` if a word is one of the options `launcher` of `accelerate launch`."""
    launchers = [word for word in words if option_name(word) in launcher]
    if launchers:
        raise UserError(
            f"Options of `accelerate launch` need `--accelerate_config`, got `{launchers[0]}` without it. Add "
            "`--accelerate_config`, or leave the option out."
        )


def check_adapter_options(values: dict[str, Any], names: Iterable[str]) -> None:
    """Raise `ValueError` if options for a LoRA are set without `use_peft`, or its rank is impossible."""
    if values["use_peft"] and values["lora_r"] < 1:
        raise UserError(f"`lora_r` must be 1 or more, got {values['lora_r']}. Use 8 or 16 to begin with.")
    idle = [name for name in sorted(names) if name.startswith(ADAPTER_PREFIXES) and values[name]]
    if idle and not values["use_peft"]:
        raise UserError(
            f"Options for a LoRA or for quantization need `use_peft`, got {', '.join(f'`{name}`' for name in idle)} "
            "without it. Add `--use_peft` to train a LoRA, or leave them out to train all weights."
        )


def is_first_process() -> bool:
    """Return whether this is the main process, the only one that prints."""
    return os.environ.get("RANK", "0") == "0"

"""The help of `train`: its options in groups, this package's first, without those that do nothing here."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .options import OneLineParser, Option

# Options of transformers and TRL that are read, or refused with the reason, and not listed.
HIDDEN = frozenset(
    # refused
    "bf16_full_eval fp16_full_eval include_for_metrics include_num_input_tokens_seen label_smoothing_factor "
    "lora_modules_to_save neftune_noise_alpha use_liger_kernel "
    # of language models
    "attn_implementation average_tokens_across_devices ignore_bias_buffers length_column_name liger_kernel_config "
    "lora_task_type use_cache "
    # without effect, as the trainer or the format of the data decides
    "do_eval do_predict do_train label_names local_rank logging_nan_inf_filter remove_unused_columns".split()
)
_FORMER_NAMES = {"gradient_checkpointing", "gradient_checkpointing_kwargs"}  # hidden where the new names are
_NEW_NAME = "activation_checkpointing"
# Options that stand first, beside those of the data, wherever they are declared.
_FIRST = ("model_name_or_path", "model_revision", "dtype", "output_dir", "resume_from_checkpoint")
_METAVARS = {"bool": "BOOL", "int": "INT", "float": "NUMBER", "str": "TEXT"}


def group_options(
    names: Iterable[str], holders: Mapping[str, Sequence[type]], inherited: type
) -> dict[str, list[str]]:
    """The options by the title under which the help lists them.

    Args:
        names (`Iterable[str]`): All options.
        holders (`Mapping[str, Sequence[type]]`): Title -> the dataclasses that declare the options under it.
        inherited (`type`): `TrainingArguments`, whose docstring divides its options by lines such as `> Optimizer`.

    Returns:
        `dict[str, list[str]]`: Without the hidden ones, and without titles that no option is under.
    """
    names = list(names)
    hidden = HIDDEN | (_FORMER_NAMES if _NEW_NAME in names else set())
    declared = {name: title for title in holders for kind in holders[title] for name in inspect.get_annotations(kind)}
    sections = _sections(inspect.getdoc(inherited) or "")
    first = next(iter(holders))
    groups: dict[str, list[str]] = {title: [] for title in (*holders, *sections.values(), "Others")}
    for name in (name for name in (*_FIRST, *names) if name in names and name not in hidden):
        group = groups[first if name in _FIRST else declared.get(name) or sections.get(name, "Others")]
        if name not in group:
            group.append(name)
    return {title: group for title, group in groups.items() if group}


def _sections(text: str) -> dict[str, str]:
    """Name -> title of the section of a docstring."""
    found: dict[str, str] = {}
    title = None
    for line in text.splitlines():
        section, argument = re.match(r" *> (\w[\w &/()]*)$", line), re.match(r" {0,4}(\w+) ?\(`", line)
        if section:
            title = f"{section[1]}, from transformers"
        elif argument and title is not None:
            found[argument[1]] = title
    return found


def help_parser(options: Mapping[str, Option], groups: Mapping[str, list[str]], **texts: Any) -> OneLineParser:
    """A parser that prints the help, and reads nothing else."""
    parser = OneLineParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **texts)
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for name in names:
            option = options[name]
            off = f" `{option.off_flags[0]}` turns it off." if option.off_flags else ""
            default = argparse.SUPPRESS if option.default is None else option.default
            shown: dict[str, Any] = {"help": f"{option.help or ''}{off}", "default": default, "nargs": option.nargs}
            shown |= {"choices": option.choices} if option.choices else {"metavar": _METAVARS[option.elements]}
            group.add_argument(option.flags[0], dest=name, **shown)
    return parser

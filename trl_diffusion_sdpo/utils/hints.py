"""Suggestions for misspelt names in error messages."""

import difflib
import re
from collections.abc import Iterable

# Patterns of other trainers' options for what is not here, with the reason.
_ABSENT = (
    ("text_encoder|(^|_)te[123]?_lr|textual_inversion", "Text encoders are not trained."),
    (
        "lycoris|loha|lokr|lora_type|lora_algo|peft_type|network_(module|args)",
        "Of adapters there is LoRA (`use_peft`), also as DoRA and rsLoRA: `load_lora_weights` reads no other.",
    ),
)


def why_absent(word: str) -> str:
    """A sentence for the end of an error message on an unknown option for what this package leaves out, or an empty
    string."""
    found = (reason for pattern, reason in _ABSENT if re.search(pattern, word.lower().replace("-", "_")))
    return next((f" {reason}" for reason in found), "")


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """A sentence for the end of an error message, with the nearest known names.

    Args:
        word (`str`): The unknown name; dashes count as underscores.
        known (`Iterable[str]`): The known names.
        prefix (`str`): Written before each name, such as `--`.

    Returns:
        `str`: Such as " Did you mean `beta`?", with up to two names, or an empty string if none is near.
    """
    near = difflib.get_close_matches(word.lower().replace("-", "_"), list(known), n=2, cutoff=0.7)
    return f" Did you mean {' or '.join(f'`{prefix}{name}`' for name in near)}?" if near else ""

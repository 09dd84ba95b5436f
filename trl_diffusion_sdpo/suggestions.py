"""Suggestions for misspelt names in error messages."""

import difflib
from collections.abc import Iterable


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

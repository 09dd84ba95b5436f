"""Scorers of the commands."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..rewards import Scorer


def scorer_named(name: str, **settings: Any) -> Scorer:
    """Load a scorer by its name or as `module:function`. Modules in the working directory are importable.

    Raises:
        `ValueError`: If there is no such scorer.
    """
    from ..rewards import load_scorer

    import_from_working_directory()
    return load_scorer(name, **settings)


def import_from_working_directory() -> None:
    """Make modules in the working directory importable."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def mapping_option(text: str) -> dict[str, Any]:
    """Read an option that is a mapping in JSON."""
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError:
        mapping = None
    if not isinstance(mapping, dict):
        raise argparse.ArgumentTypeError(f"must be a mapping in JSON, got {text!r}")
    return mapping


def load_scorers(names: Sequence[str], settings: Mapping[str, Any]) -> list[Scorer]:
    """Load the scorers of `--scorers` with the settings of `--scorer_settings`, on the CPU unless a setting says
    otherwise.

    Raises:
        `ValueError`: If there is no such scorer, or settings are those of none.
    """
    for name, values in settings.items():
        if name not in names or not isinstance(values, dict):
            raise ValueError(
                f"`--scorer_settings` must map names of `--scorers` to their settings, got {name!r}: {values!r}. "
                'Write it such as {"hpsv2.1": {"batch_size": 4}}.'
            )
    return [scorer_named(name, **settings.get(name, {})) for name in names]

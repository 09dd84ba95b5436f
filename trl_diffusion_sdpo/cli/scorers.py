"""Scorers of the commands."""

from __future__ import annotations

import os
import sys
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

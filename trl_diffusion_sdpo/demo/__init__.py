"""A toy world for demos and tests: images of coloured shapes with captions, an oracle that scores images by their
pixels, preference pairs, and a tiny pipeline to tune.

This package imports the modules `world` and `oracle`. The modules `pairs` and `pipeline` must be imported by name,
because they import `datasets` and `diffusers`.
"""

from ..utils.import_utils import hide_idle_notes
from .oracle import OracleParts, oracle_parts, oracle_score
from .world import Caption, captions, imperfect_render, parse_caption, render

__all__ = [
    "Caption",
    "OracleParts",
    "captions",
    "imperfect_render",
    "oracle_parts",
    "oracle_score",
    "parse_caption",
    "render",
]

hide_idle_notes()  # before the module `pipeline` imports transformers and diffusers

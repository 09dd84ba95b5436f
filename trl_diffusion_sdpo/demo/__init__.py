"""The embedded world: captioned shapes, an oracle that scores them, ranked pairs, and a tiny pipeline to tune.

The world and the oracle need numpy only and are imported here. The modules `pairs` and `pipeline` need more.
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

hide_idle_notes()  # the pipeline's module imports the libraries

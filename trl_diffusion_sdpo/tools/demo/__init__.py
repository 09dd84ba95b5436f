"""A toy world for demos and tests: images of coloured shapes with captions, an oracle that scores them by their
pixels, preference pairs, and a tiny pipeline to tune."""

from ...utils.import_utils import hide_idle_notes

hide_idle_notes()  # the module `pipeline` imports libraries that log

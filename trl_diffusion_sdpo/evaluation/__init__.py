"""Judging models by their images: prompts to images, scores, win rates and a report."""

from .candidate import Candidate
from .evaluate import evaluate_models

__all__ = ["Candidate", "evaluate_models"]

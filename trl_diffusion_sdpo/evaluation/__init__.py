"""Judging models by their images: prompts to images, scores, win rates and a report."""

from .evaluate import evaluate_models
from .images import Candidate

__all__ = ["Candidate", "evaluate_models"]

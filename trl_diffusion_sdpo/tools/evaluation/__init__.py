"""Compare models by their images: generate images of prompts, score them, compute win rates and write a report."""

from .candidate import Candidate
from .evaluate import evaluate_models

__all__ = ["Candidate", "evaluate_models"]

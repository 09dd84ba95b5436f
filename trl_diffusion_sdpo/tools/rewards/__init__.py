"""Scorers: models and functions that rate images for their prompts."""

from .scorer import BatchedScorer, FunctionScorer, Scorer, load_scorer, register_scorer, scorer_names

__all__ = ["BatchedScorer", "FunctionScorer", "Scorer", "load_scorer", "register_scorer", "scorer_names"]

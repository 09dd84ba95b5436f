"""Scorers: models and functions that rate how good images are for their prompts."""

from .scorer import BatchedScorer, FunctionScorer, Scorer, load_scorer, register_scorer, scorer_names

__all__ = ["BatchedScorer", "FunctionScorer", "Scorer", "load_scorer", "register_scorer", "scorer_names"]

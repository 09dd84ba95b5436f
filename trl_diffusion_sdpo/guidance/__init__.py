"""Generating images with a reference beside the tuned model."""

from .preference_guidance import preference_guidance

__all__ = ["preference_guidance"]

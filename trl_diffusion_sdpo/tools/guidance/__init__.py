"""Generate images with predictions beyond the tuned model's, away from a reference."""

from .preference_guidance import preference_guidance

__all__ = ["preference_guidance"]

"""Generate images with predictions that go beyond the tuned model, away from a reference."""

from .preference_guidance import preference_guidance

__all__ = ["preference_guidance"]

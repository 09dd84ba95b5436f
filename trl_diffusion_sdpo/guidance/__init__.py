"""Generate images guided by the difference between the tuned model and a reference."""

from .preference_guidance import preference_guidance

__all__ = ["preference_guidance"]

"""Parts of an optimizer step: forward passes, the parameter-space safeguard, winner budget and metrics."""

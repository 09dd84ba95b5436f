"""What an optimizer step consists of: forward passes, the parameter-space safeguard, winner budget and metrics."""

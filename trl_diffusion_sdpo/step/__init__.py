"""One optimizer step: forward passes of policy and reference, parameter-space safeguard, winner budget and meters."""

"""What one optimizer step does: forward passes of policy and reference, the parameter-space safeguard, the winner
budget, the meters."""

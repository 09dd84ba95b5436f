"""Functions that load, wrap and freeze networks, and second copies of the weights: reference and average."""

"""Functions that load, wrap and freeze networks, and second copies of the weights: the reference and the averaged
weights."""

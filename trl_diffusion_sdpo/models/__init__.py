"""Load, wrap and freeze networks, and manage second copies of the weights: the reference and the average."""

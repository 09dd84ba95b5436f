"""Loads, wraps and freezes networks, and manages second copies of the weights: the reference and the average."""

"""Estimates of a run's memory and FLOPs, computed without loading weights."""

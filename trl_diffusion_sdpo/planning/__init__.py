"""Estimates of a run's memory, disk and FLOPs, computed without loading weights."""

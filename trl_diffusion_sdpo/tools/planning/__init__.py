"""Estimates of a run's memory and FLOPs, without loading weights."""

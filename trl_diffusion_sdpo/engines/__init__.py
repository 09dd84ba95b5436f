"""Distributed training: engines (one process, DDP, FSDP2, DeepSpeed), gradients, sharded weights, communication between
processes, and data loaders.

Code outside of this package does not need to know which engine runs.
"""

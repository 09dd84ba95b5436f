"""Distributed training: engines (one process, DDP, FSDP2, DeepSpeed), gradients, sharded weights, and communication
between processes.

Code outside of this package does not need to know which engine runs.
"""

"""Distributed training: engines (one process, DDP, FSDP2, DeepSpeed), gradients, sharded weights, and communication
between processes. Code outside of this package need not know which engine runs.
"""

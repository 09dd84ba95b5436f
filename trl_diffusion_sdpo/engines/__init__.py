"""Distribution of training: gradient back ends, sharded weights, processes and data loaders.

Only this package asks which engine runs.
"""

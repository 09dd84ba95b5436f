"""How training is distributed: gradient back ends, sharded weights, processes and data loaders. The only room that asks
which engine runs."""

"""Caches on disk of results that are computed once before training and read in every epoch: encoded pairs and errors of
the reference. If a run is killed, finished results are reused by the next run."""

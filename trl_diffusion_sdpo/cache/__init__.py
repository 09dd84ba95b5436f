"""Caches on disk for encoded images, encoded prompts and the reference's errors. A run computes them before training
and reads them in every epoch, and so do later runs, even if the first was killed."""

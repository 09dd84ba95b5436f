"""Caches on disk for encoded images, encoded prompts and the reference model's prediction errors. A run computes these
results before training and reads them in every epoch. Later runs use them again, even if the first run was killed."""

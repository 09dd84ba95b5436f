"""Settings of the trainer: their declarations and checks."""

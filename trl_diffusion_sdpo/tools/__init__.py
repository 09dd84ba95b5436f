"""Tools beside the trainer: scorers, evaluation, making pairs, guidance, planning, and the demo."""

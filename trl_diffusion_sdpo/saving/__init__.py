"""Everything on disk: checkpoints and resuming, weights and LoRA formats, the model card, the Hub."""

"""Files of a run: checkpoints and resuming from them, weights and LoRA formats, the model card, uploads to the Hub."""

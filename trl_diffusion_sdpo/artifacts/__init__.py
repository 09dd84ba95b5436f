"""What is written for others to read: weights, LoRA files, the model card, uploads to the Hub."""

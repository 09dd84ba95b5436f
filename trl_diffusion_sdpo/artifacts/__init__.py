"""Files for others: tuned weights, LoRA formats, the set-up file, the model card, uploads to the Hub."""

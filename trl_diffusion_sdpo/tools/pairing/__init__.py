"""Make pairs from a person's picks, from your own images or from a model's, and check them."""

"""Make pairs from a person's picks, from images that a person has, or from a model's images, and check the pairs."""

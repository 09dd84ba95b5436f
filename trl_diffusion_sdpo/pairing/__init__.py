"""Making pairs: from a person's picks, from own images, and checks of the result."""

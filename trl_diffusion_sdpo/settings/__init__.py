"""The settings: declared in groups, checked alone and together. the trainer's configuration completes them."""

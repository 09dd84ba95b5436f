"""The settings: declared in groups, checked alone and together. The trainer's configuration completes them."""

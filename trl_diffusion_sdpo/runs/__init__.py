"""The files of a run: its folder and lock, its checkpoints, and resuming from them."""

"""The output folder of a run: its lock, its checkpoints, and what a resumed run takes from them."""

"""What a training set-up needs before anything is loaded: memory by component and moment, disk, and model FLOPs."""

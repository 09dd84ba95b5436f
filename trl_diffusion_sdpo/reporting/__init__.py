"""Reports on a run: console output, plots, sample images and their scores, and the verdict on the trained model."""

"""What the scores of pairs decide: their weights, calibrated scores, and the order of a curriculum."""

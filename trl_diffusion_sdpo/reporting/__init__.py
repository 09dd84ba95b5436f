"""Reports on what training did to the model."""

"""Networks and their weights: loading, wrapping, freezing, and the second copies: the reference and the averaged
weights."""

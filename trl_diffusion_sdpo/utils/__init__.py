"""Small helper functions that several subpackages use."""

"""Small helpers that several subpackages use."""

"""A package that is no part of this project: a pipeline with its own class of denoiser, and the family that trains it.
Tests put the folder above on `sys.path`, in place of an installation."""

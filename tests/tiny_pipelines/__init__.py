"""Tiny pipelines of diffusers' and transformers' real classes with random weights, a module for each kind of model.

A module has `RESOLUTION` (pixels along the side of its images), `CALL` (how the pipeline's own call leaves guidance
out) and `build(seed=0)`; where the pipeline holds latents in a layout of its own, also `to_pipeline(latents)` and
`from_pipeline(tensor)`. A new module is a new case of every test over all families.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

CASES = sorted(module.name for module in iter_modules(__path__) if module.name != "parts")


def case(name: str) -> ModuleType:
    """The module of one of `CASES`."""
    return import_module(f"{__name__}.{name}")


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

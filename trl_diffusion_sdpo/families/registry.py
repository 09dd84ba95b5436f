"""Find the model family of a pipeline class.

Families come from this package, from `register_family`, and from entry points of installed packages, and are imported
when one of their pipelines is first used.
"""

import re
from importlib import import_module
from importlib.metadata import EntryPoints, entry_points

from diffusers import DiffusionPipeline

from ..utils.errors import UserError
from .base import Family
from .pipeline_classes import PIPELINE_CLASSES

ENTRY_POINT_GROUP = "trl_diffusion_sdpo.families"
HOW_TO_ADD = "docs/extending.md"

# Pipeline class -> "package.module:Class" of its family in this package.
FAMILIES: dict[str, str] = {
    name: f"{__package__}.{family}" for family, names in PIPELINE_CLASSES.items() for name in names
}
_registered: dict[str, str] = {}  # filled by `register_family`


def register_family(pipeline_class: str, family: str, *, replace: bool = False) -> None:
    """Register your model family for a pipeline class.

    Args:
        pipeline_class (`str`): Name of the class, as in `_class_name` of its `model_index.json`.
        family (`str`): The [`Family`] as `"package.module:Class"`, imported at the first use of such a pipeline. Its
            `pipeline_classes` must contain `pipeline_class`.
        replace (`bool`, *optional*, defaults to `False`): Whether to replace the family that the class already has.

    Raises:
        `ValueError`: If a name is malformed, or if the pipeline class has another family and `replace` is `False`.

    Example:

    ```python
    register_family("MyPipeline", "my_package.my_family:MyFamily")
    trainer = DiffusionSDPOTrainer("path/to/my_pipeline", args=args, train_dataset=pairs)
    ```
    """
    if not pipeline_class.isidentifier() or not re.fullmatch(r"\w+(\.\w+)*:\w+", family):
        raise UserError(
            "`register_family` needs the name of a pipeline class and a family as 'package.module:Class', got "
            f"{pipeline_class!r} and {family!r}. Example: register_family('MyPipeline', 'my_package:MyFamily')."
        )
    others = {path for path, _ in _sources(pipeline_class)} - {family}
    if others and not replace:
        raise UserError(
            f"{pipeline_class} already has the family {', '.join(sorted(others))}. Got another family, {family}. Pass "
            "`replace=True` to use the new family."
        )
    _registered[pipeline_class] = family


def known_pipeline_classes() -> list[str]:
    """Return the names of all pipeline classes with a family."""
    return list(dict.fromkeys([*FAMILIES, *_registered, *(entry.name for entry in _entry_points())]))


def family_for_class_name(name: str) -> type[Family]:
    """Return the family of a pipeline class.

    One from `register_family` takes precedence over those of this package and of entry points.

    Raises:
        `ValueError`: If the pipeline class has no family, or has several families of which none comes from
            `register_family`, or if the family cannot be imported, is not a [`Family`] or does not list the class.
    """
    sources = _sources(name)
    if not sources:
        raise UserError(
            f"The pipeline class must be one of {', '.join(known_pipeline_classes())}; got {name}. Load a pipeline of "
            f"one of these classes, or write a family for it: see 'Add a model family' ({HOW_TO_ADD})."
        )
    if name not in _registered and len({path for path, _ in sources}) > 1:
        listed = ", ".join(f"{path} ({source})" for path, source in sources)
        raise UserError(
            f"A pipeline class can have only one family, and {name} has several: {listed}. Choose one with "
            f"register_family({name!r}, ..., replace=True), or uninstall the packages whose families you do not want."
        )
    path, source = sources[0]
    return _import_family(name, path, source)


def find_family(pipeline: DiffusionPipeline) -> Family:
    """Return the family of a loaded pipeline, made for it. Raise `ValueError` if none can train it. Unlike the family's
    class, it has checked the pipeline; before you train its denoiser yourself, call the family's
    `prepare_denoiser(denoiser)`."""
    family = family_for_class_name(type(pipeline).__name__)(pipeline)
    family.check_pipeline()
    return family


def _entry_points() -> EntryPoints:
    return entry_points(group=ENTRY_POINT_GROUP)


def _sources(name: str) -> list[tuple[str, str]]:
    """Return all families of a pipeline class as `"module:Class"` and a description of their source, one from
    `register_family` first."""
    sources = [(_registered[name], "register_family")] if name in _registered else []
    if name in FAMILIES:
        sources.append((FAMILIES[name], "built in"))
    for entry in _entry_points():
        if entry.name == name:
            package = entry.dist.name if entry.dist is not None else "unknown"
            sources.append((entry.value, f"entry point of {package}"))
    return sources


def _import_family(name: str, path: str, source: str) -> type[Family]:
    module, _, attribute = path.partition(":")
    try:
        family = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"The family of {name} could not be imported from {path!r} ({source}): {error}. Install its package, or "
            "correct the name, which has the form 'package.module:Class'."
        ) from error
    if not isinstance(family, type) or not issubclass(family, Family):
        raise UserError(f"The family of {name}, {path!r} ({source}), must be a subclass of `Family`; got {family!r}.")
    if name not in family.pipeline_classes:
        raise UserError(
            f"The family {path!r} ({source}) must list {name} in its `pipeline_classes`, got "
            f"{', '.join(family.pipeline_classes)}."
        )
    return family

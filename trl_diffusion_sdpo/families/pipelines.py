"""Loading of pipelines, or of their denoisers only, from a folder or the Hub: from safetensors files, without code from
a model repository."""

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import diffusers
import torch
from diffusers.loaders import FromSingleFileMixin
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from ..utils.own_errors import is_own
from .base import Family
from .model_files import check_parts, what_is_wrong
from .registry import family_for_class_name, known_pipeline_classes
from .single_file import CONFIG_OPTION, configuration_of, is_single_file, reading_single_file

CLASS = "_class_name"  # of the pipeline, in its model_index.json

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies")  # of `load_config`
_REFUSED_OPTIONS = {
    "trust_remote_code": "Code from a model repository is never run.",
    "custom_pipeline": "Code from a model repository is never run.",
    "use_safetensors": "Weights are always read from safetensors files.",
    "torch_dtype": "The argument is called `dtype`.",
}
# Options of a model's `from_pretrained` about where its files are and how they are read.
DENOISER_OPTIONS = (
    *("revision", "variant", "token", *_HUB_OPTIONS),
    *("low_cpu_mem_usage", "disable_mmap", "use_flashpack", "offload_folder", "offload_state_dict"),
)


def as_text_to_image(pipeline: diffusers.DiffusionPipeline) -> diffusers.DiffusionPipeline:
    """A pipeline's networks in its family's text-to-image class, which [`load_pipeline`] returns as well; a pipeline of
    that class is returned unchanged.

    Raises:
        `ValueError`: If no family serves the pipeline's class.
    """
    family = family_for_class_name(type(pipeline).__name__)
    if type(pipeline).__name__ == family.pipeline_classes[0]:
        return pipeline
    pipeline_class = _text_to_image_class(family)
    taken = inspect.signature(pipeline_class).parameters
    return pipeline_class(**{name: value for name, value in pipeline.components.items() if name in taken})


def load_pipeline(
    name_or_path: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    denoiser_quantization: Any = None,
    encoders: bool = True,
    denoiser: bool = True,
    denoiser_folder: str | os.PathLike | None = None,
    **from_pretrained: Any,
) -> diffusers.DiffusionPipeline:
    """Load a pipeline that a family can train, from safetensors files and without any code from its repository.

    The class is checked before any weights are read. A folder of another class of the same family, such as an
    image-to-image pipeline, is loaded as the family's text-to-image class.

    Args:
        name_or_path (`str` or `os.PathLike`): Folder saved by diffusers, or id of a model on the Hub.
        dtype (`torch.dtype`): Of every component.
        revision, variant, token (*optional*): As diffusers takes them.
        denoiser_quantization (*optional*): A quantization configuration of diffusers. The denoiser's weights are
            quantized as they are read, so that they are never in memory in full precision.
        encoders (`bool`): Whether to load the weights of VAE and text encoders. If not, these components are on the
            meta device, with their configuration: nothing else of them is read or downloaded. [`load_encoders`] loads
            them later. Components in `from_pretrained` are used as they are.
        denoiser (`bool`): The same for the denoiser.
        denoiser_folder (`str` or `os.PathLike`, *optional*): Where another denoiser of the same class is, in a folder
            of its name; it takes the place of the pipeline's, which is not read.
        from_pretrained (*optional*): Further arguments of `DiffusionPipeline.from_pretrained`: components, cache.

    Returns:
        `DiffusionPipeline`: Of the first of its family's `pipeline_classes`.

    Raises:
        ValueError: If there is no diffusers pipeline there, no family can train it, it has no safetensors weights, an
            option is not allowed, or there are two quantization configurations for the denoiser.
    """
    name_or_path = os.fspath(name_or_path)
    _refuse_options(from_pretrained)
    base = configuration_of(name_or_path, from_pretrained.pop("config", None))
    index = _index_of(name_or_path, base, revision=revision, token=token, **from_pretrained)
    family = family_for_class_name(index[CLASS])
    in_file = is_single_file(name_or_path)
    if denoiser and (denoiser_folder is not None or (in_file and denoiser_quantization is not None)):
        hub = {name: from_pretrained[name] for name in _HUB_OPTIONS if name in from_pretrained}
        hub |= {"revision": revision, "token": token, "quantization_config": denoiser_quantization}
        hub |= {"config": base} if in_file else {}
        part = load_denoiser(name_or_path, dtype=dtype, folder=denoiser_folder, **hub)
        from_pretrained[family.denoiser_name] = part
    elif denoiser_quantization is not None and denoiser:
        from_pretrained |= _quantizing(family, denoiser_quantization, from_pretrained)
    check_parts(base, index, from_pretrained)
    options: dict[str, Any] = {"dtype": dtype, "revision": revision, "variant": variant, "token": token}
    options |= from_pretrained
    absent = (*(() if encoders else family.frozen_components), *(() if denoiser else (family.denoiser_name,)))
    names = [name for name in absent if name not in from_pretrained]
    options |= networks_without_weights(family, index, base, names, **options)
    pipeline = _read_pipeline(_text_to_image_class(family), name_or_path, base, options)
    family(pipeline)  # refuses what can't be trained
    return pipeline


def load_encoders(
    family: Family, name_or_path: str | os.PathLike, **from_pretrained: Any
) -> diffusers.DiffusionPipeline:
    """A pipeline with the denoiser of `family` and everything else from disk, as a pipeline without its encoders was
    loaded: `name_or_path` and `from_pretrained` are those of [`load_pipeline`]."""
    options = {"dtype": torch.float32, **from_pretrained, family.denoiser_name: family.denoiser}
    base = configuration_of(os.fspath(name_or_path), options.pop("config", None))
    return _read_pipeline(type(family.pipeline), os.fspath(name_or_path), base, options)


def _read_pipeline(
    pipeline_class: Any, name_or_path: str, base: str, options: dict[str, Any]
) -> diffusers.DiffusionPipeline:
    """A pipeline from a folder, the Hub or, with the configuration of `base`, one file."""
    if not is_single_file(name_or_path):
        with _safetensors_only(name_or_path):
            return pipeline_class.from_pretrained(name_or_path, use_safetensors=True, **options)
    if not issubclass(pipeline_class, FromSingleFileMixin):
        raise ValueError(
            f"diffusers does not read {pipeline_class.__name__} from one file, got {name_or_path}. Use a folder."
        )
    options = {key: value for key, value in options.items() if key != "variant"}  # a file is one
    with reading_single_file(name_or_path, base):
        return pipeline_class.from_single_file(name_or_path, config=base, **options)


def load_denoiser(
    name_or_path: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    folder: str | os.PathLike | None = None,
    quantization_config: Any = None,
    **from_pretrained: Any,
) -> diffusers.ModelMixin:
    """Load the denoiser of a pipeline without its other components, from safetensors files.

    Args:
        name_or_path (`str` or `os.PathLike`): The pipeline's folder or Hub id.
        dtype (`torch.dtype`): Of its weights.
        folder (`str` or `os.PathLike`, *optional*): Where its weights are, if not in the pipeline.
        quantization_config (*optional*): Of diffusers; its weights are quantized as they are read.
        from_pretrained (*optional*): Options named in `DENOISER_OPTIONS`.

    Returns:
        `ModelMixin`: Of the class that the pipeline's `model_index.json` names.

    Raises:
        ValueError: If there is no pipeline that a family can train, its denoiser has no safetensors weights or is
            neither of diffusers nor of the family's package, or an option is not one of a denoiser.
    """
    name_or_path = os.fspath(name_or_path)
    _refuse_options(from_pretrained)
    base = configuration_of(name_or_path, from_pretrained.pop("config", None))
    unknown = sorted(from_pretrained.keys() - set(DENOISER_OPTIONS))
    if unknown:
        raise ValueError(
            f"A denoiser alone is loaded with {', '.join(DENOISER_OPTIONS)} and `dtype`; got also {', '.join(unknown)}."
            " Leave these out, or pass a loaded pipeline."
        )
    index = _index_of(name_or_path, base, **from_pretrained)
    family = family_for_class_name(index[CLASS])
    denoiser_class = _component_class(family, index, family.denoiser_name, name_or_path, (diffusers.ModelMixin,))
    options = from_pretrained
    if folder is not None:  # it has neither the pipeline's commits nor its variants
        options = {key: value for key, value in options.items() if key not in ("revision", "variant")}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if folder is None and is_single_file(name_or_path):
        with reading_single_file(name_or_path, base):
            options = {"config": base, "subfolder": family.denoiser_name, **options, "torch_dtype": dtype}
            return denoiser_class.from_single_file(name_or_path, **options)
    source = name_or_path if folder is None else os.fspath(folder)
    with _safetensors_only(source):
        return denoiser_class.from_pretrained(
            source, subfolder=family.denoiser_name, torch_dtype=dtype, use_safetensors=True, **options
        )


def _quantizing(family: type[Family], quantization: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The option with which a pipeline's denoiser is quantized as it is read."""
    taken = options.keys() & {"quantization_config", family.denoiser_name}
    if taken:
        raise ValueError(
            f"The denoiser's weights are quantized as they are read, by one configuration; got also `{min(taken)}`"
            " to load the pipeline with. Pass one of them."
        )
    mapping = {family.denoiser_name: quantization}
    return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=mapping)}


def _text_to_image_class(family: type[Family]) -> type[diffusers.DiffusionPipeline]:
    """The first of a family's `pipeline_classes`: of the family itself, or of diffusers."""
    name = family.pipeline_classes[0]
    pipeline_class = family.pipeline_class or getattr(diffusers, name, None)
    if pipeline_class is None or pipeline_class.__name__ != name:
        raise ValueError(
            f"A {family.name} pipeline is loaded as {name}, the first of its family's `pipeline_classes`. diffusers "
            f"has no such class, and the family's `pipeline_class` is {family.pipeline_class}. Set it to the class."
        )
    return pipeline_class


def networks_without_weights(
    family: type[Family],
    index: dict[str, Any],
    name_or_path: str,
    names: Iterable[str],
    *,
    dtype: torch.dtype,
    **access: Any,
) -> dict[str, nn.Module]:
    """Networks of a pipeline on the meta device, made from their configurations; no weights are read.

    Args:
        index (`dict`): The pipeline's `model_index.json`, as `read_index` returns it.
        names (`Iterable[str]`): Of components; those that the pipeline does not have are left out.
        access: Options as of `load_pipeline`; all but those of the Hub are ignored.

    Raises:
        ValueError: If a class is not of diffusers, transformers or the family's package, or has no configuration.
    """
    options = {name: access[name] for name in ("revision", "token", *_HUB_OPTIONS) if name in access}
    found: dict[str, nn.Module] = {}
    for name in names:
        if (index.get(name) or (None,))[0] is None:
            continue
        classes = (diffusers.ModelMixin, PreTrainedModel)
        part_class: Any = _component_class(family, index, name, name_or_path, classes)
        of_transformers = issubclass(part_class, PreTrainedModel)
        try:
            if of_transformers:
                config = part_class.config_class.from_pretrained(name_or_path, subfolder=name, **options)
            else:
                config = part_class.load_config(name_or_path, subfolder=name, **options)
        except OSError as error:
            raise ValueError(f"The configuration of `{name}` in {name_or_path} could not be read: {error}") from error
        with torch.device("meta"):
            part = part_class(config) if of_transformers else part_class.from_config(config)
        found[name] = nn.Module.to(part, dtype).eval()  # diffusers' own would warn about rounding weights
    return found


def _component_class(
    family: type[Family], index: dict[str, Any], component: str, name_or_path: str, bases: tuple[type, ...]
) -> type[Any]:
    """The class that a pipeline's index names for a component, if it belongs to the library of one of its `bases`,
    diffusers or transformers, or to the package of the family. An index from the Hub must not cause any other
    import."""
    library, class_name = index.get(component) or (None, None)
    libraries = {base.__module__.partition(".")[0] for base in bases}
    component_class = None
    if library in libraries or str(library).partition(".")[0] == family.__module__.partition(".")[0]:
        try:
            component_class = getattr(import_module(str(library)), str(class_name), None)
        except ImportError as error:
            raise ValueError(
                f"The class of the {component} in {name_or_path} could not be imported: {error}."
            ) from error
    if not isinstance(component_class, type) or not issubclass(component_class, bases):
        raise ValueError(
            f"The {component} of a pipeline must be a model of {' or '.join(sorted(libraries))}, or a model in the "
            f"package of its family; the model_index.json of {name_or_path} says {class_name!r} of {library!r}. Pass "
            "a loaded pipeline."
        )
    return component_class


def _refuse_options(options: dict[str, Any]) -> None:
    for option in _REFUSED_OPTIONS.keys() & options.keys():
        raise ValueError(f"`{option}` can't be passed on to the pipeline. {_REFUSED_OPTIONS[option]} Leave it out.")


@contextmanager
def _safetensors_only(name_or_path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:  # of a variant, or of JSON
        if is_own(error):
            raise
        raise ValueError(f"{what_is_wrong(name_or_path)} ({' '.join(str(error).split()).rstrip('.')})") from error


def _index_of(name_or_path: str, base: str, **options: Any) -> dict[str, Any]:
    """`model_index.json` of a model, for a file that of its configuration."""
    try:
        return read_index(base, **options)
    except ValueError as error:
        if not is_single_file(name_or_path):
            raise
        raise ValueError(
            f"{name_or_path} needs the configuration of a diffusers pipeline, and that of {base} could not be read. "
            f"Name a folder or Hub id that has it by {CONFIG_OPTION}. {error}"
        ) from error


def read_index(name_or_path: str, **options: Any) -> dict[str, Any]:
    """`model_index.json` of a pipeline, whose entry `CLASS` is a class name. Only the options `revision`, `token` and
    those in `_HUB_OPTIONS` are used."""
    is_folder = os.path.isdir(name_or_path)
    if not is_folder and (os.path.isabs(name_or_path) or name_or_path.startswith(".") or name_or_path.count("/") > 1):
        raise ValueError(
            f"`model` must be a folder saved by diffusers or the id of a diffusers pipeline on the Hub, and there is "
            f"no folder or file {name_or_path}. Check the path; a Hub id looks like owner/name."
        )
    if is_folder and not os.path.isfile(os.path.join(name_or_path, "model_index.json")):
        raise ValueError(
            f"A folder saved by diffusers has a model_index.json, and {name_or_path} has none. Pass the whole "
            "pipeline's folder; pass a bare UNet or transformer as a loaded model, with its pipeline as "
            "`processing_class`."
        )
    try:
        hub_options = {key: options[key] for key in ("revision", "token", *_HUB_OPTIONS) if key in options}
        index = diffusers.DiffusionPipeline.load_config(name_or_path, **hub_options)
    except OSError as error:
        raise ValueError(
            f"`model` must be a folder saved by diffusers or the id of a diffusers pipeline on the Hub, got "
            f"{name_or_path}: {error}"
        ) from error
    class_name = index.get(CLASS)
    if not isinstance(class_name, str):
        raise ValueError(
            f"The model_index.json of a diffusers pipeline names one of diffusers' classes; that of {name_or_path} "
            f"says {class_name!r}. Code from a model repository is never run; use a pipeline of one of the classes "
            f"{', '.join(known_pipeline_classes())}."
        )
    return index

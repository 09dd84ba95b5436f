"""Load pipelines, or only their denoisers, from a folder, a single file or the Hub.

Weights are read from safetensors files only. Code from a model repository is never run.
"""

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import diffusers
import torch
from diffusers.loaders import FromSingleFileMixin
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers import PreTrainedModel

from ..families.base import Family
from ..families.registry import family_for_class_name, known_pipeline_classes
from ..utils.errors import UserError
from .model_files import LOADING_ERRORS, check_parts, what_is_wrong
from .single_file import CONFIG_OPTION, configuration_of, is_single_file, reading_single_file

CLASS = "_class_name"  # key in model_index.json whose value is the name of the pipeline's class

# Download options that diffusers' `load_config` accepts, besides `revision` and `token`.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies")
_REFUSED_OPTIONS = {
    "trust_remote_code": "Code from a model repository is never run.",
    "custom_pipeline": "Code from a model repository is never run.",
    "use_safetensors": "Weights are always read from safetensors files.",
    "torch_dtype": "The argument is called `dtype`.",
}
# Options of a denoiser's `from_pretrained` that say where the files are and how diffusers reads them.
DENOISER_OPTIONS = (
    "revision",
    "variant",
    "token",
    *_HUB_OPTIONS,
    "low_cpu_mem_usage",
    "disable_mmap",
    "use_flashpack",
    "offload_folder",
    "offload_state_dict",
)


def as_text_to_image(pipeline: diffusers.DiffusionPipeline) -> diffusers.DiffusionPipeline:
    """Return the pipeline, or one of the family's text-to-image class with its components."""
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
    """Load a pipeline that a model family can train.

    Weights come from safetensors files only, code from the model's repository is never run, and the pipeline's class is
    checked before any weights are read. Another class of the family, such as image-to-image, is loaded as its
    text-to-image class.

    Args:
        name_or_path (`str` or `os.PathLike`): Folder saved by diffusers, single safetensors file, or Hub id.
        dtype (`torch.dtype`): Dtype of all components.
        revision, variant, token (*optional*): Arguments of diffusers' `from_pretrained`.
        denoiser_quantization (*optional*): A quantization configuration of diffusers for the denoiser. Weights are
            quantized while they are read.
        encoders (`bool`): Whether to load the weights of VAE and text encoders. If not, they are built on the meta
            device, for [`load_encoders`] to load later. Components in `from_pretrained` are used unchanged.
        denoiser (`bool`): Whether to load the denoiser's weights. If `False`, the denoiser is on the meta device.
        denoiser_folder (`str` or `os.PathLike`, *optional*): Folder whose subfolder `unet` or `transformer` replaces
            the pipeline's own denoiser, of the same class.
        from_pretrained (*optional*): Further arguments of `DiffusionPipeline.from_pretrained`, such as components and
            `cache_dir`.

    Returns:
        `DiffusionPipeline`: The pipeline, in its family's text-to-image class.

    Raises:
        ValueError: If `name_or_path` is not a diffusers pipeline, no family can train the pipeline, weights are not in
            safetensors files, an option is not allowed, or two quantization configurations are set for the denoiser.
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
    absent = [] if encoders else list(family.frozen_components)
    if not denoiser:
        absent.append(family.denoiser_name)
    names = [name for name in absent if name not in from_pretrained]
    options |= networks_without_weights(family, index, base, names, **options)
    pipeline = _read_pipeline(_text_to_image_class(family), name_or_path, base, options)
    family(pipeline).check_pipeline()
    return pipeline


def load_encoders(
    family: Family, name_or_path: str | os.PathLike, **from_pretrained: Any
) -> diffusers.DiffusionPipeline:
    """Load the pipeline of `family` again with VAE and text encoders, if it was loaded without them.

    Args:
        family (`Family`): Family whose denoiser the returned pipeline uses. No denoiser is read from disk.
        name_or_path, from_pretrained: The arguments with which [`load_pipeline`] was called.
    """
    options = {"dtype": torch.float32, **from_pretrained, family.denoiser_name: family.denoiser}
    base = configuration_of(os.fspath(name_or_path), options.pop("config", None))
    return _read_pipeline(type(family.pipeline), os.fspath(name_or_path), base, options)


def _read_pipeline(
    pipeline_class: Any, name_or_path: str, base: str, options: dict[str, Any]
) -> diffusers.DiffusionPipeline:
    """Load a pipeline from a folder, the Hub or a single file, whose configuration comes from the pipeline `base`."""
    if not is_single_file(name_or_path):
        with _safetensors_only(name_or_path):
            return pipeline_class.from_pretrained(name_or_path, use_safetensors=True, **options)
    if not issubclass(pipeline_class, FromSingleFileMixin):
        raise UserError(
            f"Diffusers cannot load a {pipeline_class.__name__} from a single file, got {name_or_path}. Use a folder "
            "saved by diffusers."
        )
    options = {key: value for key, value in options.items() if key != "variant"}  # a single file has no variants
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
    """Load a pipeline's denoiser from safetensors files, without the other components.

    Args:
        name_or_path (`str` or `os.PathLike`): The pipeline's folder or Hub id.
        dtype (`torch.dtype`): Dtype of the weights.
        folder (`str` or `os.PathLike`, *optional*): Folder whose subfolder `unet` or `transformer` has the weights. By
            default, this is the pipeline's folder.
        quantization_config (*optional*): A quantization configuration of diffusers. Weights are quantized while they
            are read.
        from_pretrained (*optional*): Options listed in `DENOISER_OPTIONS`.

    Returns:
        `ModelMixin`: The denoiser, in the class that the pipeline's `model_index.json` names.
    """
    name_or_path = os.fspath(name_or_path)
    _refuse_options(from_pretrained)
    base = configuration_of(name_or_path, from_pretrained.pop("config", None))
    unknown = sorted(from_pretrained.keys() - set(DENOISER_OPTIONS))
    if unknown:
        raise UserError(
            f"A denoiser can be loaded with the options {', '.join(DENOISER_OPTIONS)} and dtype. Got also "
            f"{', '.join(unknown)}. Leave these out, or pass a loaded pipeline."
        )
    index = _index_of(name_or_path, base, **from_pretrained)
    family = family_for_class_name(index[CLASS])
    denoiser_class = _component_class(family, index, family.denoiser_name, name_or_path, (diffusers.ModelMixin,))
    options = from_pretrained
    if folder is not None:  # `revision` and `variant` apply to the pipeline, not to this folder
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
    """Return the argument with which `from_pretrained` quantizes the denoiser while it loads a pipeline."""
    taken = options.keys() & {"quantization_config", family.denoiser_name}
    if taken:
        raise UserError(
            f"Only one quantization configuration can apply to the denoiser, got one and the option `{min(taken)}`. "
            "Pass one of the two."
        )
    mapping = {family.denoiser_name: quantization}
    return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=mapping)}


def _text_to_image_class(family: type[Family]) -> type[diffusers.DiffusionPipeline]:
    """Return the class that `pipeline_classes[0]` names: the family's `pipeline_class`, or else the class in
    diffusers."""
    name = family.pipeline_classes[0]
    pipeline_class = family.pipeline_class or getattr(diffusers, name, None)
    if pipeline_class is None or pipeline_class.__name__ != name:
        raise UserError(
            f"Pipelines of the family {family.name} are loaded as {name}, its `pipeline_classes[0]`. Diffusers has no "
            f"such class, and the family's `pipeline_class` is {family.pipeline_class}. Set `pipeline_class` to the "
            f"class {name}."
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
    """Return networks of a pipeline by name, built on the meta device from their configurations. No weights are read.

    Args:
        index (`dict`): The pipeline's `model_index.json`, as `read_index` returns it.
        names (`Iterable[str]`): Names of components. Components that the pipeline does not have are ignored.
        access: Options of `load_pipeline`. Only the download options among them are used.
    """
    options = {name: access[name] for name in ("revision", "token", *_HUB_OPTIONS) if name in access}
    networks: dict[str, nn.Module] = {}
    for name in names:
        if _entry(index, name)[0] is None:
            continue
        classes = (diffusers.ModelMixin, PreTrainedModel)
        part_class: Any = _component_class(family, index, name, name_or_path, classes)
        of_transformers = issubclass(part_class, PreTrainedModel)
        try:
            if of_transformers:
                config = part_class.config_class.from_pretrained(name_or_path, subfolder=name, **options)
            else:
                config = part_class.load_config(name_or_path, subfolder=name, **options)
            with torch.device("meta"):
                part = part_class(config) if of_transformers else part_class.from_config(config)
        except LOADING_ERRORS as error:
            raise UserError(f"The configuration of `{name}` in {name_or_path} could not be read: {error}") from error
        networks[name] = nn.Module.to(part, dtype).eval()  # the `to` of diffusers' models would warn about rounding
    return networks


def _component_class(
    family: type[Family], index: dict[str, Any], component: str, name_or_path: str, bases: tuple[type, ...]
) -> type[Any]:
    """Return the class that a pipeline's `model_index.json` names for a component.

    Only classes of the libraries of `bases` (diffusers or transformers) and of the family's package are imported: the
    file may come from an untrusted repository.
    """
    library, class_name = _entry(index, component)
    libraries = {base.__module__.partition(".")[0] for base in bases}
    component_class = None
    if library in libraries or str(library).partition(".")[0] == family.__module__.partition(".")[0]:
        try:
            component_class = getattr(import_module(str(library)), str(class_name), None)
        except ImportError as error:
            raise UserError(
                f"The class of the {component} in {name_or_path} could not be imported: {error}."
            ) from error
    if not isinstance(component_class, type) or not issubclass(component_class, bases):
        raise UserError(
            f"The {component} of a pipeline must be a model class of {' or '.join(sorted(libraries))}, or of its "
            f"family's package. The model_index.json of {name_or_path} names {class_name!r} of {library!r}. Load the "
            "pipeline yourself and pass it as the model."
        )
    return component_class


def _entry(index: Mapping[str, Any], component: str) -> tuple[str | None, str | None]:
    """Return the library and the class that a `model_index.json` names for a component, or `(None, None)`."""
    entry = index.get(component)
    names = entry if isinstance(entry, (list, tuple)) and len(entry) == 2 else (None, None)
    return (names[0], names[1]) if all(isinstance(name, str) for name in names) else (None, None)


def _refuse_options(options: dict[str, Any]) -> None:
    for option in _REFUSED_OPTIONS.keys() & options.keys():
        raise UserError(
            f"The option `{option}` is not allowed for loading a pipeline. {_REFUSED_OPTIONS[option]} Leave it out."
        )


@contextmanager
def _safetensors_only(name_or_path: str) -> Iterator[None]:
    try:
        yield
    except LOADING_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what_is_wrong(name_or_path)} ({' '.join(str(error).split()).rstrip('.')})") from error


def _index_of(name_or_path: str, base: str, **options: Any) -> dict[str, Any]:
    """Return the `model_index.json` of the pipeline `base`: the pipeline `name_or_path` itself or, for a single file,
    the pipeline whose configuration the file uses."""
    try:
        return read_index(base, **options)
    except ValueError as error:
        if not is_single_file(name_or_path):
            raise
        raise UserError(
            f"A model in one file needs the configuration of a diffusers pipeline. The configuration for "
            f"{name_or_path} could not be read from {base}. Name another folder or Hub id with {CONFIG_OPTION}. {error}"
        ) from error


def read_index(name_or_path: str, **options: Any) -> dict[str, Any]:
    """Return the `model_index.json` of a pipeline. Raise `ValueError` if this file does not name a pipeline class.

    Only the options `revision`, `token` and those in `_HUB_OPTIONS` are used.
    """
    is_folder = os.path.isdir(name_or_path)
    if not is_folder and (os.path.isabs(name_or_path) or name_or_path.startswith(".") or name_or_path.count("/") > 1):
        raise UserError(
            f"`model` must be a folder saved by diffusers or the id of a diffusers pipeline on the Hub, and there is "
            f"no folder or file {name_or_path}. Check the path; a Hub id looks like owner/name."
        )
    if is_folder and not os.path.isfile(os.path.join(name_or_path, "model_index.json")):
        raise UserError(
            f"A folder saved by diffusers has a model_index.json, and {name_or_path} has none. Pass the folder of the "
            "whole pipeline. To train a UNet or transformer that you loaded, pass it as the model and its pipeline "
            "as `processing_class`."
        )
    try:
        hub_options = {key: options[key] for key in ("revision", "token", *_HUB_OPTIONS) if key in options}
        index: Any = diffusers.DiffusionPipeline.load_config(name_or_path, **hub_options)
    except (OSError, ValueError, RecursionError) as error:
        # diffusers says of an unreachable Hub that the repository has no such file.
        unreachable = isinstance(error.__context__, LocalEntryNotFoundError)
        raise UserError(
            f"`model` must be a folder saved by diffusers or the id of a diffusers pipeline on the Hub, got "
            f"{name_or_path}: {error.__context__ if unreachable else error}"
        ) from error
    class_name = index.get(CLASS) if isinstance(index, dict) else None
    if not isinstance(class_name, str):
        raise UserError(
            f"The model_index.json of a pipeline must name a pipeline class. The file of {name_or_path} names "
            f"{class_name!r}. Code from a model repository is never run. Use a pipeline of one of these classes: "
            f"{', '.join(known_pipeline_classes())}."
        )
    return index

"""Model families: which pipelines can be trained, found by the name of the pipeline's class, and how a pipeline or its
denoiser alone is loaded from a folder or the Hub."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import diffusers
import torch

from .base import Family, LossDefaults
from .noise import NoiseProcess

__all__ = [
    "FAMILIES",
    "Family",
    "LossDefaults",
    "NoiseProcess",
    "as_text_to_image",
    "family_for_class_name",
    "find_family",
    "load_denoiser",
    "load_pipeline",
]

# Where a family is defined -> the pipeline classes it serves; imported when asked for.
_SERVED = {
    "stable_diffusion:StableDiffusionFamily": (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
    ),
    "stable_diffusion_xl:StableDiffusionXLFamily": ("StableDiffusionXLPipeline",),
    "stable_diffusion_3:StableDiffusion3Family": (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    ),
    "flux:FluxFamily": ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    "pixart:PixArtAlphaFamily": ("PixArtAlphaPipeline",),
    "pixart:PixArtSigmaFamily": ("PixArtSigmaPipeline",),
    "sana:SanaFamily": ("SanaPipeline",),
    "qwen_image:QwenImageFamily": ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    "z_image:ZImageFamily": ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
    "ovis_image:OvisImageFamily": ("OvisImagePipeline",),
    "lumina2:Lumina2Family": ("Lumina2Pipeline", "Lumina2Text2ImgPipeline"),
    "aura_flow:AuraFlowFamily": ("AuraFlowPipeline",),
    "cogview4:CogView4Family": ("CogView4Pipeline",),
    "hunyuan_dit:HunyuanDiTFamily": ("HunyuanDiTPipeline",),
    "flux2:Flux2Family": ("Flux2Pipeline",),
    "flux2:Flux2KleinFamily": ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline"),
    "wan:WanFamily": ("WanPipeline",),
}
FAMILIES: dict[str, str] = {name: family for family, classes in _SERVED.items() for name in classes}
HOW_TO_ADD = "docs/add_a_model_family.md"
CLASS = "_class_name"  # of the pipeline, in its model_index.json

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies")  # what reading a configuration takes
_REFUSED_OPTIONS = {
    "trust_remote_code": "Code from a model repository is never run.",
    "custom_pipeline": "Code from a model repository is never run.",
    "use_safetensors": "Weights are always read from safetensors files.",
    "torch_dtype": "The argument is called `dtype`.",
}
# What a model's `from_pretrained` takes that says where its files are and how they are read.
DENOISER_OPTIONS = (
    *("revision", "variant", "token", *_HUB_OPTIONS),
    *("low_cpu_mem_usage", "disable_mmap", "use_flashpack", "offload_folder", "offload_state_dict"),
)


def find_family(pipeline: diffusers.DiffusionPipeline) -> Family:
    """The family of a loaded pipeline, around that pipeline.

    Raises:
        ValueError: If no family serves the pipeline's class, or its family can't train it.
    """
    return family_for_class_name(type(pipeline).__name__)(pipeline)


def as_text_to_image(pipeline: diffusers.DiffusionPipeline) -> diffusers.DiffusionPipeline:
    """The same networks in their family's text-to-image class, as which a folder of another of its classes is loaded;
    a pipeline of that class is given back as it is.

    Raises:
        ValueError: If no family serves the pipeline's class.
    """
    name = type(pipeline).__name__
    wanted = family_for_class_name(name).pipeline_classes[0]
    if name == wanted:
        return pipeline
    pipeline_class = getattr(diffusers, wanted)
    taken = inspect.signature(pipeline_class).parameters
    return pipeline_class(**{part: value for part, value in pipeline.components.items() if part in taken})


def family_for_class_name(name: str) -> type[Family]:
    """The family that serves a pipeline class.

    Raises:
        ValueError: If there is none; the message names the classes that are served.
    """
    if name not in FAMILIES:
        raise ValueError(
            f"The pipeline class must be one of {', '.join(FAMILIES)}; got {name}. Load a pipeline of one of these "
            f"classes, or write a family for it: the page 'Add a model family' of the documentation ({HOW_TO_ADD}) "
            "walks through one, line by line."
        )
    module, _, family = FAMILIES[name].partition(":")
    return getattr(import_module(f".{module}", __name__), family)


def load_pipeline(
    name_or_path: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    denoiser_quantization: Any = None,
    **from_pretrained: Any,
) -> diffusers.DiffusionPipeline:
    """Load a pipeline that a family can train, from safetensors files and without any code from its repository.

    The class is read and checked before any weights are read, and a folder of another class of the same family (say,
    image-to-image) is loaded as the family's text-to-image class.

    Args:
        name_or_path (`str` or `os.PathLike`): Folder saved by diffusers, or id of a model on the Hub.
        dtype (`torch.dtype`): Of every component.
        revision, variant, token (*optional*): As diffusers takes them.
        denoiser_quantization (*optional*): A quantization configuration of diffusers, in which the denoiser's weights
            are held as they are read; in full precision they are never in memory at once.
        from_pretrained (*optional*): Further arguments of `DiffusionPipeline.from_pretrained`: components, cache.

    Returns:
        `DiffusionPipeline`: Of the first of its family's `pipeline_classes`.

    Raises:
        ValueError: If there is no diffusers pipeline there, its class or its UNet is not supported, it has no
            safetensors weights, an option is one that is never allowed, or the denoiser would be quantized twice.
    """
    name_or_path = os.fspath(name_or_path)
    _refuse_options(from_pretrained)
    family = family_for_class_name(_read_index(name_or_path, revision=revision, token=token, **from_pretrained)[CLASS])
    if denoiser_quantization is not None:
        taken = from_pretrained.keys() & {"quantization_config", family.denoiser_name}
        if taken:
            raise ValueError(
                f"The denoiser's weights are quantized as they are read, by one configuration; got also `{min(taken)}`"
                " to load the pipeline with. Pass the one or the other."
            )
        by_part = {family.denoiser_name: denoiser_quantization}
        from_pretrained["quantization_config"] = diffusers.PipelineQuantizationConfig(quant_mapping=by_part)
    pipeline_class = getattr(diffusers, family.pipeline_classes[0])
    with _safetensors_only(name_or_path):
        pipeline = pipeline_class.from_pretrained(
            name_or_path,
            dtype=dtype,
            revision=revision,
            variant=variant,
            token=token,
            use_safetensors=True,
            **from_pretrained,
        )
    family(pipeline)  # refuses what can't be trained
    return pipeline


def load_denoiser(
    name_or_path: str | os.PathLike, *, dtype: torch.dtype = torch.float32, **from_pretrained: Any
) -> diffusers.ModelMixin:
    """Load a pipeline's denoiser and nothing else of it, from safetensors files.

    Args:
        name_or_path (`str` or `os.PathLike`): The pipeline's folder or Hub id.
        dtype (`torch.dtype`): Of its weights.
        from_pretrained (*optional*): Of `DENOISER_OPTIONS`.

    Returns:
        `ModelMixin`: Of the class that the pipeline's `model_index.json` names.

    Raises:
        ValueError: If there is no pipeline that a family can train, its denoiser has no safetensors weights or is no
            class of diffusers, or an option belongs to other parts of a pipeline.
    """
    name_or_path = os.fspath(name_or_path)
    _refuse_options(from_pretrained)
    unknown = sorted(from_pretrained.keys() - set(DENOISER_OPTIONS))
    if unknown:
        raise ValueError(
            f"A denoiser alone is loaded with {', '.join(DENOISER_OPTIONS)} and `dtype`; got also {', '.join(unknown)}."
            " Leave these out, or pass a loaded pipeline."
        )
    index = _read_index(name_or_path, **from_pretrained)
    part = family_for_class_name(index[CLASS]).denoiser_name
    library, class_name = index.get(part) or (None, None)
    denoiser_class = getattr(diffusers, str(class_name), None) if library == "diffusers" else None
    if not isinstance(denoiser_class, type) or not issubclass(denoiser_class, diffusers.ModelMixin):
        raise ValueError(
            f"The {part} of a pipeline must be one of diffusers' models; the model_index.json of {name_or_path} says "
            f"{class_name!r} of {library!r}. Pass a loaded pipeline."
        )
    with _safetensors_only(name_or_path):
        return denoiser_class.from_pretrained(
            name_or_path, subfolder=part, torch_dtype=dtype, use_safetensors=True, **from_pretrained
        )


def _refuse_options(options: dict[str, Any]) -> None:
    for option in _REFUSED_OPTIONS.keys() & options.keys():
        raise ValueError(f"`{option}` can't be passed on to the pipeline. {_REFUSED_OPTIONS[option]} Leave it out.")


@contextmanager
def _safetensors_only(name_or_path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"Every component of a pipeline must have its weights in safetensors files, and {name_or_path} could not "
            f"be loaded so: {error}. Pickled weights (.bin) are never read; convert them by loading the pipeline in "
            "diffusers and calling `save_pretrained`."
        ) from error


def _read_index(name_or_path: str, **options: Any) -> dict[str, Any]:
    """`model_index.json` of a pipeline, with the name of one class under `CLASS`; only options that say where files
    are count."""
    if os.path.isfile(name_or_path):
        raise ValueError(
            f"A pipeline is a folder saved by diffusers or a Hub id, got the file {name_or_path}. Convert it with "
            "`from_single_file(...)` of its pipeline class and `save_pretrained`."
        )
    is_folder = os.path.isdir(name_or_path)
    if not is_folder and (os.path.isabs(name_or_path) or name_or_path.startswith(".") or name_or_path.count("/") > 1):
        raise ValueError(
            f"`model` must be a folder saved by diffusers or the id of a diffusers pipeline on the Hub, and there is "
            f"no folder {name_or_path}. Check the path; a Hub id looks like owner/name."
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
            f"{', '.join(FAMILIES)}."
        )
    return index

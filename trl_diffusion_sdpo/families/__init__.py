"""Model families: which pipelines can be trained, found by the name of the pipeline's class, and how a pipeline is
loaded from a folder or the Hub."""

import inspect
import os
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

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies")  # what reading a configuration takes
_REFUSED_OPTIONS = {
    "trust_remote_code": "Code from a model repository is never run.",
    "custom_pipeline": "Code from a model repository is never run.",
    "use_safetensors": "Weights are always read from safetensors files.",
    "torch_dtype": "The argument is called `dtype`.",
}


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
    **from_pretrained: Any,
) -> diffusers.DiffusionPipeline:
    """Load a pipeline that a family can train, from safetensors files and without any code from its repository.

    The class is read and checked before any weights are read, and a folder of another class of the same family (say,
    image-to-image) is loaded as the family's text-to-image class.

    Args:
        name_or_path (`str` or `os.PathLike`): Folder saved by diffusers, or id of a model on the Hub.
        dtype (`torch.dtype`): Of every component.
        revision, variant, token (*optional*): As diffusers takes them.
        from_pretrained (*optional*): Further arguments of `DiffusionPipeline.from_pretrained`: components, cache.

    Returns:
        `DiffusionPipeline`: Of the first of its family's `pipeline_classes`.

    Raises:
        ValueError: If there is no diffusers pipeline there, its class or its UNet is not supported, it has no
            safetensors weights, or an option is one that is never allowed.
    """
    name_or_path = os.fspath(name_or_path)
    for option in _REFUSED_OPTIONS.keys() & from_pretrained.keys():
        raise ValueError(f"`{option}` can't be passed on to the pipeline. {_REFUSED_OPTIONS[option]} Leave it out.")
    hub_options = {key: from_pretrained[key] for key in _HUB_OPTIONS if key in from_pretrained}
    family = family_for_class_name(_read_class_name(name_or_path, revision=revision, token=token, **hub_options))
    pipeline_class = getattr(diffusers, family.pipeline_classes[0])
    try:
        pipeline = pipeline_class.from_pretrained(
            name_or_path,
            dtype=dtype,
            revision=revision,
            variant=variant,
            token=token,
            use_safetensors=True,
            **from_pretrained,
        )
    except OSError as error:
        raise ValueError(
            f"Every component of a pipeline must have its weights in safetensors files, and {name_or_path} could not "
            f"be loaded so: {error}. Pickled weights (.bin) are never read; convert them by loading the pipeline in "
            "diffusers and calling `save_pretrained`."
        ) from error
    family(pipeline)  # refuses what can't be trained
    return pipeline


def _read_class_name(name_or_path: str, **hub_options: Any) -> str:
    """Name of the pipeline's class, from `model_index.json` alone."""
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
        class_name = diffusers.DiffusionPipeline.load_config(name_or_path, **hub_options).get("_class_name")
    except OSError as error:
        raise ValueError(
            f"`model` must be a folder saved by diffusers or the id of a diffusers pipeline on the Hub, got "
            f"{name_or_path}: {error}"
        ) from error
    if not isinstance(class_name, str):
        raise ValueError(
            f"The model_index.json of a diffusers pipeline names one of diffusers' classes; that of {name_or_path} "
            f"says {class_name!r}. Code from a model repository is never run; use a pipeline of one of the classes "
            f"{', '.join(FAMILIES)}."
        )
    return class_name

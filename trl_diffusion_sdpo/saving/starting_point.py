"""What a run starts from: a pipeline, or the output folder of an earlier run, whose weights go on training."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftConfig, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ..models.adapters import POLICY_ADAPTER, active_adapter, adapter_state, add_lora, base_tensors, lora_configs
from ..models.ema import EMA_FOLDER
from ..utils._compat import loads_lora
from ..utils.own_errors import is_own
from .resuming import stored_settings
from .setup import SETUP_FILE, fingerprint, read_setup
from .weights import PEFT_CONFIG_FILE, PEFT_FILE, PEFT_PREFIX

logger = logging.getLogger(__name__)

BASE = "base_model"  # in the set-up file, if it is public, and beside the arguments: what the run started from
LORA_FILE = "pytorch_lora_weights.safetensors"
INDEX_FILE = "model_index.json"
# Of the options with which a pipeline was loaded: those without which other weights would be.
_OPTIONS = ("revision", "variant", "config")
_DEFAULTS = {"revision": (None, "main")}  # values of a user that do not take the place of recorded ones
_OTHER_KINDS = {"lokr_": "a LoKr", "hada_": "a LoHa", "oft_": "an OFT"}
_OF_TEXT = ("text_encoder", "lora_te")


@dataclass(frozen=True)
class StartingPoint:
    """Where the parts of a policy are.

    Args:
        pipeline (`str`): Hub id, folder or file of a pipeline.
        options (`Mapping[str, Any]`): With which an earlier run loaded it.
        denoiser (`str`, *optional*): Folder of a run that tuned all weights of the denoiser.
        adapter (`str`, *optional*): Folder, file or Hub id of a LoRA on the denoiser.
    """

    pipeline: str
    options: Mapping[str, Any] = field(default_factory=dict)
    denoiser: str | None = None
    adapter: str | None = None

    def with_recorded(self, options: Mapping[str, Any] | None) -> dict[str, Any]:
        """Options for loading the pipeline: a user's, and the recorded ones where the user's are the default."""
        given = {key: value for key, value in (options or {}).items() if value not in _DEFAULTS.get(key, (None,))}
        return {**(options or {}), **self.options, **given}


@dataclass(frozen=True)
class Origin:
    """What a run started from, as its files record it.

    Args:
        name_or_path (`str`, *optional*): Hub id, folder or file of the pipeline; `None` for a pipeline object.
        folder (`Path`, *optional*): Where the pipeline's files are on this machine.
        base (`dict[str, Any]`, *optional*): See [`recorded_base`].
        fingerprint (`str`): Hash of the denoiser's weights before training.
        reference (`str`): Kind of the reference.
        gave_reference (`bool`): Whether the user passed the reference.
    """

    name_or_path: str | None
    folder: Path | None
    base: dict[str, Any] | None
    fingerprint: str
    reference: str
    gave_reference: bool


def starting_point(name_or_path: str | os.PathLike, adapter: str | os.PathLike | None = None) -> StartingPoint:
    """The parts of a policy by the name of a pipeline, or of a run: its output folder, one of its checkpoints, or its
    folder of averaged weights.

    Args:
        adapter (`str` or `os.PathLike`, *optional*): A LoRA to go on from.

    Raises:
        `ValueError`: If a run's pipeline is unknown or gone, or there would be two LoRAs.
    """
    folder = Path(name_or_path)
    run = _run_of(folder)
    setup = read_setup(run)
    chosen = None if adapter is None else os.fspath(adapter)
    if "tuning" not in setup or (folder / INDEX_FILE).is_file():
        return StartingPoint(os.fspath(name_or_path), adapter=chosen)
    is_lora = setup["tuning"] == "lora"
    if is_lora and adapter is not None:
        raise ValueError(
            f"One LoRA goes on training, and {folder} is the run of a LoRA already; got `adapter_name_or_path` "
            f"{chosen} too. Name its base as the model, or leave one of the two out."
        )
    base = recorded_base_of(run)
    _check_base(base, run, ("pipeline", "denoiser") if is_lora else ("pipeline",), is_lora=is_lora)
    found = {"pipeline": base["pipeline"], "options": base["options"]}
    if not is_lora:
        return StartingPoint(**found, denoiser=str(folder), adapter=chosen)
    return StartingPoint(**found, denoiser=base["denoiser"], adapter=str(folder))


def base_of_run(run: str | os.PathLike) -> StartingPoint:
    """What a run started from, without a LoRA; `ValueError` where that is unknown or gone."""
    folder = Path(run)
    base = recorded_base_of(folder)
    _check_base(base, folder, ("pipeline", "denoiser"), is_lora=False)
    return StartingPoint(base["pipeline"], base["options"], base["denoiser"])


def recorded_base_of(run: Path) -> Any:
    """What [`recorded_base`] gave for the run in a folder; `None` if its files do not say."""
    return stored_settings(run).get(BASE) or read_setup(run).get(BASE)


def recorded_base(
    name_or_path: str | None, options: Mapping[str, Any], denoiser_folder: str | None
) -> dict[str, Any] | None:
    """What a run started from, for its files; `None` for a pipeline of unknown origin. Folders become absolute."""
    if name_or_path is None:
        return None
    kept = {key: options[key] for key in _OPTIONS if options.get(key) is not None}
    if "config" in kept:
        kept["config"] = _absolute(kept["config"])
    denoiser = None if denoiser_folder is None else _absolute(denoiser_folder)
    return {"pipeline": _absolute(name_or_path), "options": kept, "denoiser": denoiser}


def public_base(base: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The same if it names no folder of this machine, else `None`."""
    if base is None:
        return None
    named = [base["pipeline"], base["denoiser"], *base["options"].values()]
    return None if any(os.path.isabs(name) for name in named if name is not None) else dict(base)


def attach_adapter(pipeline: DiffusionPipeline, denoiser_name: str, source: str, *, seed: int = 0) -> str:
    """Put a trained LoRA onto a pipeline's denoiser, where it is the only adapter; warn where the weights under it are
    not those that the run of the LoRA has recorded.

    Args:
        source (`str`): Folder in PEFT's or diffusers' format, a `.safetensors` file that the pipeline's
            `load_lora_weights` reads, or a Hub id. A folder with both formats is read in PEFT's, which has the
            weights as they trained.
        seed (`int`): Of the random initialization that its weights replace.

    Returns:
        `str`: The adapter's name.

    Raises:
        `ValueError`: If there is no LoRA, it is of another kind or does not fit the denoiser.
    """
    denoiser = getattr(pipeline, denoiser_name)
    if active_adapter(denoiser) is not None:
        raise ValueError(
            f"One LoRA goes on training, and the model has one already; got also {source}. Leave one out."
        )
    place = _local(source)
    _warn_of_another_base(denoiser, place)
    try:
        if place.is_dir() and (place / PEFT_CONFIG_FILE).is_file():
            _attach_peft(denoiser, place, seed)
        else:
            _attach_by_pipeline(pipeline, place / LORA_FILE if place.is_dir() else place)
        name = active_adapter(denoiser)
    except (RuntimeError, KeyError, SafetensorError, OSError, ValueError, TypeError) as error:
        if is_own(error):
            raise
        raise ValueError(f"The LoRA {source} cannot be put onto a {type(denoiser).__name__}: {error}") from error
    if name is None:
        raise ValueError(
            f"A LoRA to go on from must be of the pipeline's {denoiser_name}, a {type(denoiser).__name__}; {source} "
            "has no weights for it. Is it of another model?"
        )
    return name


def check_continued(denoiser: nn.Module, name: str, config: PeftConfig, source: str) -> None:
    """Raise `ValueError` where a configuration that is given beside a LoRA to go on from says something else."""
    own = lora_configs(denoiser)[name]
    names = ("r", "lora_alpha", "use_dora", "use_rslora")
    differing = {key: (getattr(own, key), getattr(config, key, None)) for key in names}
    differing = {key: pair for key, pair in differing.items() if pair[0] != pair[1]}
    targets = getattr(config, "target_modules", None)
    if targets is not None and _as_set(targets) != _as_set(own.target_modules):
        differing["target_modules"] = (sorted(_as_set(own.target_modules)), sorted(_as_set(targets)))
    if differing:
        listed = ", ".join(f"{key} {before}, not {asked}" for key, (before, asked) in differing.items())
        raise ValueError(
            f"A LoRA that goes on training keeps its shape, and that of {source} has {listed}. Leave out `peft_config` "
            "(`--use_peft`), or give the same. For a new LoRA, fuse this one into its base and name that as the model."
        )


def _check_base(base: Any, run: Path, needed: Iterable[str], *, is_lora: bool) -> None:
    """Raise `ValueError` where a run's base is unknown, or a folder of it that is needed is gone."""
    way = f"`adapter_name_or_path` {run}" if is_lora else "its denoiser from this folder, loaded in Python"
    if not isinstance(base, Mapping):
        raise ValueError(
            f"{run} is the folder of a run that does not say which pipeline it started from. Name that pipeline as the "
            f"model, and {way}."
        )
    for name in (base[key] for key in needed):
        if name is not None and os.path.isabs(name) and not os.path.exists(name):
            raise ValueError(
                f"The run in {run} started from {name}, and that is no longer there. Name where the pipeline is now as "
                f"the model, and {way}."
            )


def _run_of(folder: Path) -> Path:
    """The folder with the set-up of weights: their own, or of averaged weights the one that they are in."""
    return folder.parent if folder.name == EMA_FOLDER and not (folder / SETUP_FILE).is_file() else folder


def _warn_of_another_base(denoiser: nn.Module, place: Path) -> None:
    """Warn where a denoiser without adapters does not hold the weights that a run's LoRA was trained on."""
    setup = read_setup(_run_of(place.parent if place.name == LORA_FILE else place))
    trained_on = setup.get("weights_before_training") if setup.get("tuning") == "lora" else None
    tensors = base_tensors(denoiser)
    if trained_on is None or any(tensor.is_meta for tensor in tensors.values()):  # a plan has no weights
        return
    here = fingerprint(tensors)
    if here != trained_on:
        logger.warning(
            "The LoRA of %s was trained on weights of the fingerprint %s, and these have %s: another base, "
            "revision, `dtype` or quantization.",
            *(place, trained_on, here),
        )


def _attach_peft(denoiser: nn.Module, folder: Path, seed: int) -> None:
    if not (folder / PEFT_FILE).is_file():
        raise ValueError(_no_lora(folder / PEFT_FILE))
    config = PeftConfig.from_pretrained(str(folder))
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # overwritten below
        config.inference_mode = False
    name = add_lora(denoiser, config, (), seed)
    expected = {key: tuple(value.shape) for key, value in adapter_state(denoiser, name).items()}
    state = {key.removeprefix(PEFT_PREFIX): value for key, value in load_file(folder / PEFT_FILE).items()}
    stored = {key: tuple(value.shape) for key, value in state.items()}
    if stored != expected:
        differing = sorted(set(stored.items()) ^ set(expected.items()))[:3]
        raise ValueError(
            f"The LoRA in {folder} is of another architecture than this {type(denoiser).__name__}: it holds "
            f"{len(stored)} tensors for {len(expected)}, such as {differing}. Name the base that it was trained on."
        )
    if not any(weight.is_meta for weight in denoiser.parameters()):  # a plan has no weights
        set_peft_model_state_dict(denoiser, state, adapter_name=name)


def _attach_by_pipeline(pipeline: Any, file: Path) -> None:
    """A file in a format that diffusers converts."""
    if not loads_lora(type(pipeline)):
        raise ValueError(
            f"diffusers has no reader of LoRA files for {type(pipeline).__name__}, got {file}. Use a folder in PEFT's "
            f"format, with {PEFT_CONFIG_FILE}."
        )
    if not file.is_file() or file.suffix != ".safetensors":
        raise ValueError(_no_lora(file))
    with safe_open(file, "pt") as opened:
        _check_kind(opened.keys(), file)
    pipeline.load_lora_weights(
        file.parent, weight_name=file.name, adapter_name=POLICY_ADAPTER, use_safetensors=True, local_files_only=True
    )


def _no_lora(file: Path) -> str:
    return (
        f"A LoRA is a folder with {PEFT_CONFIG_FILE} and {PEFT_FILE}, or with {LORA_FILE}, or a .safetensors file; "
        f"there is none at {file}. Pickled files (.bin, .pt, .ckpt) are never read."
    )


def _check_kind(keys: Iterable[str], file: Path) -> None:
    keys = list(keys)
    for mark, kind in _OTHER_KINDS.items():
        if any(mark in key for key in keys):
            raise ValueError(
                f"The adapter that trains is a LoRA, and {file} is {kind}: its reference and its files would need "
                "another arithmetic. Fuse it into the base, and train a LoRA on that."
            )
    of_text = [key for key in keys if key.startswith(_OF_TEXT)]
    if of_text:
        raise ValueError(
            f"Text encoders do not train here, and {file} has a LoRA for them too, such as {of_text[0]}: what is saved "
            "would lack it. Fuse it into the base, or remove these tensors from the file."
        )


def _local(source: str) -> Path:
    """A LoRA's folder or file; what the Hub has is downloaded."""
    path = Path(source)
    if path.exists() or os.path.isabs(source) or source.startswith(".") or source.count("/") != 1:
        if not path.exists():
            raise ValueError(f"A LoRA is a folder, a .safetensors file or a Hub id, and there is no {source}.")
        return path
    try:
        return Path(snapshot_download(source, allow_patterns=[PEFT_CONFIG_FILE, PEFT_FILE, LORA_FILE, SETUP_FILE]))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"A LoRA is a folder, a .safetensors file or a Hub id; there is no folder {source}, and the Hub did not "
            f"give it: {error}"
        ) from error


def _absolute(name: str) -> str:
    return os.path.abspath(name) if os.path.exists(name) else name


def _as_set(names: str | Iterable[str]) -> set[str]:
    return {names} if isinstance(names, str) else set(names)

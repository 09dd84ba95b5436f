"""The engine of a plan, from a configuration of accelerate or of DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ..planning.layouts import ENGINES, Layout
from . import launch

_KINDS = {"MULTI_GPU": "ddp", "FSDP": "fsdp2", "NO": "single"}


def layout_of(config: str | None, engine_file: Any, processes: str | int | None) -> Layout:
    """How the processes share a model, without the precision.

    Args:
        config (`str`, *optional*): `--accelerate_config`: a packaged name, or the path of a file that accelerate reads.
        engine_file (`str` or `dict`, *optional*): `--deepspeed`: a configuration of DeepSpeed, or its JSON file.
        processes (`str` or `int`, *optional*): `--num_processes`; else that of the file of accelerate.

    Raises:
        `ValueError`: If the engine is none that a plan knows, or the number of processes is missing or no number
            from 1.
    """
    facts: dict[str, Any] = {"name": "single"}
    if config is not None:
        settings = _mapping(yaml.safe_load(launch.config_path(config).read_text(encoding="utf-8")), config)
        facts = _of_accelerate(settings, config)
        processes = settings.get("num_processes") if processes is None else processes
    if engine_file is not None:
        facts = _of_json(_read_json(engine_file))
    if processes is None and facts["name"] != "single":
        raise ValueError(
            f"A plan for {facts['name']} needs the number of processes, which share the model. Add `--num_processes`."
        )
    count = 1 if processes is None else _number(processes)
    if facts["name"] == "single" and count > 1:
        facts["name"] = "ddp"
    return Layout(**facts, processes=count)


def _of_accelerate(settings: dict[str, Any], name: str) -> dict[str, Any]:
    kind = settings.get("distributed_type", "NO")
    if kind == "DEEPSPEED":
        given = _mapping(settings.get("deepspeed_config"), "deepspeed_config")
        if "deepspeed_config_file" in given:
            return _of_json(_read_json(given["deepspeed_config_file"]))
        return {
            "name": _zero(given.get("zero_stage", 2)),
            "offloads_optimizer": _offloads(given.get("offload_optimizer_device")),
            "offloads_weights": _offloads(given.get("offload_param_device")),
        }
    if kind == "FSDP":
        return _of_sharding(_mapping(settings.get("fsdp_config"), "fsdp_config"))
    if kind not in _KINDS:
        raise ValueError(
            f"A plan knows one process, DDP, FSDP2 and ZeRO-1 to 3; {name} has `distributed_type: {kind}`."
        )
    return {"name": _KINDS[kind]}


def _of_sharding(given: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": "fsdp2", "reshards": given.get("fsdp_reshard_after_forward", True) is not False}
    if given.get("fsdp_offload_params", False):
        facts |= {"offloads_optimizer": True, "offloads_weights": True}
    if given.get("fsdp_auto_wrap_policy") == "NO_WRAP":
        facts["units"] = ()
    elif given.get("fsdp_transformer_layer_cls_to_wrap"):
        facts["units"] = tuple(name.strip() for name in given["fsdp_transformer_layer_cls_to_wrap"].split(","))
    return facts


def _of_json(config: dict[str, Any]) -> dict[str, Any]:
    given = _mapping(config.get("zero_optimization"), "zero_optimization")
    facts: dict[str, Any] = {"name": _zero(given.get("stage", 0)), "overlaps": given.get("overlap_comm") is True}
    for part, name in (("optimizer", "offloads_optimizer"), ("param", "offloads_weights")):
        facts[name] = _offloads(_mapping(given.get(f"offload_{part}"), f"offload_{part}").get("device"))
    names = {
        "reduce_bucket_size": "bucket",
        "stage3_max_live_parameters": "live",
        "stage3_prefetch_bucket_size": "prefetch",
    }
    for key, name in names.items():
        if isinstance(given.get(key), (int, float)):  # "auto" leaves DeepSpeed's default
            facts[name] = int(given[key])
    return facts


def _zero(stage: Any) -> str:
    name = f"zero{stage}"
    if name not in ENGINES:
        raise ValueError(f"A plan of DeepSpeed needs ZeRO stage 1, 2 or 3, got {stage!r}. Set the stage.")
    return name


def _read_json(given: Any) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    file = Path(given).expanduser()
    if not file.is_file():
        raise ValueError(f"DeepSpeed's configuration must be a JSON file, got {given!r}, which does not exist.")
    return _mapping(json.loads(file.read_text(encoding="utf-8")), str(given))


def _offloads(device: Any) -> bool:
    return (device or "none") != "none"


def _mapping(value: Any, name: str) -> dict[str, Any]:
    """What a file has under a name; what is empty has no settings."""
    if not isinstance(value or {}, dict):
        raise ValueError(f"{name} must map names to values, got {value!r}.")
    return value or {}


def _number(processes: str | int) -> int:
    try:
        count = int(processes)
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise ValueError(f"`--num_processes` must be a number, at least 1, got {processes!r}.")
    return count

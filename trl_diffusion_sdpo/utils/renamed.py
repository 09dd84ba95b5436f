"""Settings of earlier versions: where each of them went."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .errors import UserError


@dataclass(frozen=True)
class Renamed:
    """A setting that is gone or has another place.

    Args:
        sentence (`str`): End of the sentence that begins with the setting's name.
        default (`Any`): Value if it was not set.
        mapping, key (`str`): Setting that holds the value now, and the value's name in it. Empty if there is none.
        others (`dict[str, Any]`): Other settings that now belong to a value that was set.
    """

    sentence: str
    default: Any = False
    mapping: str = ""
    key: str = ""
    others: dict[str, Any] = field(default_factory=dict)


def _safeguard(key: str, default: Any) -> Renamed:
    return Renamed(f"is now `safeguard_kwargs={{'{key}': ...}}`", default, "safeguard_kwargs", key)


RENAMED = {
    "safeguard_granularity": _safeguard("granularity", "batch"),
    "safeguard_eps": _safeguard("eps", 0.0),
    "safeguard_anchor": _safeguard("anchor", None),
    "safeguard_low_memory": _safeguard("low_memory", False),
    "snr_gamma": Renamed(
        "is now `timestep_weighting='min_snr'` with `weighting_kwargs={'snr_gamma': ...}`",
        None,
        "weighting_kwargs",
        "snr_gamma",
        {"timestep_weighting": "min_snr"},
    ),
    "attention_backend": Renamed(
        "is now the environment variable `DIFFUSERS_ATTN_BACKEND`, which diffusers reads", None
    ),
    "auto_beta": Renamed("is gone, because it did not clearly change a score; set `beta`"),
    "checkpoint_on_interrupt": Renamed(
        "is gone, because a run always writes a checkpoint when it is interrupted", True
    ),
    "image_interpolation": Renamed("is gone, because images are always resized bilinearly", "bilinear"),
    "n_timesteps_per_pair": Renamed("is gone; raise `gradient_accumulation_steps` for less noisy gradients", 1),
    "num_noise_bins": Renamed("is gone, because there are always 8 noise bins", 8),
    "torch_compile_regional": Renamed("is now what `torch_compile` does, if diffusers lists the model's blocks"),
}
# Names that no stored run has: an option of `evaluate`, and the name of a setting in other trainers.
_OTHER_SENTENCES = {
    "layout": "is now the script `examples/scripts/benchmark_folders.py`, which you run after `evaluate`",
    "min_snr_gamma": RENAMED["snr_gamma"].sentence,
}


def renamed_setting(name: str) -> str:
    """Return a sentence that says where a setting of earlier versions went, or an empty string for other names."""
    name = name.replace("-", "_")
    sentence = RENAMED[name].sentence if name in RENAMED else _OTHER_SENTENCES.get(name)
    return f"`{name}` {sentence}." if sentence else ""


def refuse_renamed(names: Iterable[str]) -> None:
    """Raise `ValueError` with a sentence for each name of a setting of earlier versions."""
    sentences = [sentence for sentence in map(renamed_setting, names) if sentence]
    if sentences:
        raise UserError(" ".join(sentences))


def with_new_names(stored: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a run of an earlier version in their places of today, and a sentence for each one that is
    gone, if the run had changed it."""
    settings = {name: value for name, value in stored.items() if name not in RENAMED}
    gone = []
    for name, renamed in RENAMED.items():
        if name not in stored:
            continue
        value = stored[name]
        if renamed.mapping:
            settings[renamed.mapping] = {**(settings.get(renamed.mapping) or {})}
        if value == renamed.default:
            continue
        if renamed.mapping:
            settings[renamed.mapping][renamed.key] = value
            settings.update(renamed.others)
        else:
            gone.append(f"{renamed_setting(name)} The checkpoint's run had {name}={value!r}.")
    return settings, gone

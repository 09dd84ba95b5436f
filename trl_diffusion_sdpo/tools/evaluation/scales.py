"""Evaluate a tuned model at several scales. Scale 0 is the base model, 1 the tuned model, and larger scales
extrapolate."""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.helpers import rescale_adapter_scale
from torch import nn

from ...models.adapters import active_adapter, adapter_layers, base_tensors, lora_configs
from ...models.reference import architecture_difference
from ...saving.model_card import recommend_scale
from ...saving.starting_point import run_of
from ...utils.errors import UserError
from ...utils.statistics import mean_interval, standard_error
from ..guidance import preference_guidance
from ..guidance.arithmetic import interpolate
from .candidate import Candidate

FEWEST_PROMPTS = 8  # with fewer, standard errors are unreliable and often too small
CARD_KEYS = {"weights": "weights", "guidance": "prediction"}  # form -> key of the recommended scale in a model card


@dataclass(frozen=True)
class Sweep:
    """Results of a tuned model at several scales.

    Args:
        name (`str`): Name of the tuned model.
        form (`str`): What was scaled: `"weights"` for their change, `"guidance"` for the change of predictions
            (preference guidance).
        names (`dict[float, str]`): Scale -> name of the candidate, in ascending order of scale. Scale 0 is the base
            model.
        recommended (`dict[str, float | None]`): Scorer -> recommended scale, `None` with too few prompts.
    """

    name: str
    form: str
    names: dict[float, str]
    recommended: dict[str, float | None]


def at_scales(candidate: Candidate, scales: Sequence[float]) -> list[Candidate]:
    """Return copies of a candidate, one at each scale, with names such as `tuned-2` and `tuned-1.5`."""
    if candidate.scale is not None:
        raise UserError(
            f"A model with a scale cannot be evaluated at several other scales, and {candidate.name} has the scale "
            f"{candidate.scale:g}. Set either the scale of the model or `scales`."
        )
    return [replace(candidate, name=f"{candidate.name}-{scale:g}", scale=scale) for scale in sorted({*scales})]


def sweeps_of(candidates: Sequence[Candidate], scores: Mapping[str, Mapping[str, np.ndarray]]) -> list[Sweep]:
    """Group the candidates that differ only in scale, and recommend one for each group of two or more.

    The first candidate is the base model and belongs to no group.
    """
    groups: dict[str, list[Candidate]] = defaultdict(list)
    base, *others = candidates
    for one in others:
        if one.scale is not None:
            model = one.model if isinstance(one.model, str) else id(one.model)
            groups[str((model, one.lora, one.form, one.interval, one.call_kwargs))].append(one)
    sweeps = []
    for group in groups.values():
        if len(group) < 2:
            continue
        by_scale = sorted((one.scale or 0.0, one.name) for one in group)
        names = {0.0: base.name, **dict(by_scale)}
        recommended = {
            scorer: recommended_scale({scale: by_model[name] for scale, name in names.items()})
            for scorer, by_model in scores.items()
        }
        sweeps.append(Sweep(by_scale[0][1].removesuffix(f"-{by_scale[0][0]:g}"), group[0].form, names, recommended))
    return sweeps


def recommended_scale(scores: Mapping[float, np.ndarray]) -> float | None:
    """Return the smallest scale that is about as good as the best one, which has the highest mean score.

    Its mean score may be lower by at most one standard error of the difference between the two, computed over prompts.
    The base model (scale 0) is about as good unless the 95 % interval of the difference is above 0.

    Args:
        scores (`Mapping[float, np.ndarray]`): Scale -> scores `(prompts, seeds)`, NaN for images without one.

    Returns:
        `float` or `None`: The scale, or `None` if fewer than eight prompts have scores at every scale.
    """
    usable = np.all([np.isfinite(values).any(axis=1) for values in scores.values()], axis=0)
    if usable.sum() < FEWEST_PROMPTS:
        return None
    by_prompt = {scale: np.nanmean(values[usable], axis=1) for scale, values in scores.items()}
    means = {scale: float(values.mean()) for scale, values in by_prompt.items()}
    best = max(means, key=means.__getitem__)
    if 0.0 in by_prompt and mean_interval(by_prompt[best] - by_prompt[0.0])[0] <= 0:
        return 0.0
    as_good = [
        scale
        for scale in means
        if scale and means[best] - means[scale] <= standard_error((by_prompt[best] - by_prompt[scale]).tolist())
    ]
    return min(as_good)


def recommend_in_cards(
    sweeps: Sequence[Sweep], candidates: Sequence[Candidate], call_kwargs: Mapping[str, Any] | None
) -> None:
    """Write the first scorer's recommended scale into the model card of each evaluated training run."""
    by_name = {one.name: one for one in candidates}
    for sweep in sweeps:
        one = by_name[sweep.names[max(sweep.names)]]
        scale = next(iter(sweep.recommended.values()), None)
        source = one.lora or one.model
        if scale is None or not isinstance(source, str):
            continue
        used = {**(call_kwargs or {}), **(one.call_kwargs or {})}
        numbers = {CARD_KEYS[sweep.form]: scale}
        if used.get("guidance_scale") is not None:
            numbers["guidance_scale"] = used["guidance_scale"]
        run = run_of(Path(source))
        recommend_scale(run, numbers, average=run != Path(source))


@contextlib.contextmanager
def scaled(candidate: Candidate, pipeline: Any, denoiser: nn.Module, base: nn.Module | None) -> Iterator[None]:
    """Within the context, multiply a candidate's change of weights or predictions by its scale.

    Args:
        base (`nn.Module`, *optional*): The base model's denoiser, used only if the candidate has no LoRA.
    """
    is_lora = active_adapter(denoiser) is not None
    if candidate.scale is None:
        yield
    elif candidate.form == "guidance":
        with preference_guidance(
            pipeline,
            candidate.scale,
            reference=None if is_lora else base,
            interval=candidate.interval,
            allow_distilled=True,  # an evaluation shows whether guidance improves models of few steps
        ):
            yield
    elif is_lora:
        if any(config.use_dora for config in lora_configs(denoiser).values()):
            raise UserError(
                f"The weights of a DoRA cannot be scaled, because they are normalized. {candidate.name} is a DoRA with "
                f"the scale {candidate.scale:g}. Use `form='guidance'`, or leave the scale out."
            )
        with rescale_adapter_scale(denoiser, candidate.scale):
            yield
    else:
        assert base is not None
        with _interpolated(denoiser, base, candidate):
            yield


@contextlib.contextmanager
def _interpolated(denoiser: nn.Module, base: nn.Module, candidate: Candidate) -> Iterator[None]:
    different = architecture_difference(denoiser, base)
    if different is not None:
        raise UserError(
            f"To scale the weights of {candidate.name}, the first model in the list must be its base model, with the "
            f"same architecture. The first model differs: {different}. List the right base model first."
        )
    tuned = {name: tensor.detach().clone() for name, tensor in base_tensors(denoiser).items()}
    if active_adapter(base) is not None:  # the base's weights are those with its LoRA
        base = copy.deepcopy(base)
        for layer in adapter_layers(base):
            layer.merge()
    start = base_tensors(base)
    assert candidate.scale is not None
    try:
        with torch.no_grad():
            for name, tensor in base_tensors(denoiser).items():
                tensor.copy_(interpolate(start[name], tuned[name], candidate.scale))
        yield
    finally:
        with torch.no_grad():
            for name, tensor in base_tensors(denoiser).items():
                tensor.copy_(tuned[name])

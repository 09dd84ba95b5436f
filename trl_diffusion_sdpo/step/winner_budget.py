"""The winner budget during training: every few steps, measure the winners' error in each noise bin on a fixed set of
pairs (the probe), and adapt the scales of the losers' gradients. `losses/winner_budget.py` has the formulas for the
scales."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn

from ..families.noise import generators_of, sent, standard_normal, uniform
from ..losses import BudgetController, mean_error, noise_bin_of, order_by_scores, region_factors
from ..models.ema import EMAWeights
from ..utils.errors import UserError
from .meters import MetricMeter
from .pair_forward import NoisyBatch, PairForward, eval_mode, take_rows

BUDGET_FILE = "winner_budget.json"


@dataclass(frozen=True)
class ProbeSettings:
    """Pairs in the probe, and optimizer steps between two measurements. Raises `ValueError` for a number below 1."""

    pairs: int = 32
    steps: int = 10

    def __post_init__(self) -> None:
        if min(self.pairs, self.steps) < 1:
            raise UserError(
                f"`winner_budget_kwargs` must have `pairs` and `steps` of at least 1, got {self.pairs} and "
                f"{self.steps}. Leave them out to use the defaults."
            )


@dataclass(frozen=True)
class ProbeInputs:
    """Pairs of the probe before they are encoded."""

    inputs: dict[str, Any]  # batch of the collator, on the device
    # `False` for repetitions that give all processes equally many pairs; their errors are ignored.
    counts: list[bool]


@dataclass(frozen=True)
class ProbeBatch:
    """Noisy latents of B winners of the probe, all in the same noise bin. Noise and timesteps stay the same during
    training."""

    batch: NoisyBatch
    noise_bins: torch.Tensor  # index of the noise bin, the same in all rows, int64 (B,)
    counts: torch.Tensor  # weight of each row in the mean error: 1, or 0 for repeated pairs; (B,)


class WinnerBudget:
    """Limits the rise of the winners' error during training. Checkpoints contain the state of its controller.

    Args:
        sorts_by_scores (`bool`): Whether the scores decide which image of a pair is the winner.
        average ([`~trl_diffusion_sdpo.models.ema.EMAWeights`], *optional*): Averaged weights to measure instead of the
            policy's. At low noise levels, their errors vary less between steps.
    """

    def __init__(
        self,
        controller: BudgetController,
        forward: PairForward,
        meter: MetricMeter,
        *,
        sorts_by_scores: bool,
        average: EMAWeights | None,
    ):
        self.controller = controller
        self.probe: list[ProbeBatch] = []
        self._forward = forward
        self._meter = meter
        self._average = average
        self._sorts_by_scores = sorts_by_scores

    def begin(self, policy: nn.Module, pairs: Sequence[ProbeInputs]) -> None:
        """Build the probe from `pairs`, and measure its errors before the first step; a resumed run reads them from the
        checkpoint. `policy` is as the engine (DDP, FSDP2, DeepSpeed) wrapped it."""
        self.probe = self.make_probe(pairs)
        if self.controller.initial_errors.isnan().all():
            self.controller.initial_errors = self.measure(policy)

    def update(self, policy: nn.Module) -> None:
        """Measure the errors on the probe, and adapt the scales of the losers' gradients."""
        self._meter.add(self.controller.steer(self.measure(policy)), 1)

    def save(self, folder: Path) -> None:
        """Write the controller's state into the folder of a checkpoint."""
        (folder / BUDGET_FILE).write_text(json.dumps(self.controller.state()) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Load the state that `save` wrote. Raises `ValueError` if the file is missing."""
        file = folder / BUDGET_FILE
        if not file.is_file():
            raise UserError(
                f"A run with `winner_budget` can resume only from a checkpoint that contains {BUDGET_FILE}, and "
                f"{folder} does not. Resume from a complete checkpoint of a run with `winner_budget`, or leave the "
                "setting out."
            )
        self.controller.load_state(json.loads(file.read_text(encoding="utf-8")))

    @torch.no_grad()
    def measure(self, policy: nn.Module) -> torch.Tensor:
        """Return the winners' mean error on the probe in each noise bin, over all processes: `(num_noise_bins,)`, NaN
        where training uses no timestep."""
        sums = torch.zeros(2, self.controller.num_noise_bins, device=PartialState().device)
        weights = contextlib.nullcontext(policy) if self._average is None else self._average.active(policy)
        with eval_mode([policy]), weights as model:
            assert model is not None
            for winners in self.probe:
                batch = winners.batch
                error = mean_error(batch.residual(self._forward.predict(model, batch)))  # (B,)
                sums.index_add_(1, winners.noise_bins, torch.stack([error * winners.counts, winners.counts]))
        sums = reduce(sums, "sum")
        return sums[0] / sums[1]

    @torch.no_grad()
    def make_probe(self, pairs: Sequence[ProbeInputs]) -> list[ProbeBatch]:
        """Return the noisy latents of the probe: each winner of `pairs` at one timestep in every noise bin."""
        probe = []
        for batch_of_pairs in pairs:
            inputs = batch_of_pairs.inputs
            latents, conditioning = self._forward.encode(inputs)
            region = region_factors(inputs["masks"], latents) if "masks" in inputs else None
            if self._sorts_by_scores:
                order = order_by_scores(inputs["scores"])
                latents = latents[order]
                conditioning = take_rows(conditioning, order)
                region = None if region is None else region[order]
            # Clone the winners, because a view would keep the losers in memory.
            winners = latents.chunk(2)[0], {name: value.chunk(2)[0].clone() for name, value in conditioning.items()}
            counts = torch.tensor(batch_of_pairs.counts, device=latents.device).float()
            for noise_bin in range(self.controller.num_noise_bins):
                batch = self._at_noise_bin(noise_bin, *winners, inputs["seeds"])
                if batch is not None:
                    batch = batch if region is None else replace(batch, region=region.chunk(2)[0].clone())
                    bins = torch.full_like(batch.timesteps, noise_bin, dtype=torch.long)
                    probe.append(ProbeBatch(batch, bins, counts))
        return probe

    def _at_noise_bin(
        self, noise_bin: int, clean: torch.Tensor, conditioning: dict[str, torch.Tensor], seeds: list[int]
    ) -> NoisyBatch | None:
        """Return latents with noise and timesteps drawn from the pairs' seeds, or `None` if training uses no timestep
        in the noise bin."""
        forward = self._forward
        process = forward.family.noise_process
        length = forward.family.image_seq_len(clean)
        every = process.candidate_timesteps(torch.device("cpu"), **forward.noise_settings.timesteps)
        noise_levels = process.noise_level(every, length)
        within = every[noise_bin_of(noise_levels, self.controller.num_noise_bins) == noise_bin]
        if not len(within):
            return None
        generators = generators_of([seed + 1 + noise_bin for seed in seeds])
        chosen = (uniform(generators) * len(within)).long().clamp(max=len(within) - 1)
        timesteps = sent(within[chosen], clean.device)
        noise = standard_normal(clean.shape, generators, clean.device, clean.dtype)
        return forward.add_noise(clean, noise, timesteps, conditioning)


def probe_inputs(
    items: Sequence[Any], batch_size: int, to_inputs: Callable[[list[Any]], dict[str, Any]], *, rank: int, world: int
) -> list[ProbeInputs]:
    """Return this process's share of the probe in batches. `to_inputs` makes a batch of pairs, on the device."""
    by_size: dict[Any, list[Any]] = {}
    for item in items:
        by_size.setdefault(item.get("pixel_values", item.get("moments")).shape, []).append(item)
    probe = []
    for same in by_size.values():
        rows = same[rank::world]
        share = len(rows)
        # Under FSDP2 and DeepSpeed, processes run each forward pass together, so they get equally many rows.
        rows += same[:1] * (-(-len(same) // world) - share)
        batches = [range(start, min(start + batch_size, len(rows))) for start in range(0, len(rows), batch_size)]
        probe += [ProbeInputs(to_inputs([rows[i] for i in batch]), [i < share for i in batch]) for batch in batches]
    return probe

"""A budget for the winners: a probe measures what training has done to their error at each noise level, and the losers'
gradients are scaled down where that exceeds the budget, and back up where it does not."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from diffusers.utils.torch_utils import randn_tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.pairs import PreferenceDataset
from ..losses import order_by_scores
from ..trainer.callbacks import evaluating
from .meters import noise_bin_of
from .noisy_batch import NoisyBatch, take_rows

if TYPE_CHECKING:
    from ..trainer.diffusion_sdpo_trainer import DiffusionSDPOTrainer

logger = logging.getLogger(__name__)

BUDGET_FILE = "winner_budget.json"
GAIN = 0.5  # how far one measurement moves the logarithm of a scale, at a change of once the budget
LARGEST_MOVE = 1.5  # of that logarithm
LOWEST = 1e-2  # below it a level trains its winners only; what recovers starts from here


@dataclass(frozen=True)
class Probe:
    """Winners at fixed noise, a few at every noise level.

    Args:
        batches (`list[NoisyBatch]`): This process's winners; may be empty where there are more processes than pairs.
        parts (`list[torch.Tensor]`): For each batch, the noise level of each row, int64 `(N,)`.
        counts (`list[torch.Tensor]`): For each batch, 1 for each row, and 0 for one that is there only because all
            processes must have as many; `(N,)`.
        num_noise_bins (`int`): Number of noise levels.
    """

    batches: list[NoisyBatch]
    parts: list[torch.Tensor]
    counts: list[torch.Tensor]
    num_noise_bins: int

    @torch.no_grad()
    def errors(self, predict: Callable[[NoisyBatch], torch.Tensor], accelerator: Accelerator) -> torch.Tensor:
        """Mean error at each level over all processes, `(levels,)`; NaN at levels that the schedule does not visit."""
        sums = torch.zeros(2, self.num_noise_bins, device=accelerator.device)
        for batch, part, count in zip(self.batches, self.parts, self.counts, strict=True):
            error = (predict(batch) - batch.target.float()).square().flatten(1).mean(1)  # (N,)
            sums.index_add_(1, part, torch.stack([error * count, count]))
        sums = accelerator.reduce(sums, reduction="sum")
        return sums[0] / sums[1]


class WinnerBudget:
    """The closed loop: scales of the losers' gradients, one a noise level.

    With `c` the winners' change at a level as a share of their error before training, and `b` the budget, a
    measurement multiplies the level's scale by `exp(GAIN (b - c) / b)`, within bounds. Below `LOWEST` it is 0: that
    level trains its winners only, until their change is within the budget again. The levels share their weights: while
    one is over the budget with its own losers shut off, the losers of all others are scaled down as well, as fast as
    its own would be.

    Args:
        budget (`float`): Largest change, greater than 0.
        num_noise_bins (`int`): Number of noise levels.
        device (`torch.device`): Of the scales; nothing here waits for it.
    """

    def __init__(self, budget: float, num_noise_bins: int, device: torch.device):
        self.budget = budget
        self.log_scale = torch.zeros(num_noise_bins, device=device)
        self.before: torch.Tensor | None = None  # errors before training, (levels,)

    @property
    def scale(self) -> torch.Tensor:
        """What the losers' gradients are multiplied by, `(levels,)` in `[0, 1]`."""
        scale = self.log_scale.exp()
        return torch.where(scale < LOWEST, 0, scale)

    def weights(self, levels: torch.Tensor) -> torch.Tensor:
        """The scale of each pair, `(B,)`, from the pairs' noise levels."""
        return self.scale[noise_bin_of(levels, len(self.log_scale))]

    def steer(self, errors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Move the scales by the probe's errors `(levels,)`; the first ones are those before training.

        Returns:
            Detached scalars: the largest change (`budget/winner_change`), the mean scale (`budget/scale`), the share
            of levels over the budget (`budget/over`) and of those that are over it with their losers shut off already
            (`budget/unmet`).
        """
        if self.before is None:
            self.before = errors
        visited = self.before > 0  # not NaN
        # Errors that are no numbers are over every budget.
        change = torch.where(visited, (errors / self.before - 1).nan_to_num(nan=torch.inf), 0)
        unmet = (change > self.budget) & (self.scale == 0)
        move = (GAIN * (1 - change / self.budget)).clamp(-LARGEST_MOVE, LARGEST_MOVE)
        elsewhere = torch.where(unmet, move, torch.inf).min()  # below 0 if there is such a level
        self.log_scale = (self.log_scale + torch.minimum(move, elsewhere)).clamp(min=math.log(LOWEST / 2), max=0.0)
        count = visited.sum()
        return {
            "budget/winner_change": torch.where(visited, change, -torch.inf).max(),
            "budget/scale": torch.where(visited, self.scale, 0).sum() / count,
            "budget/over": ((change > self.budget) & visited).sum() / count,
            "budget/unmet": (unmet & visited).sum() / count,
        }

    def save(self, folder: Path) -> None:
        """Write the loop's state."""
        state: dict[str, Any] = {"log_scale": self.log_scale.tolist(), "before": None}
        if self.before is not None:  # JSON has no NaN
            state["before"] = [None if math.isnan(error) else error for error in self.before.tolist()]
        (folder / BUDGET_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read what [`WinnerBudget.save`] wrote.

        Raises:
            `ValueError`: If there is none, or it is of another number of noise levels.
        """
        file = folder / BUDGET_FILE
        if not file.is_file():
            raise ValueError(f"A checkpoint with a `winner_budget` must hold {BUDGET_FILE}; {folder} does not.")
        state = json.loads(file.read_text(encoding="utf-8"))
        if len(state["log_scale"]) != len(self.log_scale):
            raise ValueError(
                f"{file} holds {len(state['log_scale'])} noise levels, and `num_noise_bins` is {len(self.log_scale)}. "
                "Resume with the settings that wrote it."
            )
        self.log_scale = self.log_scale.new_tensor(state["log_scale"])
        self.before = None
        if state["before"] is not None:
            before = [math.nan if error is None else error for error in state["before"]]
            self.before = self.log_scale.new_tensor(before)


class WinnerBudgetCallback(TrainerCallback):
    """Has the probe measured before the first step and after every so many.

    Args:
        trainer ([`DiffusionSDPOTrainer`]): Its `steer_by_probe` is called.
    """

    def __init__(self, trainer: DiffusionSDPOTrainer):
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._trainer.begin_budget()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._trainer.end_budget()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.global_step % args.winner_budget_steps == 0:
            self._trainer.steer_by_probe()


class WinnerBudgetMixin:
    """How much losers count at their noise level, and what a trainer with a `winner_budget` does beside its steps."""

    def _loser_weights(self, levels: torch.Tensor) -> dict[str, Any]:
        """What noise levels `(B,)` make of the losers: within the range or not, within the budget, in which bucket."""
        weights: torch.Tensor | None = None
        if self.args.loser_noise_range is not None:
            low, high = self.args.loser_noise_range
            weights = ((levels >= low) & (levels <= high)).float()
        if self._budget is not None:
            scales = self._budget.weights(levels)
            weights = scales if weights is None else weights * scales
        noise_bins = noise_bin_of(levels, self.args.num_noise_bins)
        return {"loser_weights": weights, "noise_bins": noise_bins, "num_noise_bins": self.args.num_noise_bins}

    def begin_budget(self) -> None:
        """Draw the probe, and measure it before the first step; a resumed run has that in its checkpoint."""
        self._warned_of_budget, self._unmet = False, None
        every, steps = self.args.winner_budget_steps, self.state.max_steps
        if every > steps:
            logger.warning(
                "`winner_budget_steps=%s` is more than the run's %s steps: nothing will be measured. Set fewer.",
                every,
                steps,
            )
        if self.eval_dataset is None:
            logger.warning("`winner_budget` is measured on training pairs, as there is no `eval_dataset`.")
        if self.loss_spec.anchor == "error":
            logger.warning(
                "Under the loss %r a winner's own branch can raise its error: levels over the budget may not come back "
                "with their losers shut off.",
                self.args.loss_type,
            )
        self._probe_winners = self._draw_probe()
        if self._budget.before is None:
            self._budget.before = self._probe_errors()

    def end_budget(self) -> None:
        """Say what no log has said yet, and let go of the probe's memory."""
        if self._unmet is not None:
            self._warn_of_budget(float(self._unmet))
        self._probe_winners = None

    def steer_by_probe(self) -> None:
        """Measure, and move the scales."""
        found = self._budget.steer(self._probe_errors())
        self._unmet = found["budget/unmet"]
        self._meter["train"].add(found, 1)

    def _probe_errors(self) -> torch.Tensor:
        """Of the averaged weights where they are kept: those are what is delivered, and the jitter of single steps,
        which any training has at low noise, is not in them."""
        acting = contextlib.nullcontext if self.average is None else self.average.active
        with evaluating([self.model_wrapped]), acting(self.model_wrapped) as model:
            return self._probe_winners.errors(lambda batch: self._predict(model, batch), self.accelerator)

    def _warn_of_budget(self, unmet: float) -> None:
        if unmet and not self._warned_of_budget:
            self._warned_of_budget = True
            logger.warning(
                "`winner_budget=%s` is exceeded at some noise level with its losers shut off: training goes on there "
                "with the winners only, and as long as that does not help, everywhere. A larger budget, a lower or "
                "decaying learning rate or more pairs may meet it.",
                self.args.winner_budget,
            )

    @torch.no_grad()
    def _draw_probe(self) -> Probe:
        """Winners of pairs spread over the data, each at a timestep within every noise level."""
        items, world = self._probe_items(), self.accelerator.num_processes
        rows = items[self.accelerator.process_index :: world]
        own = len(rows)
        # Under engines a forward pass takes all processes: each has as many rows as the one with most.
        rows += items[:1] * (-(-len(items) // world) - own)
        size = 2 * (self._train_batch_size or self.args.per_device_train_batch_size)
        batches, parts, counts = [], [], []
        for start in range(0, len(rows), size):
            inputs = self._prepare_inputs(self.data_collator(rows[start : start + size]))
            latents, conditioning = self._encode(inputs)
            if self.loss_spec.needs_scores:  # the winner is whom the scores prefer, as in training
                order = order_by_scores(inputs["scores"])
                latents, conditioning = latents[order], take_rows(conditioning, order)
            # Copies: a half would keep the whole.
            winners = latents.chunk(2)[0], {name: value.chunk(2)[0].clone() for name, value in conditioning.items()}
            for level in range(self.args.num_noise_bins):
                batch = self._at_level(level, *winners, inputs["seeds"])
                if batch is not None:
                    batches.append(batch)
                    parts.append(torch.full_like(batch.timesteps, level, dtype=torch.long))
                    place = torch.arange(start, start + len(batch.timesteps), device=batch.timesteps.device)
                    counts.append((place < own).float())
        return Probe(batches, parts, counts, self.args.num_noise_bins)

    def _probe_items(self) -> list[Any]:
        """The pairs of the probe, as the collator takes them."""
        data = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        data = next(iter(data.values())) if isinstance(data, dict) else data
        view, wanted = data.for_evaluation(), self.args.winner_budget_pairs
        if isinstance(view, PreferenceDataset):
            wanted = min(wanted, len(view))
            items = [view[place * len(view) // wanted] for place in range(wanted)]
        else:
            items = list(islice(iter(view), wanted))
        if not items:
            raise ValueError("`winner_budget` needs pairs for its probe, got none. Pass pairs as `eval_dataset`.")
        return items

    def _at_level(
        self, level: int, clean: torch.Tensor, conditioning: dict[str, torch.Tensor], seeds: list[int]
    ) -> NoisyBatch | None:
        """Latents with noise and timesteps from the pairs' own seeds; `None` where no timestep that is drawn in
        training has this level."""
        process, length = self.family.noise_process, self.family.image_seq_len(clean)
        every = process.drawable(clean.device, **self._timesteps)
        within = every[noise_bin_of(process.noise_level(every, length), self.args.num_noise_bins) == level]
        if not len(within):
            return None
        generators = self._generators([seed + 1 + level for seed in seeds])
        uniform = torch.cat([torch.rand(1, generator=stream, device=clean.device) for stream in generators])
        timesteps = within[(uniform * len(within)).long().clamp(max=len(within) - 1)]
        noise = randn_tensor(clean.shape, generators, clean.device, clean.dtype)
        return NoisyBatch(
            process.add_noise(clean, noise, timesteps),
            process.target(clean, noise, timesteps),
            timesteps,
            conditioning,
            process.noise_level(timesteps, length),
        )

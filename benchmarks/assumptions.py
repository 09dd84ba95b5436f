"""Measure what Diffusion-SDPO's safeguard assumes: `python benchmarks/assumptions.py --model unet`.

The demo's U-Net, or a small transformer (`studies/small_transformer.py`), trains on off-policy pairs.

- **arms**: two trainings with AdamW, under the output rule and under the parameter rule. Every 20 steps they stop, and
  on batches at one noise level each (the *probe*) and on fresh batches at all levels, the gradients of winners and
  losers are compared at the output and in parameter space. Then one small step of SGD and one of AdamW are tried under
  each rule, and taken back.
- **sgd**: trainings by plain SGD. After each step, the winners of its own batch are predicted once more.

Finished trainings stay in `bench_output/`, so a second call only makes the missing ones. All of them go into
`results/assumptions_MODEL.json`, from which `make tables` writes the tables of docs/assumptions.md.

    python benchmarks/assumptions.py --model transformer --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from trl_diffusion_sdpo import DiffusionSDPOTrainer
from trl_diffusion_sdpo.engines.gradients import Gradient, inner_products
from trl_diffusion_sdpo.losses import NOISE_BINS, noise_bin_of, winner_error_gradient
from trl_diffusion_sdpo.losses.safeguard import loser_scale, output_cosine, output_scale
from trl_diffusion_sdpo.step.pair_forward import NoisyBatch, PairForward, PairPredictions
from trl_diffusion_sdpo.tools.demo.pairs import eval_pairs, off_policy_pairs
from trl_diffusion_sdpo.tools.demo.pipeline import load_base_pipeline

HERE = Path(__file__).parent
sys.path.append(str(HERE / "studies"))

import small_transformer  # noqa: E402
from study import Study  # noqa: E402

MODELS: dict[str, Callable[[], DiffusionPipeline]] = {
    "unet": load_base_pipeline,
    "transformer": small_transformer.load_base,
}
OUTPUT_MU = 0.6
PARAMETER_MU = 0.8
ARMS: dict[str, dict[str, Any]] = {
    "output, mu 0.6": {"safeguard": "output", "safeguard_mu": OUTPUT_MU},
    "parameter, mu 0.8": {"safeguard": "parameter", "safeguard_mu": PARAMETER_MU},
}
SGD_RULES: dict[str, dict[str, Any]] = {
    "none": {"safeguard": "none"},
    "output, mu 0.1": {"safeguard": "output", "safeguard_mu": 0.1},
    "output, mu 0.6": {"safeguard": "output", "safeguard_mu": OUTPUT_MU},
    "parameter, mu 0.1, anchor error": {
        "safeguard": "parameter",
        "safeguard_mu": 0.1,
        "safeguard_kwargs": {"anchor": "error"},
    },
    "parameter, mu 0.8": {"safeguard": "parameter", "safeguard_mu": PARAMETER_MU},
}
SHARED: dict[str, Any] = {"beta": 100.0, "lr_scheduler_type": "constant", "random_flip": False}
ARM_SETTINGS = {"learning_rate": 2e-4, "weight_decay": 0.01, "max_grad_norm": 1.0}
SGD_SETTINGS = {"optim": "sgd", "weight_decay": 0.0, "max_grad_norm": 0.0}  # plain: no momentum, decay or clipping
SGD_PAIRS = 8  # a step of plain SGD
BATCH = 16  # pairs of a step of an arm, and of each batch of the probe
FRESH = 4  # fresh batches together, for lambdas of up to 64 pairs
SINGLE_PAIRS = 2  # of each noise level, whose gradients are also compared one by one
GROUPS = (1, 4, 16, 64)  # pairs that share a lambda
# Length of the small step, relative to that of the weights. Its change of the error is the one that the gradient
# predicts, within a few per cent, which a table shows.
SMALL_STEP = 3e-6
EVAL_SEED = 70_000  # of the probe's pairs, which no training sees
FRESH_SEED = 80_000


# ---- A trainer that watches its own steps ---------------------------------------------------------------------------


class WatchedForward(PairForward):
    """Forward passes that keep the winners of the last batch, and their error before the step."""

    winners: NoisyBatch
    before: float

    def noisy_batch(self, inputs: dict[str, Any], policy: nn.Module | None = None) -> NoisyBatch:
        batch = super().noisy_batch(inputs, policy)
        if policy is not None and policy.training:
            self.winners = batch.halves()[0]
            self.before = self.winner_error(policy, self.winners)
        return batch

    @torch.no_grad()
    def winner_error(self, model: nn.Module, winners: NoisyBatch) -> float:
        """Return the mean squared error of winners, summed in float64."""
        return float((self.predict(model, winners).double() - winners.target.double()).square().mean())


class WatchedTrainer(DiffusionSDPOTrainer):
    pair_forward_class = WatchedForward
    pair_forward: WatchedForward
    eval_dataset: Any


def make_trainer(model: str, seed: int, folder: str, callback: TrainerCallback, **settings: Any) -> WatchedTrainer:
    """Return the trainer of one training, with the callback that measures it."""
    args = Study.arguments(seed, folder, **SHARED, **settings)
    held_out = drawn_once(eval_pairs, EVAL_SEED)
    trainer = WatchedTrainer(
        MODELS[model](), None, args, drawn_once(off_policy_pairs, seed), held_out, callbacks=[callback]
    )
    trainer.remove_callback(PrinterCallback)
    callback.trainer = trainer  # type: ignore[attr-defined]
    return trainer


@functools.cache
def drawn_once(draw: Callable[[int], Dataset], seed: int) -> Dataset:
    """Return pairs that take seconds to draw."""
    return draw(seed)


# ---- Plain SGD ------------------------------------------------------------------------------------------------------


class Changes(TrainerCallback):
    """Notes by how much each step changes the error of its own winners."""

    trainer: WatchedTrainer

    def __init__(self) -> None:
        self.changes: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        forward = self.trainer.pair_forward
        self.changes.append(forward.winner_error(self.trainer.denoiser, forward.winners) - forward.before)


def run_sgd(model: str, seed: int, rule: str, rate: float, steps: int) -> dict[str, Any]:
    """Train by plain SGD, and return how often and how far a step raised its own winners' error."""
    watch = Changes()
    settings = {**SGD_SETTINGS, **SGD_RULES[rule], "max_steps": steps, "learning_rate": rate}
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(model, seed, folder, watch, per_device_train_batch_size=SGD_PAIRS, **settings).train()
    rises = [change for change in watch.changes if change > 0]
    return {
        "steps": len(watch.changes),
        "rises": len(rises),
        "largest_rise": max(rises, default=0.0),
        "sum_of_rises": sum(rises),
        "sum_of_changes": sum(watch.changes),
    }


# ---- Arms -----------------------------------------------------------------------------------------------------------


class Probe(TrainerCallback):
    """Measures gradients and tried steps before the first step and every few steps. The training does not notice."""

    trainer: WatchedTrainer

    def __init__(self, every: int):
        self.every = every
        self.probes: list[dict[str, Any]] = []
        self.batches: dict[int, tuple[NoisyBatch, torch.Tensor]] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == 0:
            self.measure(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step % self.every == 0:
            self.measure(state.global_step)

    def measure(self, step: int) -> None:
        forward = self.trainer.pair_forward
        model = self.trainer.denoiser
        if self.batches is None:
            self.batches = self.fixed_batches()
        rows = []
        singles = []
        for noise_bin, (batch, reference) in self.batches.items():
            given = PairPredictions(batch, batch.target, reference)
            compared = compare(forward, model, given)
            rows.append({"batch": f"bin {noise_bin}", **compared.record, **self.tried(batch, compared)})
            # Gradients of a batch also have products of one pair's winner with another pair's loser.
            pairs = [torch.tensor([row, row + BATCH]) for row in range(SINGLE_PAIRS)]
            singles += [compare(forward, model, given.take(rows_of_pair)).spaces for rows_of_pair in pairs]
        fresh = self.fresh_batches(step)
        parts = [compare(forward, model, each) for each in fresh]
        for each, compared in zip(fresh[:1], parts[:1], strict=True):
            rows.append({"batch": "fresh", **compared.record, **self.tried(each.batch, compared)})
        self.probes.append({"step": step, "rows": rows, "single_pairs": singles, **lambdas_of_groups(parts)})

    def fixed_batches(self) -> dict[int, tuple[NoisyBatch, torch.Tensor]]:
        """Return, for each noise bin, the same pairs at timesteps of this bin, and the reference's predictions."""
        trainer = self.trainer
        forward = trainer.pair_forward
        process = forward.family.noise_process
        items = trainer.eval_dataset.for_evaluation().sample(BATCH)
        inputs = trainer._inputs_of(items)
        latents, conditioning = forward.encode(inputs)
        every = process.candidate_timesteps(torch.device("cpu"), **forward.noise_settings.timesteps)
        bins = noise_bin_of(process.noise_level(every, forward.family.image_seq_len(latents)))
        batches = {}
        for noise_bin in range(NOISE_BINS):
            within = every[bins == noise_bin]
            if not len(within):
                continue
            # Evenly spaced within the bin, so that no draw decides which levels are measured.
            chosen = within[torch.linspace(0, len(within) - 1, len(items)).long()]
            noise = torch.randn(latents[: len(items)].shape, generator=torch.Generator().manual_seed(noise_bin))
            batch = forward.add_noise(latents, torch.cat([noise, noise]), torch.cat([chosen, chosen]), conditioning)
            references = forward.predict_reference(trainer.denoiser, [batch])
            assert references is not None
            batches[noise_bin] = (batch, references[0])
        return batches

    def fresh_batches(self, step: int) -> list[PairPredictions]:
        """Return batches of held-out pairs with noise and timesteps as in training, other ones at each step."""
        trainer = self.trainer
        forward = trainer.pair_forward
        items = trainer.eval_dataset.for_evaluation().sample(FRESH * BATCH)
        predictions = []
        for number in range(FRESH):
            chosen = items[number::FRESH]
            inputs = trainer._inputs_of(chosen)
            inputs["seeds"] = [FRESH_SEED + 1000 * step + FRESH * row + number for row in range(len(chosen))]
            batch = forward.noisy_batch(inputs)
            references = forward.predict_reference(trainer.denoiser, [batch])
            assert references is not None
            predictions.append(PairPredictions(batch, batch.target, references[0]))
        return predictions

    def tried(self, batch: NoisyBatch, compared: Compared) -> dict[str, Any]:
        """Return the relative change of the winners' error by one small step of SGD, with what the gradient predicts
        for it, and by one step of the training's own AdamW, under each rule."""
        trainer = self.trainer
        forward = trainer.pair_forward
        weights = trained(trainer.denoiser)
        winners = batch.halves()[0]
        kept = [weight.detach().clone() for weight in weights]
        optimizer = trainer.optimizer.optimizer
        state = copy.deepcopy(optimizer.state_dict())
        before = forward.winner_error(trainer.denoiser, winners)
        length = float(sum(weight.double().square().sum() for weight in kept)) ** 0.5
        found: dict[str, Any] = {}
        for rule, scale in compared.scales.items():
            gradient = combined(compared.winner, compared.loser, scale)
            norm = float(inner_products([gradient])[0, 0]) ** 0.5
            rate = SMALL_STEP * length / norm
            products = compared.products
            predicted = -rate * float(products[2, 0] - scale * products[2, 1]) / before
            with torch.no_grad():
                for weight, part in zip(weights, gradient, strict=True):
                    if part is not None:
                        weight.sub_(rate * part)
            small = forward.winner_error(trainer.denoiser, winners) / before - 1
            restore(weights, kept)

            for weight, part in zip(weights, gradient, strict=True):
                weight.grad = None if part is None else part.clone()
            nn.utils.clip_grad_norm_(weights, ARM_SETTINGS["max_grad_norm"])
            optimizer.step()
            adamw = forward.winner_error(trainer.denoiser, winners) / before - 1
            restore(weights, kept)
            optimizer.load_state_dict(copy.deepcopy(state))
            found[rule] = {"predicted": predicted, "sgd": small, "adamw": adamw}
        for weight in weights:
            weight.grad = None
        return {"winner_error": before, "tried": found}


class Compared:
    """Gradients of winners and losers on one batch, at the output and in parameter space.

    Attributes:
        winner, loser (`Gradient`): The winners' part W of the loss gradient, and the negative L of the losers' part.
        products (`torch.Tensor` of shape `(3, 3)`): Inner products of W, L and the gradient of the mean winner error,
            in parameter space.
        scales (`dict[str, float]`): Lambda under each rule.
        spaces (`dict[str, float]`): Cosine of W and L, and lambda at mu 0.6, in both spaces.
        record (`dict`): What is kept.
    """

    def __init__(self, weights: Sequence[torch.Tensor], predictions: PairPredictions, forward: PairForward):
        policy = predictions.policy
        batch = predictions.batch
        leaf = policy.detach().requires_grad_()
        detached = PairPredictions(batch, leaf, predictions.reference)
        outputs = forward.loss(detached, safeguard="none")
        at_winner, at_loser = torch.autograd.grad(outputs.loss, leaf)[0].chunk(2)
        self.residuals = batch.residual(leaf.detach()).chunk(2)
        self.at_output = (at_winner, at_loser)
        anchor = winner_error_gradient(self.residuals[0])
        winner_policy, loser_policy = policy.chunk(2)

        def backward(objective: torch.Tensor) -> Gradient:
            return list(torch.autograd.grad(objective.sum(), weights, retain_graph=True, allow_unused=True))

        self.winner = backward(winner_policy * at_winner)
        self.loser = backward(-loser_policy * at_loser)
        self.products = inner_products([self.winner, self.loser, backward(winner_policy * anchor)])
        self.logits = outputs.pair_rewards[:, 0] - outputs.pair_rewards[:, 1]
        weighted = inner_products([[at_winner], [-at_loser], [anchor]])
        self.scales = {
            "none": 1.0,
            f"output, mu {OUTPUT_MU}": float(output_scale(*self.residuals, mu=OUTPUT_MU)),
            f"parameter, mu {PARAMETER_MU}": float(branch_scale(self.products, PARAMETER_MU)),
        }
        self.spaces = {
            "cosine_output": cosine(weighted),
            "cosine_parameter": cosine(self.products),
            # At the same mu, so that only the space differs.
            "lambda_output": self.scales[f"output, mu {OUTPUT_MU}"],
            "lambda_parameter": float(branch_scale(self.products, OUTPUT_MU)),
        }
        self.record = {
            **self.spaces,
            "cosine_plain": float(output_cosine(*self.residuals)),
            "lambda_weighted": float(branch_scale(weighted, OUTPUT_MU, anchor=2)),
            "lambda_parameter_own": self.scales[f"parameter, mu {PARAMETER_MU}"],
            # Shares of the winners' progress that are left, to first order in parameter space: of the mean error, and
            # of the error weighted as in the loss, which is what the parameter rule promises.
            "left": {rule: self.left(scale, anchor=2) for rule, scale in self.scales.items()},
            "left_weighted": {rule: self.left(scale, anchor=0) for rule, scale in self.scales.items()},
        }

    def left(self, scale: float, anchor: int) -> float:
        return 1 - scale * float(self.products[anchor, 1] / self.products[anchor, 0])


def compare(forward: PairForward, model: nn.Module, given: PairPredictions) -> Compared:
    """Predict a batch with the policy, in place of the field `policy` of `given`, and compare its gradients."""
    policy = forward.predict(model, given.batch)
    return Compared(trained(model), PairPredictions(given.batch, policy, given.reference), forward)


def lambdas_of_groups(parts: Sequence[Compared]) -> dict[str, Any]:
    """Return lambda of plain residuals and of the loss's weights for groups of pairs, at mu 0.6, and lambda in
    parameter space for groups that are a batch or all batches."""
    residuals = [torch.cat([part.residuals[side] for part in parts]) for side in (0, 1)]
    at_output = [torch.cat([part.at_output[side] for part in parts]) for side in (0, 1)]
    found: dict[str, Any] = {}
    for size in GROUPS:
        starts = range(0, len(residuals[0]) - size + 1, size)
        groups = [slice(start, start + size) for start in starts]
        found[str(size)] = [
            [
                float(output_scale(residuals[0][group], residuals[1][group], mu=OUTPUT_MU)),
                float(
                    output_scale(
                        residuals[0][group],
                        residuals[1][group],
                        mu=OUTPUT_MU,
                        granularity="weighted",
                        branch_gradients=(at_output[0][group], at_output[1][group]),
                    )
                ),
            ]
            for group in groups
        ]
    logits = torch.cat([part.logits for part in parts])
    whole = [mean_gradient([part.winner for part in parts]), mean_gradient([part.loser for part in parts])]
    parameter = {str(BATCH): [float(branch_scale(part.products, OUTPUT_MU)) for part in parts]}
    parameter[str(BATCH * len(parts))] = [float(branch_scale(inner_products(whole), OUTPUT_MU))]
    spread = {"logits": [float(logits.mean()), float(logits.std())]}
    return {"groups": found, "parameter_groups": parameter, **spread}


def run_arm(model: str, seed: int, arm: str, steps: int, every: int) -> dict[str, Any]:
    probe = Probe(every)
    with tempfile.TemporaryDirectory() as folder:
        settings = {**ARM_SETTINGS, **ARMS[arm], "max_steps": steps}
        make_trainer(model, seed, folder, probe, per_device_train_batch_size=BATCH, **settings).train()
    return {"probes": probe.probes}


# ---- Arithmetic on gradients ----------------------------------------------------------------------------------------


def branch_scale(products: torch.Tensor, mu: float, anchor: int = 0) -> torch.Tensor:
    """Return lambda from the inner products of W, L and the error's gradient. By default, `a` is W."""
    gain = products[anchor, 0]
    return torch.where(gain <= 0, 0.0, loser_scale(gain, products[anchor, 1], mu))


def cosine(products: torch.Tensor) -> float:
    return float(products[0, 1] / (products[0, 0] * products[1, 1]).sqrt())


def combined(winner: Gradient, loser: Gradient, scale: float) -> Gradient:
    """Return `W - lambda L`."""
    pairs = zip(winner, loser, strict=True)
    return [w if other is None else (-scale * other if w is None else w - scale * other) for w, other in pairs]


def mean_gradient(gradients: Sequence[Gradient]) -> Gradient:
    total = gradients[0]
    for gradient in gradients[1:]:
        total = combined(total, gradient, -1.0)
    return [None if part is None else part / len(gradients) for part in total]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


@torch.no_grad()
def restore(weights: Sequence[torch.Tensor], kept: Sequence[torch.Tensor]) -> None:
    for weight, value in zip(weights, kept, strict=True):
        weight.copy_(value)


# ---- Trainings that are kept ----------------------------------------------------------------------------------------


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the trainings to make, those of the first seed first."""
    found: list[dict[str, Any]] = []
    for seed in options.seeds:
        found += [{"part": "arms", "seed": seed, "rule": rule} for rule in ARMS]
        found += [
            {"part": "sgd", "seed": seed, "rule": rule, "rate": rate} for rate in options.rates for rule in SGD_RULES
        ]
    return [job for job in found if job["part"] in options.parts]


def make(options: argparse.Namespace) -> None:
    """Make the trainings that are missing, and write all that there are into the results. A training of another base
    model or of other versions is missing."""
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / f"{options.model}.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    made_with = Study({"model": options.model, "rows": {}}, options.folder).made_with
    done = [row for row in done if row["made_with"] == made_with]
    for job in jobs(options):
        settings = {**job, "steps": options.steps, "made_with": made_with}
        if any(settings.items() <= row.items() for row in done):
            continue
        if job["part"] == "arms":
            measured = run_arm(options.model, job["seed"], job["rule"], options.steps, options.every)
        else:
            measured = run_sgd(options.model, job["seed"], job["rule"], job["rate"], options.steps)
        row = rounded({**settings, "measured": measured})
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        done.append(row)
        print(json.dumps(job), flush=True)
    rows = ",\n".join(json.dumps(row) for row in done)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"assumptions_{options.model}.json").write_text(f"[{rows}]\n")


def rounded(value: Any) -> Any:
    """Return numbers with five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="unet")
    parser.add_argument("--parts", nargs="+", choices=("arms", "sgd"), default=["arms", "sgd"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 5e-5], help="of plain SGD")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps between two probes")
    parser.add_argument("--folder", type=Path, default=Path("bench_output/assumptions"), help="of finished trainings")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the committed results")
    make(parser.parse_args())


if __name__ == "__main__":
    main()

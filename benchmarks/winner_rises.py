"""How often a step raises the error of its own batch's winners, with each kind of safeguard.

The full UNet of the demo's embedded world is trained on off-policy pairs by plain SGD. After every step, the winners of
its batch are predicted again, with the same noise and timesteps, and their mean error is compared with that before the
step. All kinds of safeguard train on the same batches.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer
from trl_diffusion_sdpo.demo.pairs import off_policy_pairs
from trl_diffusion_sdpo.demo.pipeline import load_base_pipeline
from trl_diffusion_sdpo.demo.world import IMAGE_SIZE

KINDS: dict[str, dict[str, Any]] = {
    "Diffusion-DPO": {"safeguard": "none"},
    "output space, mu 0.1": {"safeguard": "output", "safeguard_mu": 0.1},
    "output space, mu 0.6": {"safeguard": "output", "safeguard_mu": 0.6},
    "parameter space, mu 0.1": {"safeguard": "parameter", "safeguard_mu": 0.1, "safeguard_anchor": "error"},
}
COLORS = {
    "Diffusion-DPO": "#c0392b",
    "output space, mu 0.1": "#e08e2b",
    "output space, mu 0.6": "#2471a3",
    "parameter space, mu 0.1": "#1e8449",
}
WINDOW = 10  # steps of the moving average


class WatchingTrainer(DiffusionSDPOTrainer):
    """Keeps the winners of the step's batch, and their error before the step."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.pair_forward.noisy_batch = self.watch(self.pair_forward.noisy_batch)

    def watch(self, noisy_batch):
        def watched(inputs, *levels):
            batch = noisy_batch(inputs, *levels)
            self.winners = batch.halves()[0]
            self.error_before = self.winner_error()
            return batch

        return watched

    @torch.no_grad()
    def winner_error(self) -> float:
        """Mean squared error of the kept winners, by the UNet itself; summed in float64."""
        winners = self.winners
        states = winners.conditioning["prompt_embeds"]
        predicted = self.denoiser(winners.noisy, winners.timesteps, encoder_hidden_states=states).sample
        return float((predicted.double() - winners.target.double()).square().mean())


class WatchCallback(TrainerCallback):
    """Notes the winners' error before and after each step.

    Args:
        bar (`tqdm`): Moves once a step.
    """

    def __init__(self, bar: tqdm):
        self.bar = bar
        self.trainer: WatchingTrainer | None = None
        self.before: list[float] = []
        self.changes: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.before.append(self.trainer.error_before)
        self.changes.append(self.trainer.winner_error() - self.trainer.error_before)
        self.bar.update()


def watch(kind: str, learning_rate: float, pairs: Dataset, options: argparse.Namespace, bar: tqdm) -> dict[str, Any]:
    """Train with one kind of safeguard, and measure every step."""
    callback = WatchCallback(bar)
    with tempfile.TemporaryDirectory() as folder:
        args = DiffusionSDPOConfig(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            beta=options.beta,
            learning_rate=learning_rate,
            optim="sgd",
            weight_decay=0.0,
            max_grad_norm=0.0,  # no clipping
            lr_scheduler_type="constant",
            random_flip=False,
            resolution=IMAGE_SIZE,
            seed=options.seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **KINDS[kind],
        )
        trainer = WatchingTrainer(load_base_pipeline(), None, args, pairs, callbacks=[callback])
        trainer.remove_callback(PrinterCallback)
        callback.trainer = trainer
        trainer.train()
    return summary(kind, learning_rate, callback, trainer.state.log_history)


def summary(
    kind: str, learning_rate: float, callback: "WatchCallback", history: list[dict[str, Any]]
) -> dict[str, Any]:
    """The rises and falls of a training, and its last tenth."""
    steps = [entry for entry in history if "errors/winner_change" in entry]
    rises = [change for change in callback.changes if change > 0]
    falls = [-change for change in callback.changes if change <= 0]
    last = steps[-max(1, len(steps) // 10) :]
    return {
        "kind": kind,
        "learning_rate": learning_rate,
        "steps": len(callback.changes),
        "rises": len(rises),
        "largest_rise": max(rises, default=0.0),
        "sum_of_rises": sum(rises),
        "sum_of_falls": sum(falls),
        "largest_change": max(callback.changes),
        "final_loss": statistics.mean(step["loss"] for step in last),
        "final_winner_change": statistics.mean(step["errors/winner_change"] for step in last),
        "final_loser_change": statistics.mean(step["errors/loser_change"] for step in last),
        "errors_before": callback.before,
        "changes": callback.changes,
        "winner_change": [step["errors/winner_change"] for step in steps],
        "scale": [step.get("safeguard/scale", 1.0) for step in steps],
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| learning rate | safeguard | steps that raise the winner's error | largest rise | all rises | all falls "
        "| loss at the end | winner, to reference | loser, to reference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in results:
        lines.append(
            f"| {found['learning_rate']:g} | {found['kind']} | {found['rises']} of {found['steps']} | "
            f"{found['largest_rise']:.1e} | {found['sum_of_rises']:.1e} | {found['sum_of_falls']:.1e} | "
            f"{found['final_loss']:.4f} | {found['final_winner_change']:+.5f} | {found['final_loser_change']:+.5f} |"
        )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """A row per learning rate: each step's change of its winners' error, and the winners' error over the steps."""
    matplotlib.use("Agg")
    rates = list(dict.fromkeys(found["learning_rate"] for found in results))
    figure, rows = plt.subplots(len(rates), 2, figsize=(11, 3.6 * len(rates)), squeeze=False, layout="constrained")
    for (left, right), rate in zip(rows, rates, strict=True):
        for found in (one for one in results if one["learning_rate"] == rate):
            style = {"color": COLORS[found["kind"]], "label": f"{found['kind']}: {found['rises']} rises"}
            width = 2 if found["kind"] == "Diffusion-DPO" else 1  # drawn first: wider, so that others do not hide it
            left.plot(range(1, found["steps"] + 1), found["changes"], ".", markersize=4 * width, **style)
            error = found["winner_change"]
            smooth = [statistics.mean(error[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(error))]
            right.plot(range(1, len(smooth) + 1), smooth, linewidth=1.5 * width, **style)
        for axes in (left, right):
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_xlabel("step")
        left.set_yscale("symlog", linthresh=1e-6)
        left.set_title(f"Change of the step's own winner error, learning rate {rate:g}")
        right.set_title(f"Winner error against the reference's, mean of {WINDOW} steps")
        right.legend(fontsize="small", loc="upper left")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--learning_rate", type=float, nargs="+", default=[5e-5, 1e-3])
    parser.add_argument("--beta", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--output", type=Path, default=Path("bench_output/winner_rises.json"), help="file for all numbers"
    )
    parser.add_argument("--plot", type=Path, default=Path("bench_output/winner_rises.png"), help="file for the plot")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    pairs = off_policy_pairs(seed=options.seed)
    results = []
    with tqdm(total=len(options.learning_rate) * len(KINDS) * options.steps, unit="step") as bar:
        for rate in options.learning_rate:
            for kind in KINDS:
                bar.set_description(f"{kind}, {rate:g}")
                results.append(watch(kind, rate, pairs, options, bar))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    report = {"settings": settings, "torch": torch.__version__, "results": results}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(results, options.plot)
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

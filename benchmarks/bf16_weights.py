"""Compare full tuning of bf16 weights, rounded at random or to the nearest value, with that of float32 weights.

All train the demo's small model on its pairs, with the published safeguard, under bf16 autocast. Both kinds of bf16
weights have AdamW states in 8 bits. Held-out pairs are evaluated before, during and after training.

    python benchmarks/bf16_weights.py          # three seeds, ten to twenty minutes of one CPU core; needs torchao
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer
from trl_diffusion_sdpo.tools.demo.comparison import SHARED
from trl_diffusion_sdpo.tools.demo.methods import PUBLISHED
from trl_diffusion_sdpo.tools.demo.pairs import eval_pairs, off_policy_pairs
from trl_diffusion_sdpo.tools.demo.pipeline import base_pipeline_folder

RESULTS = Path(__file__).parent / "results" / "bf16_weights.json"
ROUNDED = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16, stochastic": {**ROUNDED, "model_init_kwargs": {"dtype": "bfloat16"}},
    "bf16, nearest": {**ROUNDED, "model_init_kwargs": {"dtype": "bfloat16"}},
}
# Most weights are larger than 512 updates, so rounding to the nearest value loses them, as in published trainings.
RATE = 2e-5
MEASURES = ("eval_loss", "eval_errors/winner", "eval_errors/winner_change", "eval_errors/loser_change")


class Nearest(DiffusionSDPOTrainer):
    """Rounds to the nearest value, although the settings ask for stochastic rounding."""

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        optimizer, settings = DiffusionSDPOTrainer.get_optimizer_cls_and_kwargs(args, model)
        return optimizer, {**settings, "bf16_stochastic_round": False}


def measure(kind: str, seed: int, steps: int, folder: str) -> list[dict[str, float]]:
    """Train once, and return the measures of each evaluation."""
    settings = {**SHARED, **PUBLISHED, "per_device_train_batch_size": 8, "learning_rate": RATE, "beta": 1000.0}
    args = DiffusionSDPOConfig(
        folder,
        max_steps=steps,
        seed=seed,
        use_cpu=True,
        bf16=True,
        dataloader_num_workers=0,
        per_device_eval_batch_size=64,
        eval_strategy="steps",
        eval_steps=steps // 2,
        eval_on_start=True,
        logging_steps=steps // 10 or 1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{**settings, **KINDS[kind]},
    )
    trainer_class = Nearest if kind == "bf16, nearest" else DiffusionSDPOTrainer
    model = str(base_pipeline_folder())
    trainer = trainer_class(model, None, args, off_policy_pairs(seed), eval_pairs(seed))
    trainer.remove_callback(PrinterCallback)
    before = {name: weight.detach().float().clone() for name, weight in trainer.denoiser.named_parameters()}
    trainer.train()
    moved = sum(float((w.detach().float() != before[n]).sum()) for n, w in trainer.denoiser.named_parameters())
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    names = [name for name in evaluations[0] if name in MEASURES or name.endswith("rewards/accuracies")]
    found = [{"step": entry["step"], **{name: entry[name] for name in names}} for entry in evaluations]
    found[-1]["moved"] = moved / sum(weight.numel() for weight in before.values())
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for seed in range(options.seeds):
        for kind in list(KINDS)[: None if seed == 0 else 2]:  # one seed shows what rounding to the nearest value loses
            started = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                evaluations = measure(kind, seed, options.steps, folder)
            rows.append({"kind": kind, "seed": seed, "steps": options.steps, "evaluations": evaluations})
            print(kind, seed, evaluations[-1], f"{time.process_time() - started:.0f} s of CPU", flush=True)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

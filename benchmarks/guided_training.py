"""The trainings of `guided_front.py`: the weights of each run are kept in a folder, so that images can be generated
again."""

import copy
import json
import re
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from front import build_trainer, changes, held_out
from front_plan import Run
from front_trainers import TriedTrainer
from peft import PeftModel
from safetensors.torch import load_file, save_file

from trl_diffusion_sdpo.demo.pipeline import load_base_pipeline

Weights = dict[str, torch.Tensor]
RAW, EMA = "raw", "ema"
RUN_FILE = "run.json"  # written last: marks a finished run


def run_folder(root: Path, run: Run) -> Path:
    """The folder of a run's weights."""
    return root / re.sub(r"[^A-Za-z0-9.]+", "_", run.key)


def is_trained(root: Path, run: Run) -> bool:
    """Whether the weights of a run are there, trained with the same settings."""
    file = run_folder(root, run) / RUN_FILE
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["run"] == asdict(run)


def train(run: Run, root: Path) -> None:
    """Train, and keep the denoiser's weights, raw and averaged, with a LoRA merged into them."""
    started = time.monotonic()
    pipeline = load_base_pipeline()
    folder = run_folder(root, run)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as output:
        trainer = build_trainer(run, pipeline, output)
        trainer.train()
        save_file(merged(trainer.denoiser), folder / f"{RAW}.safetensors")
        with trainer.average.active(trainer.denoiser) as averaged:
            save_file(merged(averaged), folder / f"{EMA}.safetensors")
    facts = {"run": asdict(run), "seconds": round(time.monotonic() - started, 1)}
    (folder / RUN_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def merged(denoiser: Any) -> Weights:
    """The weights of a denoiser, its active LoRA merged into them. Going along the line from the reference to these is
    scaling the LoRA."""
    if isinstance(denoiser, PeftModel):
        denoiser = copy.deepcopy(denoiser).merge_and_unload()
    elif getattr(denoiser, "peft_config", None):  # a LoRA that diffusers put into the denoiser, as the trainer does
        denoiser = copy.deepcopy(denoiser)
        denoiser.fuse_lora()
        denoiser.unload_lora()
    # What the trainer averages is a wrapper around the denoiser.
    tensors = {name.removeprefix("denoiser."): tensor for name, tensor in denoiser.state_dict().items()}
    return {name: tensor.detach().float().contiguous().clone() for name, tensor in tensors.items()}


def weights_of(root: Path, run: Run, kind: str) -> Weights:
    """The weights of a trained run, `"raw"` or `"ema"`."""
    return load_file(run_folder(root, run) / f"{kind}.safetensors")


def scaled(base: Weights, tuned: Weights, scale: float) -> Weights:
    """Weights on the line from the base through the tuned model: 0 is the base, 1 the tuned model."""
    return {name: torch.lerp(base[name], tuned[name], scale) for name in base}


def errors(weights: Weights, part: str, seed: int, *, smallest: bool = False) -> dict[str, Any]:
    """Changes of the errors on a part's held-out pairs against the base model, as the trainer evaluates them."""
    pipeline, reference = load_base_pipeline(), load_base_pipeline()
    pipeline.unet.load_state_dict(weights)
    run = Run("DPO", 0.0, {"safeguard": "none", "ema_decay": None}, seed, push="smallest" if smallest else "stress")
    with tempfile.TemporaryDirectory() as folder:
        trainer: TriedTrainer = build_trainer(run, pipeline, folder, reference=reference)
        return changes(trainer.evaluate(held_out(seed, smallest=smallest)[part]), "eval")

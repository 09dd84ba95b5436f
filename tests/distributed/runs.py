"""The runs of run_worker.py as data, and the same runs in one process."""

from pathlib import Path

import datasets
from peft import LoraConfig

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


def build_run(engine: str, tuning: str, kind: str, args: dict, **given) -> dict:
    name = f"{engine}-{tuning}-{kind}"
    run = {
        "name": name,
        "output": f"{name}/saved",  # below the folder of all runs
        "engine": engine,
        "engine_settings": {},
        "tuning": tuning,
        "moved": False,  # whether the policy is not its reference before training
        "evaluated": 0,
        "every_step": False,
        "killed_after": None,
        "resumes": None,
        "pushes": False,
        "refused": False,
        "dora": False,
        "each_loads": False,  # whether each process reads the model, and none maps the other's memory
    }
    return {**run, **given, "args": args}


def with_places(run: dict, start: dict[str, str]) -> dict:
    """Add what the worker needs to build its trainer."""
    return {
        **run,
        "model": start["policy" if run["moved"] else "base"],
        "ref_model": start["base"] if run["moved"] else None,
        "peft": {**LORA, "use_dora": run["dora"]} if run["tuning"] == "lora" else None,
        "data": start["pairs"],
    }


def train_alone(run: dict, start: dict[str, str], folder: Path):
    """Train a run in this process, with the batches of two processes. Return the trainer."""
    from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer

    run = with_places(run, start)
    batches = ("per_device_train_batch_size", "per_device_eval_batch_size")
    settings = {**run["args"], **{name: 2 * run["args"][name] for name in batches}}
    fixed = {"logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    data = datasets.load_from_disk(run["data"])
    trainer = DiffusionSDPOTrainer(
        run["model"],
        run["ref_model"],
        DiffusionSDPOConfig(str(folder), **fixed, **settings),
        data,
        data.select(range(run["evaluated"])),
        peft_config=None if run["peft"] is None else LoraConfig(**run["peft"]),
    )
    trainer.train()
    trainer.save_model()
    return trainer

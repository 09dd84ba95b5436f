"""Train tiny pipelines of several families in one group of processes, as worker.py does, and write their logs."""

import json
import sys
from pathlib import Path

import datasets
from peft import LoraConfig
from worker import RecordingTrainer, check_engine, engine_args, take_turns

from trl_diffusion_sdpo import DiffusionSDPOConfig


def train(case: dict, folder: Path) -> None:
    engine = engine_args(case["engine"])
    if "fsdp_config" in engine:
        engine["fsdp_config"] = {"version": 2}  # the trainer wraps the blocks that the denoiser names
    args = DiffusionSDPOConfig(
        str(folder), logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, **engine, **case["args"]
    )
    lora = LoraConfig(r=2) if case["tuning"] == "lora" else None
    pairs = datasets.load_from_disk(case["data"])
    if case["edits"]:
        pairs = datasets.Dataset.from_list([{**row, "source": row["chosen"]} for row in pairs])
    trainer = RecordingTrainer(case["model"], None, args, pairs, peft_config=lora)
    trainer.train()
    check_engine(trainer, case["engine"])
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    sys.exit(take_turns(train))

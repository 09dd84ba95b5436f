"""Do the runs of a JSON file in turn, alone or in the processes of `torchrun`, and write their results."""

import gc
import json
import os
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path

import datasets
import torch
from accelerate.state import AcceleratorState
from gpu.cases import engine_args
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer
from trl_diffusion_sdpo.step import finite_check

RANK = int(os.environ.get("RANK", 0))
PROJECT = f"{Path(__file__).parents[2]}/"
WEIGHTS = ("pytorch_lora_weights.safetensors", "*/diffusion_pytorch_model.safetensors")


class CountWaits(TrainerCallback):
    """Counts CUDA's warnings of synchronizations from the end of one step to the end of the next; the first step is
    left out, as it allocates state."""

    def __init__(self):
        self.counts: list[Counter] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._show, warnings.showwarning = warnings.showwarning, self._note
        warnings.filterwarnings("always", message=".*synchronizing CUDA.*")
        if args.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(Counter())

    def on_train_end(self, args, state, control, **kwargs):
        warnings.showwarning = self._show
        if args.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")

    def _note(self, message, category, filename, lineno, file=None, line=None):
        if self.counts and "synchronizing CUDA" in str(message):
            stack = traceback.extract_stack()[:-1]
            frames = [frame for frame in stack if _is_traced(frame.filename) and not frame.name.startswith("<")]
            file = frames[-1].filename
            for folder in ("site-packages/", "dist-packages/", PROJECT):
                file = file.rpartition(folder)[2]
            self.counts[-1][f"{file}::{frames[-1].name}"] += 1

    def most(self) -> dict[str, int]:
        """The largest count of a step for every code location, without what follows the last step."""
        most: Counter = Counter()
        for counts in self.counts[:-1]:
            most |= counts
        return dict(most)


def _is_traced(file: str) -> bool:
    return "/torch/" not in file and file not in (__file__, warnings.__file__) and not file.startswith("<")


class HostEvent:
    """An event of the CPU, where all work is synchronous."""

    def __init__(self, device):
        pass

    def record(self):
        pass

    synchronize = record


def use_device_to_host_copies() -> None:
    """Read values through asynchronous copies on the CPU, as on a GPU."""
    finite_check.is_on_host = lambda values: False
    finite_check.pinned_like = lambda values: torch.empty(values.shape, dtype=values.dtype)
    finite_check.event_on = HostEvent


def build(run: dict, device: str, folder: Path, watch: CountWaits) -> DiffusionSDPOTrainer:
    args = DiffusionSDPOConfig(str(folder), use_cpu=device == "cpu", **engine_args(run["engine"]), **run["args"])
    quantization = None
    if run["tuning"] == "qlora":
        from diffusers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    return DiffusionSDPOTrainer(
        run["model"],
        None,
        args,
        datasets.load_from_disk(run["data"]),
        peft_config=None if run["tuning"] == "full" else LoraConfig(r=2),
        quantization_config=quantization,
        callbacks=[watch] if "waits" in run["extras"] else [],
    )


def do_run(run: dict, device: str, folder: Path) -> dict:
    watch = CountWaits()
    torch.manual_seed(0)  # for the initial weights of a LoRA
    trainer = build(run, device, folder, watch)
    trainer.train()
    trainer.save_model()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {
        "losses": [entry["loss"] for entry in log],
        "margin": log[0]["rewards/margins"],
        "steps": trainer.state.global_step,
        "device": trainer.accelerator.device.type,
        "engine": f"{type(trainer.model_wrapped).__module__}.{type(trainer.model_wrapped).__name__}",
        "engine_kind": trainer.accelerator.distributed_type.value,
        "waits": watch.most(),
        "samples": len(list((folder / "samples").glob("*.png"))),
    }
    if "push" in run["extras"]:
        trainer.push_to_hub()
    if "resume" in run["extras"]:
        found["resume_difference"] = resumed_difference(run, device, folder)
    return found


def resumed_difference(run: dict, device: str, folder: Path) -> float:
    """Largest difference between the weights of an uninterrupted run and of one resumed at step 2."""
    uninterrupted = saved_weights(folder)
    reset_engine()
    trainer = build(run, device, folder, CountWaits())
    trainer.args.overwrite_output_dir = True
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    trainer.save_model()
    again = saved_weights(folder)
    return max(float((uninterrupted[name] - again[name]).abs().max()) for name in uninterrupted)


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    files = [file for pattern in WEIGHTS for file in folder.glob(pattern) if not file.parent.name.startswith("check")]
    return {name: value.float() for file in files for name, value in load_file(file).items()}


def reset_engine() -> None:
    """Resets the engine that accelerate and transformers store in the environment and in global state."""
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        os.environ.pop(name, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    gc.collect()


def main(file: str, device: str, answers: str, scratch: str) -> int:
    """Ends at the first failure, as other processes may wait in a collective; new processes do the remaining runs."""
    if device == "cpu":
        use_device_to_host_copies()
    for run in json.loads(Path(file).read_text()):
        answer = Path(answers) / f"{run['name']}.json"
        try:
            found = do_run(run, device, Path(scratch) / run["name"])
        except Exception:
            (Path(answers) / f"{run['name']}.{RANK}.error").write_text(traceback.format_exc()[-6000:])
            return 1
        if RANK == 0:
            answer.with_suffix(".part").write_text(json.dumps(found))
            answer.with_suffix(".part").rename(answer)
        reset_engine()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

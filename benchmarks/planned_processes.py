"""Planned against measured peak memory of a step on each of two processes, for `planned_memory.py`.

The processes are those of torch's launcher with gloo, on the CPU. Measured are the bytes that live in a process before
its third step, and the allocations within it: those of the profiler, which runs from before the trainer is made, and
storages of tensors that Python holds, such as weights that were read by memory map. Buffers of gloo and of DeepSpeed's
communication are not PyTorch's, and not measured.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from random_pipeline import random_pairs
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from trl import get_peft_config

from trl_diffusion_sdpo import DiffusionSDPOTrainer
from trl_diffusion_sdpo.cli import train
from trl_diffusion_sdpo.cli.plan import PlannedSettings
from trl_diffusion_sdpo.planning.plan import Planner

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
STEP = "the measured step"
WRAPPED = "BasicTransformerBlock,ResnetBlock2D"
FSDP = {"fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_transformer_layer_cls_to_wrap": WRAPPED}
BUCKET = 5_000_000  # elements, of DeepSpeed; its default is more than all else here


class TwoCPUsTrainer(DiffusionSDPOTrainer):
    """Several CPUs count as MULTI_CPU, for which accelerate has no FSDP."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is None:
            return
        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True


class StepMeter(TrainerCallback):
    """Marks a step in the profile; notes the storages that live before it."""

    def __init__(self, step: int):
        self.step, self.before, self._mark = step, {}, torch.profiler.record_function(STEP)
        self._others = living_storages()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.before = {a: size for a, size in living_storages().items() if a not in self._others}
            self._mark.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self._mark.__exit__(None, None, None)


def living_storages() -> dict[int, int]:
    """Bytes of the storages of all tensors that Python holds, by address. A `DTensor` has its local one's."""
    gc.collect()
    storages = {}
    for held in gc.get_objects():
        if issubclass(type(held), torch.Tensor) and not isinstance(held, (FakeTensor, DTensor)) and not held.is_meta:
            storage = held.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return storages


def peak_within(trace: dict, before: dict[int, int]) -> int:
    """The highest number of bytes in the marked step, given the storages that live before it."""
    events = trace["traceEvents"]
    begin, end = next((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == STEP and "dur" in e)
    changes = sorted((e for e in events if e.get("name") == "[memory]" and e["ts"] <= end), key=lambda e: e["ts"])
    living: dict[int, int] = {}
    for event in (e["args"] for e in changes if e["ts"] < begin):
        if event["Bytes"] > 0:
            living[event["Addr"]] = event["Bytes"]
        else:
            living.pop(event["Addr"], None)
    living |= before
    allocated = peak = sum(living.values())
    for event in (e["args"] for e in changes if e["ts"] >= begin):
        # What lived at the address was freed, also where a thread of gloo did it, which the profiler does not see.
        allocated -= living.pop(event["Addr"], 0)
        if event["Bytes"] > 0:
            living[event["Addr"]] = event["Bytes"]
            allocated += event["Bytes"]
        peak = max(peak, allocated)
    return peak


def engine_words(engine: str, folder: Path) -> tuple[list[str], list[str]]:
    """Words of a plan, and of training."""
    if engine == "ddp":
        return ["--accelerate_config", "multi_gpu", "--mixed_precision", "no"], []
    file = folder / f"{engine}.json"
    if engine == "fsdp2":
        plan = folder / "fsdp2.yaml"
        plan.write_text(yaml.safe_dump({"distributed_type": "FSDP", "fsdp_config": FSDP, "num_processes": 2}))
        wrapped = {"version": 2, "transformer_layer_cls_to_wrap": WRAPPED.split(",")}
        file.write_text(json.dumps(wrapped))
        return ["--accelerate_config", str(plan)], ["--fsdp", "full_shard auto_wrap", "--fsdp_config", str(file)]
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": int(engine[-1]), "reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 500}
    settings = {**dict.fromkeys(auto, "auto"), "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    file.write_text(json.dumps(settings))
    return ["--deepspeed", str(file)], ["--deepspeed", str(file)]


def compare_processes(engine: str, words: list[str], folder: Path) -> tuple[int, int]:
    """Planned and measured peak of a process, the larger of two, of a pipeline that is in the words."""
    planned_words, training_words = engine_words(engine, folder)
    settings = PlannedSettings([*words, *planned_words, "--num_processes", "2"], "plan", "cpu", None)
    planned = settings.plan(Planner("cpu"), {}).peak
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(folder)]
    subprocess.run([sys.executable, *launch, *words, *training_words], env=environment, check=True)
    return planned, max(json.loads((folder / f"peak{rank}.json").read_text()) for rank in (0, 1))


def measure(folder: Path, words: list[str]) -> None:
    """Train in this process of two, and write its peak."""
    _, training, model = train.parse([*words, "--use_cpu", "true"])
    meter = StepMeter(training.max_steps)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with profiler:
        trainer = TwoCPUsTrainer(
            training_model(words),
            None,
            training,
            random_pairs(16, training.resolution),
            peft_config=get_peft_config(model),
            callbacks=[meter],
        )
        trainer.train()
    with tempfile.TemporaryDirectory() as place:
        profiler.export_chrome_trace(f"{place}/trace.json")
        peak = peak_within(json.loads(Path(place, "trace.json").read_text()), meter.before)
    (folder / f"peak{training.process_index}.json").write_text(json.dumps(peak))


def training_model(words: list[str]) -> str:
    return words[words.index("--model_name_or_path") + 1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    options, rest = parser.parse_known_args()
    measure(options.folder, rest)

"""Trains the cases of a JSON file, as worker.py, and writes the bytes of the tensors that each process holds after a
step: of the policy, the reference, the optimizer, and what an engine adds."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from worker import build_trainer, check_engine, take_turns


def held(tensor: torch.Tensor) -> int:
    """Bytes of a tensor in this process."""
    if isinstance(tensor, DTensor):
        return tensor.to_local().nbytes
    return vars(tensor)["ds_tensor"].nbytes if "ds_tensor" in vars(tensor) else tensor.nbytes


def measure(case: dict, folder: Path) -> None:
    torch.manual_seed(0)
    trainer = build_trainer(case, folder)
    trainer.train()
    check_engine(trainer, case["engine"])
    for model in trainer.reference.engine_models:
        trainer.engine.reshard(model)
    second = trainer.reference.second
    found = {
        "policy": of_module(trainer.denoiser),
        "reference": 0 if second is None else of_module(second.module),
    }
    optimizer = trainer.optimizer
    if case["engine"].startswith("zero"):
        zero = trainer.model_wrapped.optimizer
        optimizer = zero.optimizer
        name = {"zero3": "fp32_partitioned_groups_flat"}.get(case["engine"], "single_partition_of_fp32_groups")
        found["float32 weights"] = sum(part.nbytes for part in vars(zero)[name])
        if case["engine"] == "zero3":
            found["gradients"] = zero.grad_partitions_flat_buffer.nbytes
            found["DeepSpeed's bucket"] = sum(bucket.buffer.nbytes for bucket in zero.ipg_buckets.values())
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    found["optimizer"] = sum(held(value) for value in states)
    (folder / f"bytes{dist.get_rank()}.json").write_text(json.dumps(found))


def of_module(module: torch.nn.Module) -> int:
    return sum(held(tensor) for tensor in (*module.parameters(), *module.buffers()))


if __name__ == "__main__":
    sys.exit(take_turns(measure))

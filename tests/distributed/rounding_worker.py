"""Check in two processes of `torchrun` that DeepSpeed's bf16 neither rounds a given model nor loses a reference's
small moves. The first process writes the results as JSON."""

import copy
import json
import sys
from datetime import timedelta
from pathlib import Path

import datasets
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from diffusers import StableDiffusionPipeline
from worker import engine_args

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer


def message(act) -> str:
    """Return the message of the `ValueError` that a user would see."""
    try:
        act()
    except ValueError as error:
        return str(error)
    return "no error"


def small_moves(trainer: DiffusionSDPOTrainer) -> float:
    """The largest distance between a reference that has moved by 1% of the way 50 times, and the same by hand."""
    name = "conv_out.bias"
    policy = dict(trainer.denoiser.named_parameters())
    target = safe_get_full_fp32_param(policy[name]).clone()
    by_hand = trainer.reference.float32_shards.full(name).clone()
    for _ in range(50):
        trainer.reference.update(0.01)
        by_hand.lerp_(target, 0.01)
    return (trainer.reference.float32_shards.full(name) - by_hand).abs().max().item()


def uneven_shards(trainer: DiffusionSDPOTrainer) -> bool:
    """Whether weights that do not divide by two come back whole, as given and as replaced."""
    weights = {"odd": torch.arange(7.0).view(7, 1), "one": torch.tensor([3.0])}
    shards = trainer.engine.float32_shards(weights)
    kept = all(torch.equal(shards.full(name), weight) for name, weight in weights.items())
    shards.set("odd", 2 * weights["odd"])
    return kept and torch.equal(shards.full("odd"), 2 * weights["odd"])


def main() -> None:
    base, policy, pairs, folder = sys.argv[1:]
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)
    reference = StableDiffusionPipeline.from_pretrained(base).unet
    before = copy.deepcopy(reference.state_dict())
    args = DiffusionSDPOConfig(
        folder,
        max_steps=2,
        per_device_train_batch_size=2,
        beta=500.0,
        bf16=True,
        sync_ref_model=True,
        ref_model_sync_steps=100,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **engine_args("zero2"),
    )
    data = datasets.load_from_disk(pairs)
    trainer = DiffusionSDPOTrainer(policy, reference, args, data, data)
    found = {"early": message(trainer.evaluate)}
    trainer.train()
    found["again"] = message(trainer.train)
    found["given"] = all(torch.equal(before[name], value) for name, value in reference.state_dict().items())
    found["small_moves"] = small_moves(trainer)
    found["uneven_shards"] = uneven_shards(trainer)
    if dist.get_rank() == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

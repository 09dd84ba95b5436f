"""Two processes over gloo walk the trajectory of one: the draws belong to the pairs, the mean is over all of them."""

import io
import json
import os
import subprocess
import sys
import textwrap

import datasets
import pytest

SCRIPT = textwrap.dedent(
    """
    import json, os, sys
    import datasets
    import torch.distributed as dist
    from peft import LoraConfig
    from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer

    def train(model, data, output, tuning):
        world = int(os.environ.get("WORLD_SIZE", "1"))
        args = DiffusionSDPOConfig(
            output, max_steps=4, per_device_train_batch_size=8 // world, optim="sgd", learning_rate=1e-5, beta=100.0,
            safeguard="output", safeguard_kwargs={"granularity": "pair"}, logging_steps=1, save_strategy="no",
            report_to="none", use_cpu=True, disable_tqdm=True, max_grad_norm=0.0, random_crop=True, verify_images="all",
        )
        pairs = datasets.load_from_disk(data)
        if tuning == "lora":  # as a stream of one shard, of which each process decodes its part
            pairs = pairs.to_iterable_dataset(num_shards=1)
        peft_config = LoraConfig(r=4) if tuning == "lora" else None
        trainer = DiffusionSDPOTrainer(model, None, args, pairs, peft_config=peft_config)
        trainer.train()
        trainer.save_model()
        if trainer.is_world_process_zero():
            with open(os.path.join(output, "log.json"), "w") as file:
                json.dump(trainer.state.log_history, file)

    model, folder, name = sys.argv[1:]
    for tuning in ("full", "lora"):
        train(model, os.path.join(folder, tuning), os.path.join(folder, name, tuning), tuning)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    """
)


def spoiled(index, image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()[: 40 if index == 5 else None]


@pytest.fixture(scope="module")
def walks(sd_folder, make_pairs, tmp_path_factory):
    """The logs of both trainings, and the printed text, by the number of processes."""
    folder, walks = tmp_path_factory.mktemp("walks"), {}
    good = make_pairs(33)
    bad = [{**row, "chosen": spoiled(index, row["chosen"])} for index, row in enumerate(good)]
    datasets.Dataset.from_list(bad).save_to_disk(str(folder / "full"))
    good.select(range(32)).save_to_disk(str(folder / "lora"))
    script = folder / "train.py"
    script.write_text(SCRIPT)
    for world, launch in ((1, []), (2, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"])):
        command = [sys.executable, *launch, str(script), sd_folder, str(folder), f"run{world}"]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        logs = {}
        for tuning in ("full", "lora"):
            history = json.loads((folder / f"run{world}" / tuning / "log.json").read_text())
            logs[tuning] = [entry for entry in history if "loss" in entry]
        walks[world] = logs, done.stderr
    return walks


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_two_processes_of_four_pairs_walk_like_one_of_eight(walks, tuning):
    """All weights from a table that holds a bad image, which the processes find together; a LoRA from a stream."""
    logs = {world: logs[tuning] for world, (logs, _) in walks.items()}
    assert all("32 pairs, 0 ties, 1 undecodable" in printed for _, printed in walks.values())
    for name in ("loss", "errors/winner", "errors/loser", "safeguard/scale"):
        one, two = ([entry[name] for entry in logs[world]] for world in (1, 2))
        assert len(one) == 4 and two == pytest.approx(one, rel=1e-5), name
    if tuning == "full":  # a LoRA's first steps from zero are lost in the rounding of the error
        one, two = (logs[world][-1]["errors/winner_change"] for world in (1, 2))
        assert two == pytest.approx(one, rel=1e-2)

"""After kills, with two processes and on a full disk, a cache is the one of an undisturbed run. Every family's
batches are those without a cache."""

import multiprocessing
import os
import random
import re
import socket
import subprocess
import time

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from tiny_pipelines import CASES, case

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer
from trl_diffusion_sdpo.cache import encoding
from trl_diffusion_sdpo.models.frozen_components import FrozenComponents
from trl_diffusion_sdpo.utils.disk import DiskFullError

pytestmark = pytest.mark.matrix
FORK = multiprocessing.get_context("fork")
KILLS = 10
LONG = "a very large red circle to the left of a small blue square, seen from far above in the evening light"


FAULTS = {"loading": (FrozenComponents, "_read"), "encoding": (encoding, "moments_of")}


def out_of_memory(*args):
    raise torch.OutOfMemoryError("of this process alone")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """24 shards of images and 4 of prompts, each slow enough to be interrupted."""
    monkeypatch.setattr(encoding, "SHARD_PIXELS", 2 * 16 * 16)
    monkeypatch.setattr(encoding, "SHARD_PROMPTS", 4)


@pytest.fixture
def start(sd_folder, make_pairs, tmp_path):
    """`start(cache, rank=None, began=None, calls=1, fault=None, **settings)`: a process that encodes 12 pairs. It sets
    the event `began` at a call of the VAE. It is one of two if it has a rank, and `fault` is a key of `FAULTS`."""
    make_pairs(12).save_to_disk(str(tmp_path / "pairs"))
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]

    def run(cache, rank, began, calls, fault, settings):
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        if rank is not None:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if began is not None:
            moments_of, left = encoding.moments_of, [calls]

            def slow(*args):
                left[0] -= 1
                if left[0] <= 0:
                    began.set()
                    time.sleep(0.03)
                return moments_of(*args)

            encoding.moments_of = slow
        if fault is not None:
            setattr(*FAULTS[fault], out_of_memory)
        args = DiffusionSDPOConfig(
            str(tmp_path / f"run-{rank}"),
            use_cpu=True,
            report_to="none",
            precompute_dir=str(cache),
            **{"precompute_latents": True, **settings},
        )
        trainer = DiffusionSDPOTrainer(sd_folder, None, args, datasets.load_from_disk(str(tmp_path / "pairs")))
        trainer.precompute_reference_errors()  # if `precompute_ref_errors` is set
        whole = trainer.weight_files._whole_pipeline()
        assert all(weight.numel() for part in (whole.vae, whole.text_encoder) for weight in part.parameters())

    def started(cache, rank=None, began=None, calls=1, fault=None, **settings):
        process = FORK.Process(target=run, args=(cache, rank, began, calls, fault, settings))
        process.start()
        return process

    return started


def finish(*processes):
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def files(cache):
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def finished(cache):
    """Return the modification times of the finished shards."""
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}


def shards(cache):
    """Return the contents of all shards and keys."""
    return {name: data for name, data in files(cache).items() if name.endswith((".safetensors", "key.json"))}


def test_ten_kills_at_random_points_leave_the_cache_of_an_undisturbed_run(start, tmp_path):
    finish(start(tmp_path / "undisturbed"))
    cache, draws, seen = tmp_path / "cache", random.Random(5), []
    cache.mkdir()
    for kill in range(KILLS):
        began = FORK.Event()
        process = start(cache, began=began, calls=draws.randint(1, 5))
        if kill % 4:
            began.wait(60)
        time.sleep(draws.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -9, "had ended before it was killed: there is too little to encode"
        seen.append(finished(cache))
    assert 0 < len(seen[-1]) < 28 and len({len(part) for part in seen}) > 3, [len(part) for part in seen]
    finish(start(cache))
    last = finished(cache)
    assert all(last[path] == written for part in seen for path, written in part.items())  # none was written twice
    assert shards(cache) == shards(tmp_path / "undisturbed")


def test_two_processes_write_the_cache_of_one(start, tmp_path):
    finish(start(tmp_path / "one"))
    finish(*(start(tmp_path / "two", rank) for rank in range(2)))
    assert shards(tmp_path / "two") == shards(tmp_path / "one")
    damaged = sorted((tmp_path / "two").rglob("000003.safetensors"))[0]
    damaged.write_bytes(b"of another file")
    finish(*(start(tmp_path / "two", rank) for rank in range(2)))
    assert shards(tmp_path / "two") == shards(tmp_path / "one")


def test_under_zero_3_encoders_are_whole_and_the_cache_is_that_of_one_process(start, tmp_path):
    """With ZeRO-3, transformers makes sharded models, which cannot encode in one process."""
    finish(start(tmp_path / "one"))
    stage = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 3}}
    finish(*(start(tmp_path / "two", rank, deepspeed=stage) for rank in range(2)))
    assert shards(tmp_path / "two") == shards(tmp_path / "one")


def test_two_runs_at_once_share_the_work_of_one(start, tmp_path):
    finish(start(tmp_path / "one"))
    began = FORK.Event()
    first = start(tmp_path / "both", began=began)
    began.wait(60)
    finish(first, start(tmp_path / "both"))
    assert shards(tmp_path / "both") == shards(tmp_path / "one")


@pytest.mark.parametrize("fault", FAULTS)
def test_where_one_process_fails_the_other_does_not_wait_for_it(start, tmp_path, fault, capfd):
    processes = [start(tmp_path / "cache", rank, fault=[None, fault][rank]) for rank in range(2)]
    for process in processes:
        process.join(60)
    ended = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert ended == [1, 1]
    said = capfd.readouterr().err
    assert re.search("RuntimeError: Process 1 .*failed.*OutOfMemoryError: of this process alone", said), said[-3000:]


@pytest.mark.parametrize("stored", ["precompute_latents", "precompute_ref_errors"])
def test_disks_of_each_machines_own_are_refused_in_both_processes(start, tmp_path, stored, capfd):
    """Also at the second start, when each disk has what the first start left."""
    for _ in range(2):
        settings = {"precompute_latents": False, stored: True}
        processes = [start(tmp_path / f"disk {rank}", rank, **settings) for rank in range(2)]
        for process in processes:
            process.join(60)
        ended = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        said = capfd.readouterr().err
        assert ended == [1, 1], said[-3000:]
        for rank in range(2):
            assert re.search(f"UserError: .*{tmp_path}/disk {rank}/.*`precompute_dir`", said), said[-3000:]


@pytest.fixture
def small_disk(tmp_path):
    """A folder with a file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named_and_what_was_finished_stays(make_trainer, make_pairs, small_disk, tmp_path):
    given = {"train": make_pairs(12), "precompute_latents": True}
    make_trainer(**given, precompute_dir=str(tmp_path / "undisturbed"))
    full = rf"The disk of {small_disk} .*`precompute_dir`"
    with pytest.raises(DiskFullError, match=full):
        make_trainer(**given, precompute_dir=str(small_disk))
    before = finished(small_disk)
    assert before
    subprocess.run(["mount", "-o", "remount,size=2000k", str(small_disk)], check=True)
    make_trainer(**given, precompute_dir=str(small_disk))
    after = finished(small_disk)
    assert all(after[path] == written for path, written in before.items()) and len(after) > len(before)
    assert shards(small_disk) == shards(tmp_path / "undisturbed")


@pytest.mark.parametrize("name", CASES)
def test_every_family_has_the_batches_of_a_run_without_a_cache(
    name, family_folder, make_trainer, make_pairs, tmp_path
):
    """The prompts have several lengths, and one is empty."""
    prompts = ["red circle", LONG, "", "cat"]
    pairs = make_pairs(8).map(lambda row, index: {"prompt": prompts[index % 4]}, with_indices=True)
    alone = name == "cogview4"  # which attends to padding
    size = 1 if alone else 4
    given = {"model": family_folder(name), "train": pairs, "resolution": case(name).RESOLUTION}
    given |= {"per_device_train_batch_size": size, "per_device_eval_batch_size": size, "max_steps": 2 * 8 // size}
    cached = {**given, "precompute_latents": True, "precompute_dir": str(tmp_path)}
    if alone:
        with pytest.raises(ValueError, match="`precompute_latents=True`.*got 2"):
            make_trainer(**{**cached, "per_device_eval_batch_size": 2})
    trainers = [make_trainer(**given), make_trainer(**cached), make_trainer(**cached)]
    assert trainers[2].encoding.report.encoded_images == 0
    rounds = name in ("ideogram4", "krea2", "qwen_image", "qwen_image_21")  # whose prompts are encoded alone
    for epoch in range(2):
        for start in range(0, 8, size):
            batches = [encoded(trainer, epoch, range(start, start + size)) for trainer in trainers]
            for other in batches[1:]:
                assert batches[0].keys() == other.keys()
                for key, value in batches[0].items():
                    assert value.dtype == other[key].dtype and value.shape == other[key].shape
                    assert value.device == other[key].device
                    near = rounds and key == "prompt_embeds"
                    assert torch.allclose(value, other[key], atol=1e-5) if near else torch.equal(value, other[key]), (
                        key
                    )


def encoded(trainer, epoch, rows):
    trainer.train_dataset.set_epoch(epoch)
    inputs = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in rows]))
    with torch.no_grad():
        latents, conditioning = trainer.pair_forward.encode(inputs)
    return {"latents": latents, **conditioning}

"""Measure how much host memory two processes together need to load and shard a model under ZeRO-3 and FSDP2.

Each run has two new processes on the CPU, and lasts from the construction of a trainer to its first step. The model is
a UNet in bfloat16 files, asked for in float32, beside a tiny VAE and text encoder. Memory is what both processes have
for themselves (`Pss_Anon`) and what they share (the machine's `Shmem`), above the level after all imports; mapped files
do not count. What a run with narrow layers needs is subtracted: engines and data loaders take it for themselves. The
shards are in host memory too, where a GPU would have them: about the level at the first step. With `--before`, each run
is repeated with another version of the package.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROCESSES = 2
RUNS = [(engine, tuning) for tuning in ("lora", "full") for engine in ("zero3", "fsdp2")]
CLASSES = ["BasicTransformerBlock", "ResnetBlock2D"]
WIDTHS = {"small": (32, 64), "large": (256, 512)}  # the large one takes 0.78 GB in float32


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.measure:
        start(Path(options.measure), options.engine, options.tuning)
        return
    versions = {"before": options.before} if options.before else {}
    versions["after"] = Path(__file__).parents[1]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {size: build(folder / size, WIDTHS[size]) for size in ("small", "small" if options.quick else "large")}
        for engine, tuning in RUNS:
            row: dict[str, Any] = {"engine": engine, "tuning": tuning, "model": max(sizes.values())}
            for version, package in versions.items():
                row[version] = {size: run(folder / size, engine, tuning, package.resolve()) for size in sizes}
            print(json.dumps(row), flush=True)
            rows.append(row)
    print(table(rows))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="a clone with another version of the package")
    parser.add_argument("--quick", action="store_true", help="a small model, to test the script")
    parser.add_argument("--output", type=Path, default=Path("bench_output/weights_once.json"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # folder of a run, in its two processes
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--tuning", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def build(folder: Path, widths: tuple[int, ...]) -> int:
    """Save a pipeline in bfloat16. Return the bytes of its UNet in float32."""
    import torch
    from random_pipeline import UNETS, build_pipeline

    UNETS["tiny"] |= {"block_out_channels": widths, "transformer_layers_per_block": 8}
    pipeline = build_pipeline("tiny", 8)
    size = 4 * sum(weight.numel() for weight in pipeline.unet.parameters())
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    return size


def run(model: Path, engine: str, tuning: str, package: Path) -> dict[str, float]:
    """Start two processes, and watch their memory. Return its peak and its level at the first step in bytes, and the
    CPU seconds of both together."""
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as name, open(f"{name}/output.txt", "w") as output:
        place = Path(name)
        (place / "model").symlink_to(model)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES), __file__]
        words = ["--measure", name, "--engine", engine, "--tuning", tuning]
        process = subprocess.Popen([sys.executable, *launch, *words], env=environment, stdout=output, stderr=output)
        while not (pids := read_all(place, "begun")):
            wait(process, place)
        level = memory(pids)
        (place / "go").touch()
        levels = [0]
        while not (seconds := read_all(place, "ready")):
            wait(process, place)
            levels.append(memory(pids) - level)
        levels.append(memory(pids) - level)
        (place / "end").touch()
        process.wait()
    return {"peak": max(levels), "first_step": levels[-1], "seconds": sum(seconds)}


def wait(process: subprocess.Popen, place: Path) -> None:
    time.sleep(0.01)
    if process.poll() is not None:
        raise RuntimeError((place / "output.txt").read_text()[-3000:])


def read_all(place: Path, name: str) -> list[float]:
    """Return the numbers that the processes wrote into files of this name, or nothing if one is missing."""
    files = [place / f"{name}{rank}" for rank in range(PROCESSES)]
    return [float(file.read_text()) for file in files] if all(file.is_file() for file in files) else []


def memory(pids: list[float]) -> int:
    """Return the bytes that processes have in memory for themselves and shared, without mapped files."""
    files = [(f"/proc/{pid:.0f}/smaps_rollup", "Pss_Anon:") for pid in pids] + [("/proc/meminfo", "Shmem:")]
    found = 0
    for file, name in files:
        line = next(line for line in Path(file).read_text().splitlines() if line.startswith(name))
        found += 1024 * int(line.split()[1])
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| Engine | Tuning | Version | Peak | At the first step | CPU seconds |", "|---|---|---|---|---|---|"]
    for row in rows:
        for version in ("before", "after"):
            if version in row:
                found = row[version]
                seconds = found.get("large", found["small"])["seconds"]
                words = [row["engine"], row["tuning"], version, models(row, version, "peak")]
                lines.append(f"| {' | '.join([*words, models(row, version, 'first_step'), f'{seconds:.1f}'])} |")
    return "\n".join(lines)


def models(row: dict[str, Any], version: str, of: str) -> str:
    """Return a level above that with the small model, in sizes of the large one."""
    found = row[version]
    return f"{(found.get('large', found['small'])[of] - found['small'][of]) / row['model']:.2f}"


# ---- In the processes -----------------------------------------------------------------------------------------------


def start(place: Path, engine: str, tuning: str) -> None:
    """Build a trainer and train until its first step."""
    # What engines import late, and memory that was freed, must not count.
    import deepspeed  # noqa: F401
    import torch
    import torch._inductor.compile_fx  # noqa: F401
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType
    from peft import LoraConfig
    from random_pipeline import random_pairs
    from transformers import TrainerCallback

    from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer

    class ShardingTrainer(DiffusionSDPOTrainer):
        """Makes accelerate's FSDP2 path available on CPUs."""

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            if engine == "fsdp2":
                self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
                self.accelerator.state.distributed_type = DistributedType.FSDP
                PartialState._shared_state["distributed_type"] = DistributedType.FSDP
                self.is_fsdp_enabled = True

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            write(place / f"ready{rank}", time.process_time() - begun)
            until(place / "end")
            os._exit(0)

    rank = os.environ["RANK"]
    settings: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": CLASSES}}
    if engine == "zero3":
        automatic = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
        settings = {"deepspeed": {**dict.fromkeys(automatic, "auto"), "zero_optimization": {"stage": 3}}}
    data = random_pairs(8, 64)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    write(place / f"begun{rank}", os.getpid())
    until(place / "go")
    begun = time.process_time()
    args = DiffusionSDPOConfig(
        str(place / "run"),
        max_steps=1,
        per_device_train_batch_size=1,
        resolution=8,
        optim="adamw_torch",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        **settings,
    )
    lora = LoraConfig(r=4) if tuning == "lora" else None
    ShardingTrainer(str(place / "model"), None, args, data, peft_config=lora, callbacks=[Stop()]).train()


def write(file: Path, value: float) -> None:
    file.with_suffix(".part").write_text(str(value))
    file.with_suffix(".part").rename(file)


def until(file: Path) -> None:
    while not file.exists():
        time.sleep(0.01)


if __name__ == "__main__":
    main()

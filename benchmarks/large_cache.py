"""Measure whether training reads a cache of ten million pairs: memory, memory maps and open files of each process, CPU
time to open it, and pairs per second.

The cache is a stub with as many files as that of 1024 px images, 64 images to a file, whose latents have one number.
Rows have embedded images of one byte, which are never decoded. The trainer's own classes read them: `prepare_dataset`,
`ShardStore`, `EncodedPairs`, `BatchLoaders`. Each number of pairs has two new processes: the first makes the index of
the pairs and the table of the cache's rows, and the second, which starts as later runs do, reads with 8 forked workers
and then with 2 spawned ones. Private memory is what no other process shares and no file holds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets.arrow_writer import ArrowWriter
from safetensors.torch import save
from torch.utils.data import RandomSampler
from tqdm.auto import tqdm

WORKERS = {"fork": 8, "spawn": 2}
IMAGES = 64  # images to a file, as at 1024 px
CHUNK = 100_000  # rows per write
SIDE = 1024
BATCH = 8
MAPS = 65_530  # Linux's default limit of memory maps for each process
LINES = {
    "private": ("Private_Dirty:",),
    "read": ("Private_Clean:",),  # pages of files that no other process has read; the system drops them at need
    "shared": ("Shared_Clean:", "Shared_Dirty:"),
}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.measure:
        print(json.dumps(measure(Path(options.measure), options.pairs[0], options)))
        return
    measured = []
    for pairs in options.pairs:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write_rows(Path(folder) / "pairs.arrow", pairs, options.prompts)
            write_cache(Path(folder), pairs, options.prompts)
            words = ["--pairs", pairs, "--prompts", options.prompts, "--batches", options.batches]
            command = [sys.executable, __file__, "--measure", folder, *map(str, words)]
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "HF_DATASETS_CACHE": f"{folder}/datasets",
                "XDG_CACHE_HOME": folder,
            }
            starts = [
                json.loads(subprocess.check_output([*command, *more], env=environment, text=True).splitlines()[-1])
                for more in (["--batches", "0"], [])
            ]
            measured.append({**starts[1], "first_seconds": starts[0]["seconds"]})
            # Before the folder is deleted, which takes long.
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(table(measured))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", type=int, default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--prompts", type=int, default=1_000_000, help="largest number of distinct prompts")
    parser.add_argument("--batches", type=int, default=500, help=f"batches of {BATCH} random pairs to read")
    parser.add_argument("--quick", action="store_true", help="the smallest form, in seconds")
    parser.add_argument("--folder", type=Path, help="where the cache is written (12 GB); a temporary folder if unset")
    parser.add_argument("--output", type=Path, default=Path("bench_output/large_cache.json"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # folder that the child process reads
    options = parser.parse_args(arguments)
    if options.quick:
        options.pairs, options.prompts, options.batches = [1000], 100, 20
    return options


# ---- Rows and cache -------------------------------------------------------------------------------------------------


def caption(number: Any) -> str:
    return f"an image of the subject with number {number}"


def write_rows(file: Path, pairs: int, prompts: int) -> None:
    """Write rows like those of Pick-a-Pic. Row r has prompt r modulo the number of prompts."""
    with ArrowWriter(path=str(file)) as writer:
        for start in tqdm(range(0, pairs, CHUNK), desc=f"Writing {pairs} rows"):
            rows = range(start, min(start + CHUNK, pairs))
            size = len(rows)
            columns = {
                "caption": [caption(row % prompts) for row in rows],
                "jpg_0": [b"0"] * size,
                "jpg_1": [b"1"] * size,
                "label_0": np.ones(size),
                "label_1": np.zeros(size),
                "has_label": np.ones(size, dtype=bool),
            }
            writer.write_table(pa.table(columns))
        writer.finalize()


def stores(folder: Path, pairs: int, prompts: int) -> tuple[Any, Any]:
    from trl_diffusion_sdpo.cache.shards import ShardStore

    images = ShardStore(folder / "cache" / "latents", {"images": 2 * pairs}, 2 * pairs)
    return images, ShardStore(
        folder / "cache" / "prompts", {"prompts": prompts}, min(pairs, prompts) + 1
    )  # and the empty one


def write_cache(folder: Path, pairs: int, prompts: int) -> None:
    """Write the shards of all images and prompts. The number of a row is in its tensor."""
    images, texts = stores(folder, pairs, prompts)
    sizes = torch.tensor([[SIDE, SIDE], [0, 0], [SIDE, SIDE]], dtype=torch.int32)
    for store, name, others in ((images, "moments", {"sizes": sizes}), (texts, "prompt_embeds", {})):
        store.path.mkdir(parents=True)
        write_shards(store, name, others)


def write_shards(store: Any, name: str, others: dict[str, torch.Tensor]) -> None:
    """Write what `ShardStore.write` writes, without waiting for the disk after each of hundreds of thousands of files.

    A file of the package is the template: only the numbers of the rows are replaced, which all have nine digits.
    """
    base = 100_000_000
    rows = {f"{base + row}.{name}": torch.zeros(1, 1, 1, dtype=torch.float64) for row in range(IMAGES)}
    rows |= {f"{base + row}.{other}": value.clone() for row in range(IMAGES) for other, value in others.items()}
    whole = save(rows, {"key": store.path.name})
    length = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:length])
    entries = {row: {key: header[f"{base + row}.{key}"] for key in (name, *others)} for row in range(IMAGES)}
    texts = {row: [(f".{key}", json.dumps(entry)) for key, entry in of.items()] for row, of in entries.items()}
    places = [entries[row][name]["data_offsets"][0] for row in range(IMAGES)]
    start = json.dumps({"__metadata__": header["__metadata__"]})[:-1]
    for number in tqdm(range(-(-len(store) // IMAGES)), desc=f"Writing shards of {name}"):
        # The last shard is as full as the others. Its surplus rows are not part of the store.
        first, content = number * IMAGES, bytearray(whole[length:])
        for row, place in enumerate(places):
            content[place : place + 8] = np.float64(first + row).tobytes()
        listed = [f'"{first + row}{key}": {entry}' for row in range(IMAGES) for key, entry in texts[row]]
        text = ", ".join([start, *listed]).encode() + b"}"
        text += b" " * (-len(text) % 8)
        (store.path / f"{number:06d}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)


# ---- Reading --------------------------------------------------------------------------------------------------------


def measure(folder: Path, pairs: int, options: argparse.Namespace) -> dict[str, Any]:
    """Open the pairs and the cache, read random batches with workers, and return what each process needs."""
    import datasets
    from accelerate import Accelerator

    from trl_diffusion_sdpo import DiffusionSDPOConfig
    from trl_diffusion_sdpo.cache.encoded_pairs import EncodedPairs, rows_and_digests
    from trl_diffusion_sdpo.data import PairOptions, PairTransform, PreferenceCollator, prepare_dataset
    from trl_diffusion_sdpo.data.batch_loaders import BatchLoaders

    seconds, found = {}, {"at the start": process("self")}
    begin = time.process_time()
    table = datasets.Dataset.from_file(str(folder / "pairs.arrow"))
    transform = PairTransform(SIDE, center_crop=True, random_flip=False)
    dataset = prepare_dataset(table, PairOptions(transform, verify_images="none"))
    seconds["pairs"] = time.process_time() - begin
    found["pairs indexed"] = process("self")
    begin = time.process_time()
    images, prompts = stores(folder, pairs, options.prompts)
    missing = len(images.missing()) + len(prompts.missing())
    assert missing == 0, f"the stub lacks {missing} rows"
    rows, digests = rows_and_digests(dataset, 1, dataset.fingerprint(thorough=True))
    dataset.use_encoded(EncodedPairs(images, rows, prompts, digests))
    seconds["cache"] = time.process_time() - begin
    found["cache opened"] = process("self")
    rates = {}
    for start, workers in WORKERS.items() if options.batches else ():
        args = DiffusionSDPOConfig(
            str(folder / "run"),
            use_cpu=True,
            report_to="none",
            dataloader_num_workers=workers,
            dataloader_multiprocessing_context=start,
        )
        loaders = BatchLoaders(args, Accelerator(cpu=True))
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(0))
        batches = iter(loaders.training(dataset, BATCH, sampler, PreferenceCollator()))
        next(batches)
        begin = time.perf_counter()
        for _ in range(options.batches):
            batch = next(batches)
            expected = rows.images[batch["rows"].numpy()].T.ravel()
            assert batch["moments"].flatten().tolist() == expected.tolist(), "a row of another image was read"
        rates[start] = BATCH * options.batches / (time.perf_counter() - begin)
        found[f"training process ({start})"] = process("self")
        readers = [child for child in children() if "resource_tracker" not in command_of(child)]
        found |= {f"worker {number} ({start})": process(reader) for number, reader in enumerate(readers)}
        del batches
    files = sum(1 for _ in images.path.iterdir()) + sum(1 for _ in prompts.path.iterdir())
    facts = {"pairs": pairs, "shard_files": files, "seconds": seconds, "pairs_per_second": rates}
    return {**facts, "processes": found}


def process(number: str) -> dict[str, float]:
    """Return a process's memory (MiB) by kind, its memory maps and its open files."""
    place = Path("/proc") / number
    lines = [line.split() for line in (place / "smaps_rollup").read_text().splitlines()[1:]]
    kilobytes = {line[0]: int(line[1]) for line in lines}
    memory = {name: sum(kilobytes[line] for line in wanted) / 1024 for name, wanted in LINES.items()}
    maps = len((place / "maps").read_text().splitlines())
    return {**memory, "maps": maps, "files": len(os.listdir(place / "fd"))}


def children() -> list[str]:
    return sorted(
        {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}
    )


def command_of(pid: str) -> str:
    return (Path("/proc") / pid / "cmdline").read_text()


def table(measured: list[dict[str, Any]]) -> str:
    lines = [
        "| pairs | shard files | process | private | files it alone read | shared | maps | open files |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in measured:
        for name, found in run["processes"].items():
            facts = [run["pairs"], run["shard_files"], name, f"{found['private']:.0f} MiB"]
            facts += [f"{found['read']:.0f} MiB", f"{found['shared']:.0f} MiB", found["maps"], found["files"]]
            lines.append(f"| {' | '.join(map(str, facts))} |")
        rates = ", ".join(f"{rate:.0f} ({start})" for start, rate in run["pairs_per_second"].items())
        opened = "Opened in " + " and later ".join(
            f"{seconds['pairs']:.1f} s (pairs), {seconds['cache']:.1f} s (cache)"
            for seconds in (run["first_seconds"], run["seconds"])
        )
        lines.append(f"\n{opened}, then {rates} pairs a second.\n")
    most = max(found["maps"] for run in measured for found in run["processes"].values())
    return "\n".join([*lines, f"\nA process has at most {most} memory maps. Linux allows {MAPS}."])


if __name__ == "__main__":
    main()

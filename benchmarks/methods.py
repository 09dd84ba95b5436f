"""All losses and sources of noise on the embedded world, under one protocol: equal steps, pairs and seeds.

Every method trains the demo's model with the public trainer, with and without the safeguard of the recipe for keeping
winners. Measured are the oracle's score of generated images, their diversity and their Frechet distance from the
world's drawings, all without classifier-free guidance and at the best of some scales, which is chosen on one half of
the prompts and reported on the other; the change of the winners' errors on held-out pairs; and, by the command `cost`,
what a step costs.

Runs are rows of a JSON-lines file. A second call makes the missing ones, and `--shard` shares them between processes.

    python benchmarks/methods.py run
    python benchmarks/methods.py run --shard 1/2       # and, beside it, --shard 2/2
    python benchmarks/methods.py cost
    python benchmarks/methods.py report
"""

import argparse
import functools
import logging
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers.utils import logging as diffusers_logging
from diffusers.utils.torch_utils import randn_tensor
from front import changes, held_out, parts_of_prompts
from front_report import rows_of
from guided_front import append, meter_of, rounded
from methods_plan import (
    ALL_NAMES,
    BASE,
    IMAGE_SEEDS,
    MAIN,
    NO_SAFEGUARD,
    OWN_NOISE,
    SEEDS,
    SHARED,
    SMALLEST,
    Protocol,
    Run,
    planned,
)
from methods_report import PAGE, PICTURE, RESULTS, report
from tqdm.auto import tqdm
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging
from turns import InTurns, RecordingTrainer

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer
from trl_diffusion_sdpo.demo.image_measures import DRAWINGS_PER_PROMPT
from trl_diffusion_sdpo.demo.oracle import oracle_score
from trl_diffusion_sdpo.demo.pairs import off_policy_pairs
from trl_diffusion_sdpo.demo.pipeline import LATENT_SHAPE, generate_images, load_base_pipeline

COST_WARMUP = 2  # rounds


# ---- One run -------------------------------------------------------------------------------------------------------


def make(run: Run, protocol: Protocol, folder: Path) -> dict[str, Any]:
    """Train, and measure images and errors; encoded pairs are in `folder`, for all runs of a process."""
    pipeline, seconds, found = load_base_pipeline(), 0.0, {}
    if run.method != BASE:
        logged = {"logging_strategy": "steps", "logging_steps": -(-protocol.steps // 10)} if run.has_own_noise else {}
        trainer = build_trainer(run, protocol, folder, pipeline, **logged)
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
        found = {OWN_NOISE: at_own_noise(trainer.state.log_history)} if run.has_own_noise else {}
    facts = {"key": run.key, **asdict(run), "settings": run.settings(), "how": protocol.facts()}
    measured = {**images_of(pipeline, run.seed, protocol), "errors": errors_of(pipeline, run.seed, protocol, folder)}
    return rounded({**facts, **measured, **found, "seconds": seconds})


def at_own_noise(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """The winners' error in the last tenth of a training, at the noise of the policy's inversion, and its change
    against the base model at the same noise."""
    last = [entry for entry in history if "errors/winner" in entry][-1]
    return {"winner": last["errors/winner"], "winner_change": last["errors/winner_change"]}


def build_trainer(
    run: Run,
    protocol: Protocol,
    folder: Path,
    pipeline: Any,
    *,
    kind: type[DiffusionSDPOTrainer] = DiffusionSDPOTrainer,
    **settings: Any,
) -> Any:
    args = arguments(protocol, folder, run.seed, **run.settings(), **settings)
    trainer = kind(pipeline, None, args, training_pairs(run.seed, protocol.is_smallest))
    trainer.remove_callback(PrinterCallback)
    return trainer


def arguments(protocol: Protocol, folder: Path, seed: int, **settings: Any) -> DiffusionSDPOConfig:
    return DiffusionSDPOConfig(
        **{
            "output_dir": str(folder / "output"),
            "seed": seed,
            "max_steps": protocol.steps,
            "per_device_train_batch_size": protocol.pairs,
            "per_device_eval_batch_size": 64,
            "precompute_latents": True,
            "latent_cache_dir": str(folder / "encoded"),
            "use_cpu": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "verify_images": "none",
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": False,
            **SHARED,
            **settings,
        }
    )


@functools.cache
def training_pairs(seed: int, is_smallest: bool) -> Dataset:
    """With the oracle's scores of both images, which some methods read."""
    return off_policy_pairs(seed, per_prompt=1) if is_smallest else off_policy_pairs(seed)


@functools.cache
def final_pairs(seed: int, is_smallest: bool) -> Dataset:
    """Held-out pairs of the final half of the prompts."""
    return held_out(seed, smallest=is_smallest)["final"]


def errors_of(pipeline: Any, seed: int, protocol: Protocol, folder: Path) -> dict[str, Any]:
    """Changes of the errors on held-out pairs against the base model, with shared noise for every method."""
    pairs = final_pairs(seed, protocol.is_smallest)
    args = arguments(protocol, folder, seed, safeguard="none")
    trainer = DiffusionSDPOTrainer(pipeline, load_base_pipeline(), args, pairs, pairs)
    trainer.remove_callback(PrinterCallback)
    return changes(trainer.evaluate(), "eval")


def images_of(pipeline: Any, seed: int, protocol: Protocol) -> dict[str, Any]:
    """Measurements of images without classifier-free guidance and at the best scale, and the scores of the choice."""
    chosen_from = {scale: scored(pipeline, "selection", seed, scale, protocol)["score"] for scale in protocol.scales}
    best = max(chosen_from, key=chosen_from.__getitem__)
    found = {scale: scored(pipeline, "final", seed, scale, protocol) for scale in {1.0, best}}
    return {
        "plain": found[1.0],
        "best": {"scale": best, **found[best]},
        "chosen_from": [list(item) for item in chosen_from.items()],
    }


def scored(pipeline: Any, part: str, seed: int, scale: float, protocol: Protocol) -> dict[str, float]:
    """The oracle's score of images of a part at a scale of guidance; of the final part, everything about them."""
    prompts, latents = noise(part, seed, protocol)
    with torch.no_grad():
        images = generate_images(pipeline, prompts, latents, guidance_scale=scale)
    score = {"score": float(oracle_score(images, prompts).mean())}
    if part == "selection":
        return score
    meter = meter_of(tuple(prompts), 4 if protocol.is_smallest else DRAWINGS_PER_PROMPT)
    return score | asdict(meter(images))


def noise(part: str, seed: int, protocol: Protocol) -> tuple[list[str], torch.Tensor]:
    """Prompts and latents of a part, the same for every method of a seed."""
    shown = parts_of_prompts()[part][: 2 if protocol.is_smallest else None]
    prompts = [prompt for prompt in shown for _ in range(getattr(protocol, part))]
    generator = torch.Generator().manual_seed(IMAGE_SEEDS[part] + seed)
    return prompts, randn_tensor((len(prompts), *LATENT_SHAPE), generator)


# ---- All runs ------------------------------------------------------------------------------------------------------


def make_all(runs: Sequence[Run], protocol: Protocol, file: Path) -> None:
    """Make the runs that the file lacks, and append each row when it is finished."""
    failed, is_made = [], functools.partial(made, protocol=protocol, file=file)
    missing = sum(not is_made(run) for run in runs)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=missing, unit="run") as bar:
        for run in runs:
            if is_made(run):  # read anew: other processes append to the file
                continue
            bar.set_description(run.key)
            try:
                row = make(run, protocol, Path(folder))
            except Exception as error:  # the others continue
                failed.append(run.key)
                tqdm.write(f"{run.key} failed: {type(error).__name__}: {error}")
            else:
                append(file, row)
                best, winner = row["best"], row["errors"]["winner"]
                tqdm.write(f"{run.key}: {best['score']:.3f} at {best['scale']:g}, winner {winner:+.4f}")
            bar.update()
    if failed:
        raise SystemExit(f"{len(failed)} of {missing} runs failed and have no row: {', '.join(failed)}.")


def made(run: Run, protocol: Protocol, file: Path) -> bool:
    return run.is_made(rows_of(file).get(run.key), protocol)


def measure_cost(runs: Sequence[Run], protocol: Protocol, rounds: int, file: Path) -> None:
    """Append the CPU time of a step of each method relative to that of Diffusion-DPO. In a round each trainer takes one
    step, in a new order, all in one process on one thread: other programs change the ratios little."""
    plain = Run(MAIN, NO_SAFEGUARD, runs[0].seed)
    there = rows_of(file)
    missing = [run for run in runs if run.method != BASE and cost_key(run) not in there and run != plain]
    steps = COST_WARMUP + rounds
    protocol = replace(protocol, steps=steps)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=(1 + len(missing)) * (1 + steps), unit="step") as bar:
        contestants: dict[Run, InTurns] = {}
        for run in (plain, *missing):
            bar.set_description(run.key)
            output = str(Path(folder) / f"output-{len(contestants)}")  # all of them are at work together
            settings = {"kind": RecordingTrainer, "warmup_steps": 0, "output_dir": output}
            trainer = build_trainer(run, protocol, Path(folder), load_base_pipeline(), **settings)
            contestants[run] = InTurns(trainer.take_turns, "cpu", 1)
            bar.update()
        shuffled = random.Random(0)
        for _ in range(steps):
            for run in shuffled.sample(list(contestants), len(contestants)):
                contestants[run].advance()
                bar.update()
    seconds = {run: contestant.steps[COST_WARMUP:] for run, contestant in contestants.items()}
    for run in (plain, *missing):
        ratios = [mine / other for mine, other in zip(seconds[run], seconds[plain], strict=True)]
        row = {"key": cost_key(run), "method": run.method, "safeguard": run.safeguard, "ratios": ratios}
        append(file, rounded({**row, "milliseconds": 1000 * statistics.median(seconds[run])}))


def cost_key(run: Run) -> str:
    return f"cost|{run.method}|{run.safeguard}"


# ---- Command line --------------------------------------------------------------------------------------------------


def shard_of(words: str) -> tuple[int, int]:
    """`"1/2"`, the first of two."""
    number, _, count = words.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(
            f"must be a number of a process and how many there are, as 1/2; got {words!r}"
        )
    return int(number), int(count)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "cost", "report"])
    parser.add_argument("--only", nargs="+", choices=ALL_NAMES, default=ALL_NAMES, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, help="of a training (default: 150); give other steps another file")
    parser.add_argument("--shard", type=shard_of, default=(1, 1), help="a process's share of the plan, such as 1/2")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each method for the command `cost`")
    parser.add_argument("--file", type=Path, default=RESULTS, help="file of the rows")
    parser.add_argument("--page", type=Path, default=PAGE, help="page whose tables the report writes")
    parser.add_argument("--plot", type=Path, default=PICTURE, help="file of the report's plot")
    parser.add_argument("--smallest", action="store_true", help="numbers mean nothing, in a file of their own")
    options = parser.parse_args(arguments)
    if options.smallest and options.file == RESULTS:
        parser.error("--smallest needs --file: its rows are no results")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)
    protocol = SMALLEST if options.smallest else Protocol()
    protocol = replace(protocol, steps=options.steps or protocol.steps)
    runs = planned(options.only, options.seeds)
    number, count = options.shard
    with quiet():
        if options.command == "run":
            make_all(runs[number - 1 :: count], protocol, options.file)
        elif options.command == "cost":
            measure_cost(planned(options.only, options.seeds[:1]), protocol, options.rounds, options.file)
        else:
            report(options.file, options.page, options.plot)
    return 0


@contextmanager
def quiet() -> Iterator[None]:
    """Without what every run would say of its settings, and the progress bars of model loading."""
    logger, shown = logging.getLogger("trl_diffusion_sdpo"), []
    level = logger.level
    logger.setLevel(logging.ERROR)
    for library in (transformers_logging, diffusers_logging):
        if library.is_progress_bar_enabled():
            shown.append(library)
            library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        for library in shown:
            library.enable_progress_bar()


if __name__ == "__main__":
    raise SystemExit(main())

"""Hours and peak memory of every command on the page "Your card", without the Hub.

Hours are arithmetic: the FLOPs of the command's pairs (`pair_flops.py`) at 25 TFLOP/s. Peaks are planned from folders
with the configurations of published sizes, which take the place of the models.

    python benchmarks/plan_cards.py --hours                   # hours only, with the page's table: seconds
    python benchmarks/plan_cards.py                           # hours and peaks, about ten minutes of CPU time
    python benchmarks/plan_cards.py --only "24 GB" --add="--safeguard output"
"""

import argparse
import json
import logging
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from published_sizes import PIPELINES, PublishedPipeline

from trl_diffusion_sdpo.cli.plan import planned_settings

FLOPS = Path(__file__).parent / "results" / "pair_flops.json"
SPEED = 25e12  # FLOPs a second, about the most that published trainings reach on an A100 or H100
PAGE = Path(__file__).parents[1] / "docs" / "your_card.md"
COMMAND = re.compile(r"^\*\*([^*\n]+)\*\*.*\n\n```bash\ntrl-diffusion-sdpo train ([^`]*)```", re.MULTILINE)
FOLDERS = {  # Hub id -> key of `PIPELINES`
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd35-medium",
    "black-forest-labs/FLUX.1-dev": "flux-dev",
}
WORKLOADS = {  # column of the page's table -> steps and pairs a step
    "1,000 pairs": (200, 16),
    "10,000 pairs": (2000, 16),
    "100,000 pairs": (2000, 64),
}
SHOWN = {  # row of the page's table -> title of a command
    "SD1.5, LoRA": "SD1.5, LoRA, 12 GB",
    "SD1.5, all weights": "SD1.5, all weights, 24 GB",
    "SDXL, LoRA": "SDXL, LoRA, 16 GB",
    "SDXL, LoRA without activation checkpointing": "SDXL, LoRA, 24 GB",
    "SDXL, all weights": "SDXL, all weights, 48 GB",
    "SD 3.5 Medium, LoRA": "SD 3.5 Medium, LoRA, 24 GB",
    "SD 3.5 Medium, all weights": "SD 3.5 Medium, all weights, 48 GB",
    "FLUX.1 dev, LoRA, 512 pixels": "FLUX.1 dev, QLoRA, 4 bits, 512 pixels, 12 GB",
    "FLUX.1 dev, LoRA": "FLUX.1 dev, QLoRA, 4 bits, 24 GB",
}


def words_of(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", " "))


def value(words: list[str], option: str) -> str:
    return words[words.index(f"--{option}") + 1]


def pair_flops(words: list[str], counted: dict[str, dict[str, int]]) -> int:
    """Return the FLOPs of a training pair: two images, each predicted by policy and reference and, for the policy, a
    backward pass."""
    key = FOLDERS[value(words, "model_name_or_path")]
    if "--resolution" in words:
        key += f"-{value(words, 'resolution')}"
    flops = counted[key]
    predictions = 2 if "--use_peft" in words else 3  # a forward pass, and a backward pass that counts as one or two
    predictions += "--activation_checkpointing" in words
    predictions += "--precompute_ref_errors" not in words
    encoded = 0 if "--precompute_latents" in words else 2 * flops["vae"] + flops["text"]
    return 2 * predictions * flops["denoiser"] + encoded


def hours(words: list[str], counted: dict[str, dict[str, int]], steps: int = 0, pairs: int = 0) -> float:
    """Return the hours of a command of `train`, or of the same with other steps of `pairs` pairs."""
    steps = steps or int(value(words, "max_steps"))
    sizes = value(words, "per_device_train_batch_size"), value(words, "gradient_accumulation_steps")
    pairs = pairs or int(sizes[0]) * int(sizes[1])
    return steps * pairs * pair_flops(words, counted) / SPEED / 3600


def in_words(time: float) -> str:
    """Return hours as a reader thinks of them.

    Example:
        ```python
        >>> [in_words(time) for time in (0.17, 1.94, 21.2, 53.0)]
        ['10 min', '1.9 h', '21 h', '2.2 days']
        ```
    """
    if time < 1:
        return f"{60 * time:.0f} min"
    if time < 10:
        return f"{time:.1f} h"
    if time < 48:
        return f"{time:.0f} h"
    return f"{time / 24:.1f} days" if time < 240 else f"{time / 24:.0f} days"


def table_of_hours(commands: dict[str, str], counted: dict[str, dict[str, int]]) -> str:
    """Return the page's table of hours by the number of pairs. All weights need more pairs than the first column's."""
    lines = [f"| Training | {' | '.join(WORKLOADS)} |", f"|---{len(WORKLOADS) * '|---'}|"]
    for label, title in SHOWN.items():
        words = words_of(commands[title])
        times = [in_words(hours(words, counted, *workload)) for workload in WORKLOADS.values()]
        if "--use_peft" not in words:
            times[0] = ""
        lines.append(f"| {label} | {' | '.join(times)} |".replace("|  |", "| |"))
    return "\n".join(lines)


def write_configurations(pipeline: PublishedPipeline, folder: Path) -> None:
    """Write the JSON files of a pipeline that a plan reads. No weights are made."""
    index: dict[str, Any] = {"_class_name": pipeline.pipeline_class}
    for part, (name, settings) in pipeline.components.items():
        where = folder / part
        where.mkdir(parents=True)
        if hasattr(diffusers, name):
            index[part] = ["diffusers", name]
            with torch.device("meta" if "Scheduler" not in name else "cpu"):
                getattr(diffusers, name)(**settings).save_config(where)
            continue
        index[part] = ["transformers", name]
        config = getattr(transformers, name).config_class(**settings, architectures=[name])
        config.save_pretrained(where)
        tokenizer = part.replace("text_encoder", "tokenizer")
        is_t5 = name.startswith("T5")
        index[tokenizer] = ["transformers", "T5TokenizerFast" if is_t5 else "CLIPTokenizer"]
        (folder / tokenizer).mkdir()
        length = {"model_max_length": 512 if is_t5 else 77}
        (folder / tokenizer / "tokenizer_config.json").write_text(json.dumps(length), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def planned(words: list[str], folder: Path) -> str:
    """Return the peak of a command of `train`, in GB and with its phase."""
    words = list(words)
    model = words.index("--model_name_or_path") + 1
    words[model] = str(folder / FOLDERS[words[model]])
    words[words.index("--output_dir") + 1] = str(folder / "out")
    plan = planned_settings(words, "plan", "cuda").plan()
    return f"{plan.peak / 1e9:.1f} GB at {plan.peak_phase}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression for the commands' titles")
    parser.add_argument("--add", default="", help="options to add to each command, in one string")
    parser.add_argument("--hours", action="store_true", help="print hours only, and the page's table of hours")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # the trainer would repeat its warnings for each plan
    counted = json.loads(FLOPS.read_text(encoding="utf-8"))
    commands = dict(COMMAND.findall(PAGE.read_text(encoding="utf-8")))
    done: dict[str, str] = {}  # command without its title -> plan; some cards share a command
    with tempfile.TemporaryDirectory() as temporary:
        for name, pipeline in PIPELINES.items():
            if not options.hours:
                write_configurations(pipeline, Path(temporary) / name)
        for title, command in commands.items():
            if not re.search(options.only, title):
                continue
            words = words_of(command) + shlex.split(options.add)
            if command not in done:
                peak = "" if options.hours else f", {planned(words, Path(temporary))}"
                done[command] = in_words(hours(words, counted)) + peak
            print(f"{title}: {done[command]}", flush=True)
    if options.hours:
        print(f"\n{table_of_hours(commands, counted)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Plan the peak memory of every command on the page "Your card", without the Hub: folders with the configurations of
published sizes take the place of the models.

    python benchmarks/plan_cards.py                           # all commands, about ten minutes of CPU time
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

PAGE = Path(__file__).parents[1] / "docs" / "your_card.md"
COMMAND = re.compile(r"\*\*([^*\n]+)\*\*\n\n```bash\ntrl-diffusion-sdpo train (.*?)```", re.DOTALL)
FOLDERS = {  # Hub id -> key of `PIPELINES`
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd35-medium",
    "black-forest-labs/FLUX.1-dev": "flux-dev",
}


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
    model = words.index("--model_name_or_path") + 1
    words[model] = str(folder / FOLDERS[words[model]])
    words[words.index("--output_dir") + 1] = str(folder / "out")
    plan = planned_settings(words, "plan", "cuda").plan()
    return f"{plan.peak / 1e9:.1f} GB at {plan.peak_phase}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression for the commands' titles")
    parser.add_argument("--add", default="", help="options to add to each command, in one string")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # the trainer would repeat its warnings for each plan
    done: dict[str, str] = {}  # command without its title -> plan; some cards share a command
    with tempfile.TemporaryDirectory() as temporary:
        for name, pipeline in PIPELINES.items():
            write_configurations(pipeline, Path(temporary) / name)
        for title, command in COMMAND.findall(PAGE.read_text(encoding="utf-8")):
            if not re.search(options.only, title):
                continue
            if command not in done:
                words = shlex.split(command.replace("\\\n", " ")) + shlex.split(options.add)
                done[command] = planned(words, Path(temporary))
            print(f"{title}: {done[command]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

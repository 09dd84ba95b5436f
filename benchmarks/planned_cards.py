"""Which settings fit on which card: plans set-ups of the published sizes, from the fastest to the smallest.

python benchmarks/planned_cards.py writes `benchmarks/results/planned.json`, from which the page on performance is made.
All numbers are computed by the planner; nothing is loaded. What the file has already is not planned again.
"""

import argparse
import json
import logging
from pathlib import Path

from tqdm.auto import tqdm

from trl_diffusion_sdpo.cli.plan import PlannedSettings
from trl_diffusion_sdpo.planning.plan import Planner

FILE = Path(__file__).parent / "results" / "planned.json"
MODELS = ("sd15", "sdxl", "sd35-medium", "flux-dev")
COMMON = "--output_dir planned --per_device_train_batch_size 1 --bf16 true"
CACHES = "--precompute_latents true --precompute_ref_errors true"
CHECKPOINTING = "--gradient_checkpointing true"
TUNINGS = {
    "all weights": "--learning_rate 1e-6",
    "LoRA": "--use_peft --lora_r 16 --dtype bfloat16",
    "QLoRA": "--use_peft --lora_r 16 --dtype bfloat16 --load_in_4bit true",
}
# By speed; the words of each are also shown on the page. Without caches, a step is slower and needs no less.
SETUPS = {
    "caches": CACHES,
    "caches, checkpointing": f"{CACHES} {CHECKPOINTING}",
    "caches, checkpointing, 8-bit AdamW": f"{CACHES} {CHECKPOINTING} --optim adamw_bnb_8bit",
}


Peaks = dict[str, dict[str, dict[str, float]]]


def plan_all(found: Peaks) -> Peaks:
    """Peaks in GB by model, tuning and set-up, each written at once; those that `found` has are not planned again."""
    logging.disable(logging.WARNING)
    planner = Planner("cuda")
    cases = [
        (model, tuning, setup)
        for model in MODELS
        for tuning in TUNINGS
        for setup in SETUPS
        if "8-bit" not in setup or tuning == "all weights"  # a LoRA's states are small
    ]
    for model, tuning, setup in (bar := tqdm(cases, unit="plan", disable=None)):
        bar.set_description(f"{model}, {tuning}, {setup}")
        peaks = found.setdefault(model, {}).setdefault(tuning, {})
        if setup not in peaks:
            words = f"--model_name_or_path published/{model} {COMMON} {TUNINGS[tuning]} {SETUPS[setup]}".split()
            plan = PlannedSettings(words, "planned_cards.py", "cuda", model).plan(planner, {})
            peaks[setup] = plan.peak / 1e9
            FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            tqdm.write(f"{model}, {tuning}, {setup}: {peaks[setup]:.1f} GB at {plan.peak_moment}")
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="plan what the file has already, too")
    again = parser.parse_args(arguments).again
    plan_all({} if again or not FILE.is_file() else json.loads(FILE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()

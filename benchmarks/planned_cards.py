"""Which settings fit on which card: plans set-ups of the published sizes, from the fastest to the smallest.

python benchmarks/planned_cards.py writes `benchmarks/results/planned.json`, from which the page on performance is made.
All numbers are computed by the planner; nothing is loaded.
"""

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
# By speed; the words of each are also shown on the page.
SETUPS = {
    "caches": CACHES,
    "live": "",
    "caches, checkpointing": f"{CACHES} {CHECKPOINTING}",
    "caches, checkpointing, 8-bit AdamW": f"{CACHES} {CHECKPOINTING} --optim adamw_bnb_8bit",
}


def plan_all() -> dict[str, dict[str, dict[str, float]]]:
    """Peaks in GB by model, tuning and set-up."""
    logging.disable(logging.WARNING)
    planner = Planner("cuda")
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tqdm(total=len(MODELS) * (len(TUNINGS) * len(SETUPS) - 2), unit="plan", leave=False, disable=None) as bar:
        for model in MODELS:
            for tuning, words in TUNINGS.items():
                for setup, more in SETUPS.items():
                    if "8-bit" in setup and tuning != "all weights":
                        continue  # a LoRA's states are small
                    bar.set_description(f"{model}, {tuning}, {setup}")
                    given = f"--model_name_or_path published/{model} {COMMON} {words} {more}".split()
                    plan = PlannedSettings(given, "planned_cards.py", "cuda", model).plan(planner, {})
                    found.setdefault(model, {}).setdefault(tuning, {})[setup] = plan.peak / 1e9
                    bar.update()
    return found


def main() -> None:
    found = plan_all()
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""Hours on the page "Your card" are those that its commands take, by the FLOPs of a pair."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import plan_cards  # noqa: E402

PAGE = plan_cards.PAGE.read_text(encoding="utf-8")
COMMANDS = dict(plan_cards.COMMAND.findall(PAGE))
SDXL = "--model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --max_steps 100 "
SDXL += "--per_device_train_batch_size 2 --gradient_accumulation_steps 8"


@pytest.fixture(scope="module")
def counted():
    return json.loads(plan_cards.FLOPS.read_text(encoding="utf-8"))


def test_the_flops_of_a_command_follow_its_options():
    """Two images, each encoded (1), and predicted by policy (1, backward 1 for a LoRA, 2 for all weights) and reference
    (1) at 10 FLOPs; a prompt takes 5. Checkpointing adds a prediction, caches take their part away."""
    counted = {"sdxl": {"vae": 1, "text": 5, "denoiser": 10}, "sdxl-512": {"vae": 0, "text": 0, "denoiser": 1}}

    def flops(options):
        return plan_cards.pair_flops(plan_cards.words_of(f"{SDXL} {options}"), counted)

    assert flops("--use_peft") == 2 * 1 + 5 + 2 * 3 * 10
    assert flops("--use_peft --precompute_latents") == 2 * 3 * 10
    assert flops("--precompute_latents") == 2 * 4 * 10
    assert flops("--precompute_latents --precompute_ref_errors --activation_checkpointing") == 2 * 4 * 10
    assert flops("--use_peft --precompute_latents --resolution 512") == 2 * 3


def test_hours_are_those_of_the_steps():
    """A pair of 60 times 25e12 FLOPs takes a minute: 1600 pairs take 26.7 hours, and 30 pairs half an hour."""
    counted = {"sdxl": {"vae": 0, "text": 0, "denoiser": 10 * 25e12}}
    words = plan_cards.words_of(f"{SDXL} --use_peft --precompute_latents")
    assert plan_cards.hours(words, counted) == pytest.approx(1600 / 60)
    assert plan_cards.hours(words, counted, 10, 3) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("time", "shown"),
    [(0.17, "10 min"), (1.94, "1.9 h"), (21.2, "21 h"), (53.0, "2.2 days"), (840.0, "35 days")],
)
def test_times_are_in_the_units_of_a_reader(time, shown):
    assert plan_cards.in_words(time) == shown


def test_the_page_says_the_time_of_each_command(counted):
    """A row of a card's table names the model, the tuning and the time; its command has the title of all three."""
    shown = {}
    for card, section in re.findall(r"^## (\d+ GB)\n(.*?)(?=^## )", PAGE, re.MULTILINE | re.DOTALL):
        rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| [\d.]+ GB \| ([^|]+) \|$", section, re.MULTILINE)
        shown |= {f"{model}, {tuning}, {card}": time for model, tuning, time in rows}
    computed = {name: plan_cards.hours(plan_cards.words_of(command), counted) for name, command in COMMANDS.items()}
    assert shown == {name: plan_cards.in_words(time) for name, time in computed.items()}


def test_the_page_has_the_table_of_hours(counted):
    assert plan_cards.table_of_hours(COMMANDS, counted) in PAGE, "run `python benchmarks/plan_cards.py --hours`"

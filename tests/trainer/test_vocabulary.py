"""Metrics and settings speak the vocabulary that docs/trainer.md states."""

import ast
import dataclasses
import inspect
import re
import typing
from collections import defaultdict
from pathlib import Path

import pytest
from transformers import TrainingArguments

from trl_diffusion_sdpo import DiffusionSDPOConfig
from trl_diffusion_sdpo.losses import LOSSES
from trl_diffusion_sdpo.trainer import diffusion_sdpo_config

ROOT = Path(__file__).parents[2]
PACKAGE = Path(diffusion_sdpo_config.__file__).parents[1]
PAGE = ROOT / "docs" / "trainer.md"

TRL_WORDS, PAPER_WORDS = {"chosen", "rejected"}, {"winner", "loser"}
# Group of a metric -> the words of the other vocabulary, which its names must not have.
GROUPS = {"rewards": PAPER_WORDS, "errors": TRL_WORDS, "safeguard": TRL_WORDS, "budget": TRL_WORDS}
# Other words for the same things: a winner, a loser, a noise bin.
SYNONYMS = {"win", "wins", "lose", "loses", "preferred", "dispreferred", "better", "worse", "good", "positive"} | {
    *("negative", "level", "levels", "bucket", "buckets", "part", "parts", "slot", "slots")
}
# Whose buckets are the field's word for sizes of images.
OF_ASPECT_RATIOS = {"aspect_ratio_buckets", "bucket_step", "bucket_max_aspect_ratio"}
# What transformers' Trainer logs, without `eval_` and the name of a set.
TRAINER_NAMES = {"loss", "grad_norm", "learning_rate", "epoch", "step", "total_flos", "runtime"} | {
    *("samples_per_second", "steps_per_second", "train_loss", "train_runtime", "train_samples_per_second"),
    "train_steps_per_second",
}
METRIC = re.compile(r"(?P<prefix>eval_(?:[a-z]+_)*)?(?P<group>[a-z]+)/(?P<name>[a-z_]+)(?:@(?P<bin>\d+))?")


def violation(metric: str) -> str | None:
    """Why a logged name is against the rule; `None` if it is not."""
    found = METRIC.fullmatch(metric)
    if found is None:
        plain = re.sub(r"^eval_((probe|test)_)?(ema_)?", "", metric)
        return None if plain in TRAINER_NAMES else "neither `group/name` nor a name of transformers' Trainer"
    if found["group"] not in GROUPS:
        return f"no group of {sorted(GROUPS)}"
    if found["bin"] and found["group"] != "errors":
        return "only errors are logged by noise bin"
    words = set(found["name"].split("_"))
    wrong = words & (GROUPS[found["group"]] | SYNONYMS | {"lambda"})
    return f"{sorted(wrong)} in `{found['group']}/`" if wrong else None


@pytest.mark.parametrize(
    "metric",
    [
        *("rewards/winner", "rewards/loser_margin", "errors/chosen", "errors/rejected_change", "budget/chosen_change"),
        *("safeguard/rejected_weight", "safeguard/lambda", "errors/winner_level", "errors/preferred"),
        *("gap/winner", "eval_gap/winner", "budget/scale@3", "winner_error", "eval_winner_error", "Errors/winner"),
    ],
)
def test_the_rule_refuses_a_name_outside_it(metric):
    assert violation(metric)


@pytest.mark.parametrize(
    "metric",
    [
        *("rewards/chosen", "errors/winner_change", "safeguard/loser_weight", "budget/winner_change", "loss"),
        *("eval_rewards/margins", "eval_test_ema_errors/loser_change_relative@7", "eval_test_loss", "train_runtime"),
    ],
)
def test_the_rule_accepts_a_name_within_it(metric):
    assert violation(metric) is None


def logged_names(trainer) -> set[str]:
    trainer.train()
    return {name for entry in trainer.state.log_history for name in entry}


@pytest.fixture
def every_logged_name(make_trainer, make_pairs, tmp_path) -> set[str]:
    """Of two runs of one step that have every feature with metrics of its own."""
    common = {"train": make_pairs(2), "per_device_train_batch_size": 2, "max_steps": 1, "loss_type": "dmpo"}
    in_output_space = make_trainer(
        **common,
        output_dir=str(tmp_path / "output"),
        eval_dataset={"probe": make_pairs(2, seed=1), "test": make_pairs(2, seed=2)},
        compute_metrics=lambda evaluated: {"margin_of_mine": float(evaluated.predictions.mean())},
        eval_strategy="steps",
        eval_steps=1,
        winner_budget=0.1,
        winner_budget_pairs=1,
        num_noise_bins=2,
        loser_noise_range=[0.2, 1.0],
        ema_decay=0.5,
        winner_budget_steps=1,
    )
    in_parameter_space = make_trainer(
        **common,
        output_dir=str(tmp_path / "parameter"),
        safeguard="parameter",
        safeguard_diagnostics_steps=1,
        auto_beta=True,
    )
    return logged_names(in_output_space) | logged_names(in_parameter_space)


def documented_names() -> set[str]:
    page = PAGE.read_text(encoding="utf-8")
    tables = re.findall(r"^\| Metric\b.*\n(?:\|.*\n)+", page, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()[2:]]
    return {name for row in rows for name in re.findall(r"`([a-z_/]+)`", row.split("|")[1])}


def test_every_name_that_is_logged_is_within_the_rule_and_documented(every_logged_name):
    given = {name for name in every_logged_name if name.endswith("margin_of_mine")}
    assert given, "the runs did not call `compute_metrics`"
    names = every_logged_name - given
    assert {name: violation(name) for name in names if violation(name)} == {}
    around = r"^eval_([a-z]+_)*(?=[a-z]+/)|(_relative(_stderr)?)?(@\d+)?$"
    plain = {re.sub(around, "", name) for name in names if "/" in name}
    assert plain == {name for name in documented_names() if "/" in name}


def literals(tree: ast.AST) -> list[str]:
    """Strings of a file; what an f-string fills in is left out."""
    filled = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    inner = {id(part) for node in filled for part in node.values}
    plain = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in inner]
    joined = ["".join(part.value for part in node.values if isinstance(part, ast.Constant)) for node in filled]
    return [*(node.value for node in plain if isinstance(node.value, str)), *joined]


def test_every_name_that_the_code_spells_is_within_the_rule():
    texts = [text for file in PACKAGE.rglob("*.py") for text in literals(ast.parse(file.read_text(encoding="utf-8")))]
    spelled = {text for text in texts if re.fullmatch(rf"(eval)?_?({'|'.join(GROUPS)})/[a-z_]+@?", text)}
    assert {"rewards/chosen", "errors/winner", "safeguard/scale", "budget/over"} <= spelled
    assert {text: violation(text.strip("_@")) for text in spelled if violation(text.strip("_@"))} == {}


def own_settings() -> set[str]:
    """Of the trainer's configuration, without those that only have another default than transformers'."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {field.name for field in dataclasses.fields(DiffusionSDPOConfig)} - inherited


def test_settings_say_winner_and_loser():
    own = set(own_settings()) - OF_ASPECT_RATIOS
    wrong = {name: set(name.split("_")) & (TRL_WORDS | SYNONYMS) for name in own}
    assert {name: words for name, words in wrong.items() if words} == {}


def choices(annotation) -> set[str]:
    """Strings of the `Literal` types in an annotation."""
    if typing.get_origin(annotation) is typing.Literal:
        return {choice for choice in typing.get_args(annotation) if isinstance(choice, str)}
    return set().union(*(choices(part) for part in typing.get_args(annotation)))


def test_choices_of_settings_say_winner_and_loser():
    hints = typing.get_type_hints(DiffusionSDPOConfig, include_extras=True)
    found = set().union(*(choices(hints[name]) for name in own_settings()))
    assert {"noise_bin", "output"} <= found
    assert {choice for choice in found if set(choice.split("_")) & (TRL_WORDS | SYNONYMS)} == set()


def test_a_setting_of_one_loss_begins_with_the_loss_s_name():
    readers = defaultdict(list)
    for loss_type, spec in LOSSES.items():
        for name, parameter in inspect.signature(spec.function).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                readers[name].append(loss_type)
    of_one = {name: losses[0] for name, losses in readers.items() if len(losses) == 1}
    assert len(of_one) > 5
    others = {name for name, loss_type in of_one.items() if name.split("_")[0] != loss_type.split("_")[0]}
    assert others == {"label_smoothing"}  # as TRL calls it


def test_settings_that_begin_with_sample_are_those_of_sample_images():
    section = PAGE.read_text(encoding="utf-8").partition("### Sample images")[2].partition("\n#")[0]
    documented = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    assert documented == {name for name in own_settings() if "sample" in name.split("_")}


def test_the_page_states_the_rule():
    section = PAGE.read_text(encoding="utf-8").partition("### The words of names")[2].partition("\n## ")[0]
    rows = [row.split("|") for row in section.splitlines() if row.startswith("| ") and "`" in row]
    stated = {
        group: set(re.findall(r"`(\w+)`", row[2])) for row in rows for group in re.findall(r"`(\w+)/\*`", row[1])
    }
    assert stated == {group: TRL_WORDS if refused is PAPER_WORDS else PAPER_WORDS for group, refused in GROUPS.items()}

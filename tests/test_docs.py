"""Code and commands that people read name things that exist. Building the site checks the links."""

import ast
import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
import yaml
from transformers import TrainingArguments
from trl import ModelConfig

import trl_diffusion_sdpo
from docs_build.generated import part
from trl_diffusion_sdpo import DiffusionSDPOConfig
from trl_diffusion_sdpo.cli.launch import launch_options
from trl_diffusion_sdpo.cli.main import COMMANDS
from trl_diffusion_sdpo.cli.pair_arguments import PairArguments
from trl_diffusion_sdpo.data import FORMATS, detect_format

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MORE = ("*.md", "examples/README.md", "examples/scripts/*.py", "examples/configs/*.yaml", "benchmarks/**/*.md")
PAGES = sorted([*DOCS.glob("*.md"), *(page for pattern in MORE for page in ROOT.glob(pattern))])
RUNS = "<!-- runs -->\n"


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    runs: bool


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if page.suffix == ".yaml":  # commands are in its comments
            comments = "\n".join(re.findall(r"^# ?(.*)", text, re.MULTILINE))
            text = f"```bash\n{comments}\n```"
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            runs = text[: match.start()].endswith(RUNS)
            found.append(Block(page.name, line, match[1], match[2], runs))
    return [block for block in found if block.language in languages]


def options_of_train() -> set[str]:
    return {
        field.name
        for holder in (DiffusionSDPOConfig, PairArguments, ModelConfig)
        for field in dataclasses.fields(holder)
    }


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: f"{block.page}:{block.line}")
def test_python_calls_public_names_and_lora_as_their_signatures_say(block):
    public = {name: getattr(trl_diffusion_sdpo, name) for name in trl_diffusion_sdpo.__all__}
    public |= {"LoraConfig": peft.LoraConfig}
    for call in (node for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Call)):
        named = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
        if isinstance(call.func, ast.Name) and call.func.id in public:
            inspect.signature(public[call.func.id]).bind_partial(*call.args, **named)


@pytest.mark.parametrize(
    "block", [b for b in blocks("python") if b.runs], ids=lambda block: f"{block.page}:{block.line}"
)
def test_python_that_is_marked_runs(block):
    torch.manual_seed(0)
    exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {"__name__": "docs"})


@pytest.mark.parametrize("block", blocks("bash"), ids=lambda block: f"{block.page}:{block.line}")
def test_commands_and_their_options_exist(block):
    for line in block.text.replace("\\\n", " ").splitlines():
        command = re.search(r"(?:trl-diffusion-sdpo|trl_diffusion_sdpo\.cli\.main) ([\w-]+)(.*)", line)
        if command is None:
            continue
        assert command[1] in COMMANDS
        module = import_module(f"trl_diffusion_sdpo.cli.{command[1].replace('-', '_')}")
        if hasattr(module, "SUBCOMMANDS"):
            known = set(module.subcommand_parser(command[2].split()[0]).names())
        else:
            known = set(module.make_parser().names()) if hasattr(module, "make_parser") else set()
        if command[1] not in ("export", "demo", "env"):
            known |= {*options_of_train(), "config", "accelerate_config", *launch_options()}
        assert set(re.findall(r" --(\w+)", command[2].partition("#")[0])) <= known


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: f"{block.page}:{block.line}")
def test_yaml_is_a_configuration_of_existing_options_with_values_of_their_kind(block, tmp_path):
    settings = yaml.safe_load(block.text)
    assert set(settings) <= options_of_train()
    assert all(not isinstance(value, str) or not re.fullmatch(r"[\d.]+e-?\d+", value) for value in settings.values())
    needs_an_accelerator = {"bf16", "fp16", "tf32"}
    fields = {field.name for field in dataclasses.fields(DiffusionSDPOConfig)} - needs_an_accelerator
    given = {name: value for name, value in settings.items() if name in fields}
    DiffusionSDPOConfig(**{"report_to": "none", **given, "output_dir": str(tmp_path), "use_cpu": True})


# ---- Pages with parts that are written from the code ----------------------------------------------------------------


def test_the_configuration_page_has_every_setting_of_ours_once():
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    page = "\n".join(part(*asked.split()) for asked in re.findall(r"^<!-- generated: (.*) -->$", text, re.MULTILINE))
    sections = re.findall(r"^### `(\w+)`", page, re.MULTILINE)
    inherited = {setting.name for setting in dataclasses.fields(TrainingArguments)}
    assert len(sections) == len(set(sections))
    assert {setting.name for setting in dataclasses.fields(DiffusionSDPOConfig)} - inherited <= set(sections)


def test_every_format_has_a_row_that_is_recognised_as_it():
    page = (DOCS / "dataset_formats.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(FORMATS)
    for name, section in sections.items():
        names: dict = {}
        exec(re.search(r"```python\n(row = .*?)```", section, re.DOTALL)[1], names)
        assert detect_format(names["row"]).name == name

"""Keeps the documentation true: links, settings, losses, and what code on the pages names."""

import dataclasses
import inspect
import pkgutil
import re
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
import yaml
from transformers import TrainingArguments
from trl import ModelConfig

import trl_diffusion_sdpo
from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer, diffusion_preference_loss
from trl_diffusion_sdpo.cli.demo import make_parser as make_demo_parser
from trl_diffusion_sdpo.cli.main import COMMANDS
from trl_diffusion_sdpo.cli.pair_arguments import PairArguments
from trl_diffusion_sdpo.data import FORMATS, detect_format
from trl_diffusion_sdpo.families import FAMILIES
from trl_diffusion_sdpo.losses import LOSSES
from trl_diffusion_sdpo.trainer.config.all_arguments import AllArguments

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])
COMING_FROM = sorted(DOCS.glob("coming_from_*.md"))
RUNS = "<!-- runs -->\n"


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    runs: bool


class Table(NamedTuple):
    """A table of a page: its header and its rows, cells stripped."""

    page: str
    header: list[str]
    rows: list[list[str]]


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            runs = text[: match.start()].endswith(RUNS)
            found.append(Block(page.name, line, match[1], match[2], runs))
    return [block for block in found if block.language in languages]


def tables(page: Path) -> list[Table]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = []
    for match in re.finditer(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        header, _, *rows = [_cells(line) for line in match[0].splitlines()]
        assert all(len(row) == len(header) for row in rows), f"{page.name}: a row of another length: {header}"
        found.append(Table(page.name, header, rows))
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def tables_with(page: Path, *header: str) -> list[Table]:
    return [table for table in tables(page) if table.header[: len(header)] == list(header)]


def code(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def own_arguments() -> set[str]:
    fields = {field.name for field in dataclasses.fields(DiffusionSDPOConfig)}
    parts = [part for part in DiffusionSDPOConfig.__mro__ if part.__module__.startswith("trl_diffusion_sdpo.")]
    return fields & {name for part in parts for name in part.__annotations__}


def options_of_train() -> set[str]:
    return {
        field.name
        for holder in (DiffusionSDPOConfig, PairArguments, ModelConfig)
        for field in dataclasses.fields(holder)
    }


def known_arguments() -> set[str]:
    callables = (DiffusionSDPOTrainer.__init__, diffusion_preference_loss)
    of_losses = {name for spec in LOSSES.values() for name in spec.loss_kwargs}
    named = {name for function in callables for name in inspect.signature(function).parameters}
    return options_of_train() | named | of_losses


def documented_metrics() -> set[str]:
    (table,) = tables_with(DOCS / "trainer.md", "Metric")
    return {name for row in table.rows for name in code(row[0])}


def documented_parameters() -> dict[str, str]:
    rows = [row for table in tables_with(DOCS / "trainer.md", "Parameter", "Default") for row in table.rows]
    assert len({row[0] for row in rows}) == len(rows), "an argument stands in two tables"
    return {code(row[0])[0]: row[1] for row in rows}


def test_every_argument_of_the_config_stands_in_a_parameter_table():
    assert set(documented_parameters()) == own_arguments()


def test_the_documented_defaults_are_those_of_the_config():
    defaults = {field.name: field.default for field in dataclasses.fields(DiffusionSDPOConfig)}
    for name, written in documented_parameters().items():
        default = defaults[name]
        expected = "unset" if default is None else f"`{default!r}`".replace("'", '"')
        assert written == expected, f"{name}: the table says {written}, the config {expected}"


def test_every_loss_stands_in_the_loss_table():
    (table,) = tables_with(DOCS / "trainer.md", "`loss_type`", "Loss of a pair")
    assert {code(row[0])[0] for row in table.rows} == set(LOSSES)


def test_every_pipeline_class_stands_in_the_first_table_of_the_family_page():
    (table,) = tables_with(DOCS / "model_families.md", "Pipeline class", "Parameters")
    assert [name for row in table.rows for name in code(row[0])] == list(FAMILIES)


def test_every_format_has_a_row_that_is_recognised_as_it():
    page = (DOCS / "dataset_formats.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(FORMATS)
    for name, section in sections.items():
        names: dict = {}
        exec(re.search(r"```python\n(row = .*?)```", section, re.DOTALL)[1], names)
        assert detect_format(names["row"]).name == name
        assert FORMATS[name].image_scores(names["row"]).values


def test_every_command_and_every_option_of_the_demo_stands_on_the_command_line_page():
    (commands,) = tables_with(DOCS / "cli.md", "Command")
    assert [code(row[0])[0] for row in commands.rows] == list(COMMANDS)
    (demo,) = tables_with(DOCS / "cli.md", "Option", "Default")
    options = {action.dest for action in make_demo_parser()._actions} - {"help"}
    assert {code(row[0])[0] for row in demo.rows} == options


def test_the_options_on_the_command_line_page_exist():
    for table in [
        *tables_with(DOCS / "cli.md", "Option", "What it takes"),
        *tables_with(DOCS / "cli.md", "Option", "What it does"),
    ]:
        for row in table.rows:
            assert set(code(row[0])) <= options_of_train()


@pytest.mark.parametrize("page", COMING_FROM, ids=lambda page: page.name)
def test_tables_of_what_an_argument_is_called_here_name_existing_things_only(page):
    translated = [table for table in tables(page) if "Here" in table.header]
    assert translated, "a page without a table"
    unknown = []
    for table in translated:
        column = table.header.index("Here")
        for row in table.rows:
            names = [re.split(r"[:=]", name)[0].strip() for name in code(row[column])]
            assert names or row[column].startswith("none"), row
            unknown += [name for name in names if name not in known_arguments() | documented_metrics()]
    assert unknown == []


def test_the_compatibility_table_names_existing_arguments_only():
    (table,) = tables_with(DOCS / "trainer.md", "Feature of TrainingArguments")
    named = [name for row in table.rows for name in code(row[0])]
    assert [name for name in named if name not in options_of_train()] == []


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: f"{block.page}:{block.line}")
def test_python_compiles(block):
    compile(block.text, f"{block.page}:{block.line}", "exec")


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: f"{block.page}:{block.line}")
def test_python_calls_the_config_and_lora_with_existing_arguments(block):
    accepted = {
        "DiffusionSDPOConfig": {field.name for field in dataclasses.fields(DiffusionSDPOConfig)},
        "LoraConfig": {field.name for field in dataclasses.fields(peft.LoraConfig)},
    }
    for call, body in re.findall(r"\b(DiffusionSDPOConfig|LoraConfig)\(((?:[^()]|\([^()]*\))*)\)", block.text):
        names = re.findall(r"(?:^|[\s,(])(\w+)=", body)
        assert set(names) <= accepted[call]


@pytest.mark.parametrize(
    "block", [b for b in blocks("python") if b.runs], ids=lambda block: f"{block.page}:{block.line}"
)
def test_python_that_is_marked_runs(block):
    torch.manual_seed(0)
    exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {"__name__": "docs"})


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: f"{block.page}:{block.line}")
def test_yaml_is_a_configuration_of_existing_options_with_values_of_their_kind(block, tmp_path):
    settings = yaml.safe_load(block.text)
    assert set(settings) <= options_of_train()
    assert all(not isinstance(value, str) or not re.fullmatch(r"[\d.]+e-?\d+", value) for value in settings.values())
    needs_an_accelerator = {"bf16", "fp16", "tf32"}
    fields = {field.name for field in dataclasses.fields(DiffusionSDPOConfig)} - needs_an_accelerator
    given = {name: value for name, value in settings.items() if name in fields}
    DiffusionSDPOConfig(**{"report_to": "none", **given, "output_dir": str(tmp_path), "use_cpu": True})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            dead.append(link)
    assert dead == []


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_names_of_the_package_that_a_page_names_exist(page):
    named = re.findall(r"\btrl_diffusion_sdpo(?:\.\w+)+", page.read_text(encoding="utf-8"))
    assert [name for name in sorted(set(named)) if not _is_importable(name)] == []


def _is_importable(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_every_page_is_in_the_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = _pages_of(site["nav"])
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md") if page.name not in site["exclude_docs"])


def _pages_of(entry: str | list | dict) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [page for child in children for page in _pages_of(child)]


def test_every_public_name_and_every_group_of_settings_has_an_entry_in_the_api_reference():
    entries = re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    public = {f"{trl_diffusion_sdpo.__name__}.{name}" for name in trl_diffusion_sdpo.__all__}
    groups = {f"{part.__module__}.{part.__name__}" for part in AllArguments.__bases__ if part is not TrainingArguments}
    assert public | groups <= set(entries)

"""Tests the parts of pages that are written from the code, and that pages have a section for each thing there is."""

import dataclasses
import re
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated

import pytest
from packaging.version import Version
from test_docs import DOCS, _anchors, options_of_train
from transformers import TrainingArguments

from docs_build import generated
from docs_build.generated import part
from trl_diffusion_sdpo import DiffusionSDPOConfig, __version__
from trl_diffusion_sdpo.cli.main import COMMANDS
from trl_diffusion_sdpo.data import FORMATS, detect_format
from trl_diffusion_sdpo.families import FAMILIES
from trl_diffusion_sdpo.trainer.config.declaring import Range


def parts_of(page: str) -> list[list[str]]:
    """Return the parts that a page asks for, each with its arguments."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [match.split() for match in re.findall(r"^<!-- generated: (.*) -->$", text, re.MULTILINE)]


def here(page: str) -> list[str]:
    """Return the names in the column "Here" of a page's tables."""
    names = []
    for table in re.findall(r"(?:^\|.*\|$\n?)+", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        names += [name for row in rows for name in re.findall(r"`([^`]+)`", row[header.index("Here")])]
    return [re.split(r"[:=]", name)[0] for name in names]


def test_the_configuration_page_has_every_setting_of_ours_once():
    page = "\n".join(part(name, *given) for name, *given in parts_of("configuration.md"))
    sections = re.findall(r"^### `(\w+)`", page, re.MULTILINE)
    inherited = {setting.name for setting in dataclasses.fields(TrainingArguments)}
    assert len(sections) == len(set(sections))
    assert {setting.name for setting in dataclasses.fields(DiffusionSDPOConfig)} - inherited <= set(sections)


def test_a_setting_is_shown_with_its_type_range_default_and_help(monkeypatch):
    config = make_dataclass("Config", [("strength", Annotated[float | None, Range("[0, 1]")], field(default=None))])
    config.__dataclass_fields__["strength"].metadata = {"help": "Strength of [`~a.Thing`], 5 %% of it."}
    monkeypatch.setattr(generated, "_config", lambda: config)
    assert part("settings", "Config").split("\n\n") == [
        "### `strength` {#strength}",
        "`float`, in [0, 1]. Default: unset.\n{.setting}",
        "Strength of `Thing`, 5 % of it.",
    ]


def test_the_family_page_has_a_section_for_every_family():
    table = part("families")
    links = set(re.findall(r"\]\(#([\w-]+)\)", table))
    assert len(links) == len(set(FAMILIES.values()))
    assert links <= _anchors(DOCS / "model_families.md")
    assert all(f"`{name}`" in table for name in FAMILIES)
    assert ["families"] in parts_of("model_families.md")


def test_the_command_line_page_has_a_section_and_the_options_of_every_command():
    assert set(COMMANDS) <= _anchors(DOCS / "cli.md")
    shown = {given[0] for name, *given in parts_of("cli.md") if name == "options"}
    assert shown == set(COMMANDS) - {"encode", "env"}  # which take the options of `train`, and none
    assert "| `--write_pairs` |" in part("options", "demo")


def test_every_format_has_a_row_that_is_recognised_as_it():
    page = (DOCS / "dataset_formats.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(FORMATS)
    for name, section in sections.items():
        names: dict = {}
        exec(re.search(r"```python\n(row = .*?)```", section, re.DOTALL)[1], names)
        assert detect_format(names["row"]).name == name


@pytest.mark.parametrize("page", ["coming_from.md"])
def test_settings_of_other_trainers_are_translated_to_existing_ones(page):
    metrics = re.findall(r"`(\w+/\w+)`", (DOCS / "metrics.md").read_text(encoding="utf-8"))
    parameters = {"model", "ref_model", "args", "processing_class", "peft_config"}
    known = options_of_train() | parameters | set(metrics)
    assert [name for name in here(page) if name not in known] == []


def test_links_of_a_file_of_the_repository_lead_to_pages_or_become_code(tmp_path, monkeypatch):
    (tmp_path / "FILE.md").write_text("[a](docs/faq.md#b), [`c`](src/c.py), [d](https://example.org)\n")
    monkeypatch.setattr(generated, "ROOT", Path(tmp_path))
    assert part("file", "FILE") == "[a](faq.md#b), `c`, [d](https://example.org)\n"


def test_the_site_names_the_version_of_the_package():
    site = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"copyright: trl-diffusion-sdpo {Version(__version__).base_version} " in site

"""The parts of pages that are written from the code."""

import dataclasses
import re
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated

from test_docs import DOCS
from transformers import TrainingArguments

from docs_build import generated
from docs_build.generated import part
from trl_diffusion_sdpo import DiffusionSDPOConfig
from trl_diffusion_sdpo.data import FORMATS, detect_format
from trl_diffusion_sdpo.trainer.config.declaring import Range


def parts_of(page: str) -> list[list[str]]:
    """Return the parts that a page asks for, each with its arguments."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [match.split() for match in re.findall(r"^<!-- generated: (.*) -->$", text, re.MULTILINE)]


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


def test_every_format_has_a_row_that_is_recognised_as_it():
    page = (DOCS / "dataset_formats.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(FORMATS)
    for name, section in sections.items():
        names: dict = {}
        exec(re.search(r"```python\n(row = .*?)```", section, re.DOTALL)[1], names)
        assert detect_format(names["row"]).name == name


def test_links_of_a_file_of_the_repository_lead_to_pages_or_become_code(tmp_path, monkeypatch):
    (tmp_path / "FILE.md").write_text("[a](docs/faq.md#b), [`c`](src/c.py), [d](https://example.org)\n")
    monkeypatch.setattr(generated, "ROOT", Path(tmp_path))
    assert part("file", "FILE") == "[a](faq.md#b), `c`, [d](https://example.org)\n"

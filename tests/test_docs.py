"""Keeps the documentation true: arguments, losses, metrics, formats, families, defaults, links and code blocks."""

import dataclasses
import importlib.util
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
from trl_diffusion_sdpo.data.checking import COUNTS
from trl_diffusion_sdpo.families import FAMILIES, Family, family_for_class_name
from trl_diffusion_sdpo.families.noise import FlowMatchingProcess
from trl_diffusion_sdpo.families.stable_diffusion import StableDiffusionFamily
from trl_diffusion_sdpo.families.stable_diffusion_xl import StableDiffusionXLFamily
from trl_diffusion_sdpo.losses import GRANULARITIES, LOSSES
from trl_diffusion_sdpo.trainer.config.all_arguments import AllArguments

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])
COMING_FROM = sorted(DOCS.glob("coming_from_*.md"))
RUNS = "<!-- runs -->\n"

# What transformers' Trainer logs by itself.
TRAINER_METRICS = {"errors/pairs", "errors/accuracy", "errors/margin_relative", "loss", "grad_norm", "learning_rate"}


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
    return options_of_train() | {name for function in callables for name in inspect.signature(function).parameters}


def logged_metrics() -> dict[str, set[str]]:
    """Names that a step of each loss gives, with a reference where the loss needs one."""
    generator = torch.Generator().manual_seed(0)
    prediction, target, reference = (torch.randn(4, 2, 3, 3, generator=generator) for _ in range(3))
    names = {}
    for loss_type, spec in LOSSES.items():
        out = diffusion_preference_loss(
            prediction,
            target,
            reference if spec.needs_reference else None,
            loss_type=loss_type,
            scores=torch.tensor([1.0, 1.0, 0.0, 0.0]) if spec.needs_scores else None,
        )
        names[loss_type] = set(out.metrics)
    return names


def documented_metrics() -> dict[str, str]:
    (table,) = tables_with(DOCS / "trainer.md", "Metric")
    return {code(name)[0]: logged_for for name, _, logged_for in table.rows}


def documented_parameters() -> dict[str, str]:
    rows = [row for table in tables_with(DOCS / "trainer.md", "Parameter", "Default") for row in table.rows]
    assert len({row[0] for row in rows}) == len(rows), "an argument stands in two tables"
    return {code(row[0])[0]: row[1] for row in rows}


def documented_losses() -> dict[str, list[str]]:
    (table,) = tables_with(DOCS / "trainer.md", "`loss_type`", "Loss of a pair")
    return {code(row[0])[0]: row for row in table.rows}


def test_every_argument_of_the_config_stands_in_a_parameter_table():
    assert set(documented_parameters()) == own_arguments()


def test_the_documented_defaults_are_those_of_the_config():
    defaults = {field.name: field.default for field in dataclasses.fields(DiffusionSDPOConfig)}
    for name, written in documented_parameters().items():
        default = defaults[name]
        expected = "unset" if default is None else f"`{default!r}`".replace("'", '"')
        assert written == expected, f"{name}: the table says {written}, the config {expected}"


def test_every_loss_stands_in_the_loss_table():
    assert set(documented_losses()) == set(LOSSES)


def test_the_loss_table_says_which_losses_need_a_reference():
    for loss_type, row in documented_losses().items():
        assert row[3] == ("yes" if LOSSES[loss_type].needs_reference else "no"), loss_type


def test_the_loss_table_has_the_families_betas():
    families = (StableDiffusionFamily, StableDiffusionXLFamily)
    for loss_type, row in documented_losses().items():
        betas = [f"{family.loss_defaults(loss_type).beta:g}" for family in families]
        assert row[2] == (" / ".join(betas) if LOSSES[loss_type].uses_beta else "none"), loss_type


def test_the_readme_lists_every_loss():
    (table,) = tables_with(ROOT / "README.md", "`loss_type`")
    listed = {name: row[2] for row in table.rows for name in code(row[0])}
    assert listed == {name: "yes" if spec.needs_reference else "no" for name, spec in LOSSES.items()}


def text_to_image_classes() -> list[str]:
    """A family's first pipeline class, for every family."""
    return list(dict.fromkeys(family_for_class_name(name).pipeline_classes[0] for name in FAMILIES))


def column_of(class_name: str, header: list[str], tuning: str) -> int:
    """Where a table by kinds of models has this one's numbers."""
    if f"`{class_name}`" in header:
        return header.index(f"`{class_name}`")
    if "all others" in header:
        return header.index("all others")
    is_flow = issubclass(family_for_class_name(class_name).noise_process_class, FlowMatchingProcess)
    return header.index(f"flow matching, {tuning}" if is_flow else "other DDPM models")


def row_of(table: Table, loss_type: str) -> list[str]:
    others = next(row for row in table.rows if row[0] == "all others")
    return next((row for row in table.rows if loss_type in code(row[0])), others)


@pytest.mark.parametrize("class_name", text_to_image_classes())
def test_the_family_page_has_the_familys_margins(class_name):
    (table,) = tables_with(DOCS / "model_families.md", "mu by `loss_type`")
    family = family_for_class_name(class_name)
    for loss_type in LOSSES:
        written = row_of(table, loss_type)[column_of(class_name, table.header, "")]
        assert float(written) == family.loss_defaults(loss_type).safeguard_mu, loss_type


@pytest.mark.parametrize("class_name", text_to_image_classes())
def test_the_family_page_has_the_familys_betas(class_name):
    (table,) = tables_with(DOCS / "model_families.md", "beta by `loss_type`")
    family = family_for_class_name(class_name)
    for loss_type in (name for name, spec in LOSSES.items() if spec.uses_beta):
        for tuning, full in (("all weights", True), ("LoRA", False)):
            written = row_of(table, loss_type)[column_of(class_name, table.header, tuning)]
            assert float(written) == family.loss_defaults(loss_type).beta_for(full=full), (loss_type, tuning)


@pytest.mark.parametrize("class_name", text_to_image_classes())
def test_the_family_page_has_the_familys_settings(class_name):
    (table,) = tables_with(DOCS / "model_families.md", "Pipeline class", "`learning_rate`, all weights")
    (row,) = [row for row in table.rows if code(row[0]) == [class_name]]
    family = family_for_class_name(class_name)
    assert [float(row[1]), float(row[2])] == [family.learning_rate_full, family.learning_rate_lora]
    assert code(row[4]) == [family.weighting_scheme]
    assert row[5] == ("unset" if family.guidance_scale is None else f"{family.guidance_scale}")


def module_of(path: str):
    """A script or an extension of this repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_familys_defaults_have_a_source():
    (table,) = tables_with(DOCS / "model_families.md", "Pipeline class", "Rate, all weights")
    named = [name for row in table.rows for name in code(row[0])]
    assert sorted(named) == sorted(text_to_image_classes())
    assert all(all(row[1:4]) for row in table.rows)


def test_every_pipeline_class_stands_in_the_first_table_of_the_family_page():
    (table,) = tables_with(DOCS / "model_families.md", "Pipeline class", "Parameters")
    assert [name for row in table.rows for name in code(row[0])] == list(FAMILIES)


def test_the_family_that_is_walked_through_is_quoted_whole():
    page = (DOCS / "add_a_model_family.md").read_text(encoding="utf-8")
    walk = page.partition("## The file, line by line")[2].partition("\n## ")[0]
    quoted = "".join(re.findall(r"^```py\n(.*?)^```$", walk, re.MULTILINE | re.DOTALL))
    file = (ROOT / "trl_diffusion_sdpo/families/lumina2.py").read_text(encoding="utf-8")
    assert [line for line in quoted.splitlines() if line] == [line for line in file.splitlines() if line]
    named = (ROOT / "trl_diffusion_sdpo/families/registry.py").read_text(encoding="utf-8")
    (line,) = re.findall(r"^```py\n( *\"lumina2:.*)\n```$", page, re.MULTILINE)
    assert line in named.splitlines()


def test_every_hook_and_every_fact_of_a_family_stands_on_the_page_about_adding_one():
    page = (DOCS / "add_a_model_family.md").read_text(encoding="utf-8")
    section = page.partition("## How a family is built")[2]
    public = {name for name in (*vars(Family), *Family.__annotations__) if not name.startswith("_")}
    assert {name for name in public if f"`{name}`" not in section} == {
        "denoiser",
        "loss_defaults",
    }  # not to be written


def test_every_metric_of_a_step_stands_in_the_metrics_table():
    assert set().union(*logged_metrics().values()) == set(documented_metrics()) - TRAINER_METRICS
    assert TRAINER_METRICS <= set(documented_metrics())


def test_the_metrics_table_says_for_which_losses_a_name_is_logged():
    everywhere, logged = documented_metrics(), logged_metrics()
    expected = {
        "every loss": set(LOSSES),
        "losses with a beta": {name for name, spec in LOSSES.items() if spec.uses_beta},
        "losses that read the loser": {name for name, spec in LOSSES.items() if spec.uses_loser},
        "where there is a reference": {name for name, spec in LOSSES.items() if spec.needs_reference},
    }
    for metric in set(everywhere) - TRAINER_METRICS:
        losses = expected.get(everywhere[metric]) or set(code(everywhere[metric]))
        assert {name for name, metrics in logged.items() if metric in metrics} == losses, metric


def test_every_granularity_stands_on_the_safeguard_page():
    (table,) = tables_with(DOCS / "safeguard.md", "`safeguard_granularity`")
    assert [code(row[0])[0].strip('"') for row in table.rows] == list(GRANULARITIES)


def test_every_format_has_a_row_that_is_recognised_as_it():
    page = (DOCS / "dataset_formats.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(FORMATS)
    for name, section in sections.items():
        names: dict = {}
        exec(re.search(r"```python\n(row = .*?)```", section, re.DOTALL)[1], names)
        assert detect_format(names["row"]).name == name
        assert FORMATS[name].image_scores(names["row"]).values


def test_every_count_of_the_report_is_explained_on_the_data_page():
    (table,) = tables_with(DOCS / "dataset_formats.md", "Counted as")
    assert [code(row[0])[0] for row in table.rows] == [count.replace("_", " ") for count in COUNTS]


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
            unknown += [name for name in names if name not in known_arguments() | set(documented_metrics())]
    assert unknown == []


def test_the_compatibility_table_names_existing_arguments_only():
    (table,) = tables_with(DOCS / "trainer.md", "Feature of TrainingArguments")
    named = [name for row in table.rows for name in code(row[0])]
    assert [name for name in named if name not in options_of_train()] == []


def test_the_trainers_arguments_stand_on_its_page():
    (table,) = tables_with(DOCS / "trainer.md", "Argument", "What it takes")
    documented = [name for row in table.rows for name in code(row[0])]
    expected = list(inspect.signature(DiffusionSDPOTrainer.__init__).parameters)[1:]
    assert sorted(documented) == sorted(expected)


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


def test_the_own_training_loop_is_marked_to_run():
    assert [block.page for block in blocks("python") if block.runs] == ["trainer.md"]


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


def test_the_site_is_in_four_groups():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert [name for item in site["nav"] for name in item] == ["Start", "Guides", "Reference", "Background"]


def test_no_page_fetches_anything_from_elsewhere():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert site["theme"]["font"] is False and "extra_javascript" not in site
    assert [sheet for sheet in site["extra_css"] if not (DOCS / sheet).exists()] == []
    shown = [
        link
        for page in DOCS.glob("*.md")
        for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)|\ssrc=", page.read_text("utf-8"))
    ]
    assert [link for link in shown if not link or link.startswith("http")] == []


def test_every_formula_is_set_as_mathml():
    markdown = pytest.importorskip("markdown", reason="needs the extra `docs`")
    pytest.importorskip("latex2mathml", reason="needs the extra `docs`")
    mathml = module_of("docs_build/mathml.py").makeExtension()
    found_by = ["tables", "pymdownx.superfences", "pymdownx.arithmatex"]
    reader = markdown.Markdown(
        extensions=[*found_by, mathml], extension_configs={"pymdownx.arithmatex": {"generic": True}}
    )
    pages = {page.name: page.read_text(encoding="utf-8") for page in DOCS.glob("*.md")}
    blocks_removed = {name: re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S) for name, text in pages.items()}
    written = {name: len(re.findall(r"^\\\[|\\\(", text, re.M)) for name, text in blocks_removed.items()}
    with_formulas = [name for name in pages if written[name]]
    assert all(reader.reset().convert(pages[name]).count("<math ") == written[name] for name in with_formulas)
    assert sum(written.values()) > 40
    with pytest.raises(ValueError, match="must know every command"):
        reader.reset().convert(r"\(\nosuchcommand x\)")


def api_entries() -> list[str]:
    return re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_public_name_and_every_group_of_settings_has_an_entry_in_the_api_reference():
    entries = api_entries()
    public = {f"{trl_diffusion_sdpo.__name__}.{name}" for name in trl_diffusion_sdpo.__all__}
    groups = {f"{part.__module__}.{part.__name__}" for part in AllArguments.__bases__ if part is not TrainingArguments}
    assert public | groups <= set(entries)
    assert len(set(entries)) == len(entries) and all(_is_importable(entry) for entry in entries)


@pytest.mark.parametrize("entry", api_entries(), ids=lambda entry: entry.rpartition(".")[2])
def test_a_docstring_in_the_api_reference_explains_every_parameter(entry):
    """The reference is generated; what its generator does not understand would be left out of it with a warning."""
    thing = pkgutil.resolve_name(entry)
    if thing is DiffusionSDPOConfig:
        return  # its settings are those of the groups
    text = inspect.getdoc(thing)
    section = re.search(r"^(?:Args|Parameters):\n((?:(?: {4}.*)?\n?)+)", text, re.MULTILINE)
    explained = re.findall(r"^ {4}(\S.*)", section[1] if section else "", re.MULTILINE)
    assert [line for line in explained if not re.match(r"\w+ \(.*\):", line)] == []
    own = thing.__annotations__ if ".settings." in entry else inspect.signature(thing).parameters
    assert [re.match(r"\w+", line)[0] for line in explained] == list(own)


def is_a_name_here(name: str) -> bool:
    """Whether it is a setting, an argument, a metric, a command, a loss or a public name."""
    launch = {"accelerate_config", "num_processes", "config", "fit"}  # options of commands beside the settings
    known = {*known_arguments(), *COMMANDS, *LOSSES, *trl_diffusion_sdpo.__all__, *launch}
    of_tables = [table for table in tables(DOCS / "trainer.md") if table.header[0].startswith("Metric")]
    metrics = {metric for table in of_tables for row in table.rows for metric in code(row[0])}
    return name in known or name.removeprefix("eval_") in metrics


def names_in(text: str) -> set[str]:
    """What could be one of these and stands in backticks: `name`, `name=value` or `name: value`."""
    names = [re.match(r"([A-Za-z][\w/-]*)(?:=|: |$)", span) for span in code(text)]
    return {name[1] for name in names if name}


@pytest.mark.parametrize(
    ("page", "others"),
    [
        ("index.md", {"epsilon", "v_prediction", "sample"}),
        ("faq.md", {"worse", "ruined", "force_upcast", "SDPOTrainer", "None", "samples/", "examples/configs"}),
    ],
)
def test_what_the_pages_for_new_users_name_exists(page, others):
    text = re.sub(r"^```.*?^```$", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert {name for name in names_in(text) if not is_a_name_here(name)} <= others


def test_every_row_of_what_users_look_for_has_a_page_a_state_and_existing_names():
    rows = [row for table in tables(DOCS / "where_is.md") for row in table.rows]
    assert len(rows) >= 68
    others = {"compute_loss", "from_single_file", "PeftModel", "examples/configs", "model"}
    for what, state, here in rows:
        assert re.match(r"\[.+?\]\(\w+\.md(#[\w-]+)?\)", what), what
        assert state in ("yes", "part", "no") and (state != "no" or here.startswith("none")), what
        assert {name for name in names_in(here) if not is_a_name_here(name)} <= others, what


def test_the_changelog_names_every_loss_and_the_version_to_come():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [name for name in LOSSES if f"`{name}`" not in text] == []
    assert "## [Unreleased] 0.1.0" in text

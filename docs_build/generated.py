"""A Markdown extension: parts of pages that are written from the code while the site is built.

A page asks for a part by a comment on a line of its own, such as `<!-- generated: settings LossArguments -->`. `PARTS`
lists what there is.
"""

import argparse
import dataclasses
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

MARKER = re.compile(r"^<!-- generated: (\w+)((?: [\w-]+)*) -->$")
PACKAGE = "trl_diffusion_sdpo"
ROOT = Path(__file__).parents[1]


def part(name: str, *arguments: str) -> str:
    """Return a part of a page as Markdown.

    Raises:
        `KeyError`: If there is no such part.
    """
    return PARTS[name](*arguments)


# ---- Settings -------------------------------------------------------------------------------------------------------


def settings(group: str) -> str:
    """Return one section for each setting of a group: type, default, allowed values and help."""
    config = _config()
    kind = next(base for base in config.__mro__ if base.__name__ == group)
    hints = get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(config)}
    return "\n\n".join(_setting(fields[name], hints[name]) for name in vars(kind)["__annotations__"] if name in fields)


def changed_defaults() -> str:
    """Return a table of the settings of transformers that have another default here."""
    from transformers import TrainingArguments

    config = _config()
    before = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    changed = [
        field for field in dataclasses.fields(config) if field.name in before and field.default != before[field.name]
    ]
    rows = [(f"`{field.name}`", _default(field.default), _default(before[field.name])) for field in changed]
    return _table(("Setting", "Here", "In transformers"), rows)


def _config() -> Any:
    return import_module(PACKAGE).DiffusionSDPOConfig


def _setting(field: dataclasses.Field, hint: Any) -> str:
    types, choices, limits = _annotation(hint)
    text = _plain(str(field.metadata["help"]).replace("%%", "%"))
    choices = [f'`"{choice}"`' for choice in choices]
    if all(choice in text for choice in choices):  # the help explains them
        choices = []
    values = _or(choices or [f"`{name}`" for name in types])
    limit = "".join(f", {limit}" for limit in limits)
    return (
        f"### `{field.name}` {{#{field.name}}}\n\n{values}{limit}. Default: {_default(field.default)}.\n"
        f"{{.setting}}\n\n{text}"
    )


def _annotation(hint: Any) -> tuple[list[str], list[str], list[str]]:
    """Return the names of the types, the words of a `Literal` or `Choices`, and the ranges of an annotation."""
    facts = getattr(hint, "__metadata__", ())
    hint = get_args(hint)[0] if facts else hint
    members = [hint] if get_origin(hint) in (list, dict, Literal) or isinstance(hint, type) else list(get_args(hint))
    members = [member for member in members if member is not type(None)]
    choices = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    choices += [word for fact in facts for word in getattr(fact, "words", ())]
    members = [str if get_origin(member) is Literal else member for member in members]
    names = [
        member.__name__ if isinstance(member, type) and not get_args(member) else str(member) for member in members
    ]
    limits = [str(fact) for fact in facts if hasattr(fact, "interval")]
    return [name.replace("typing.", "") for name in names], choices, limits


def _default(value: Any) -> str:
    return "unset" if value is None else f"`{value!r}`".replace("'", '"')


# ---- Commands -------------------------------------------------------------------------------------------------------


def commands() -> str:
    """Return a table of the commands."""
    main = import_module(f"{PACKAGE}.cli.main")
    linked = {name: f"[`{name}`](#{name})" for name in main.COMMANDS}
    return _table(("Command", "What it does"), [(linked[name], text) for name, text in main.COMMANDS.items()])


def options(command: str, *titles: str) -> str:
    """Return a table of the options of a command, or of its sub-command of the name that follows; with titles, those of
    the groups of its help that begin so."""
    module = import_module(f"{PACKAGE}.cli.{command.replace('-', '_')}")
    if titles and titles[0] in getattr(module, "SUBCOMMANDS", {}):
        parser, titles = module.subcommand_parser(titles[0]), titles[1:]
    else:
        parser = module.make_parser()
    groups = [group for group in parser._action_groups if not titles or str(group.title).startswith(titles)]
    actions = [action for group in groups for action in group._group_actions]
    shown = [action for action in actions if action.dest != "help" and action.help is not argparse.SUPPRESS]
    return _table(("Option", "What it does"), [_option(action) for action in shown])


def _option(action: argparse.Action) -> tuple[str, str]:
    text = _sentence(_plain(str(action.help or "") % {"default": action.default, "type": "", "prog": ""}))
    if action.choices is not None and not all(str(choice) in text for choice in action.choices):
        text += f" One of {_or([f'`{choice}`' for choice in action.choices])}."
    if action.required and action.option_strings:
        text += " Required."
    elif not (action.default is None or action.default is False or "default" in text):
        text += f" Default: `{action.default}`."
    return f"`--{action.dest}`" if action.option_strings else f"`{action.metavar}`", text


# ---- Families -------------------------------------------------------------------------------------------------------


def families() -> str:
    """Return a table of the families and their defaults."""
    rows = []
    for family in _families():
        classes = "<br>".join(f"`{name}`" for name in family.pipeline_classes)
        rates = _rate(family.learning_rate_lora), _rate(family.learning_rate_full)
        link = f"[{family.name}](#{_slug(family.name)})"
        rows.append((link, classes, *rates, f"`{family.weighting_scheme}`"))
    header = "Family", "Pipeline classes", "Learning rate, LoRA", "Learning rate, all weights", "`weighting_scheme`"
    return _table(header, rows)


def lora_targets() -> str:
    """Return a table of the modules that a LoRA is added to, families with equal modules in one row."""
    named: dict[tuple[str, ...], list[str]] = {}
    for family in _families():
        modules = dict.fromkeys(re.sub(r"\.\d+\.attn", ".*.attn", name) for name in family.lora_target_modules)
        named.setdefault(tuple(modules), []).append(family.name)
    rows = [(", ".join(names), ", ".join(f"`{name}`" for name in modules)) for modules, names in named.items()]
    return _table(("Families", "LoRA targets"), rows)


def loss_defaults(field: str) -> str:
    """Return a table of beta, or of mu, by loss and kind of model."""
    tables = import_module(f"{PACKAGE}.families.loss_defaults")
    kinds = tables.STABLE_DIFFUSION_DEFAULTS, tables.DDPM_DEFAULTS, tables.FLOW_DEFAULTS
    losses = sorted({loss for kind in kinds for loss in kind} - {tables.FALLBACK})
    header = ["Loss", "Stable Diffusion", "SDXL, other DDPM", "Flow matching"]
    by_text: dict[tuple[str, ...], list[str]] = {}
    for loss in [*losses, tables.FALLBACK]:
        entries = [kind.get(loss, kind[tables.FALLBACK]) for kind in kinds]
        cells = [f"{getattr(entry, field):g}" for entry in entries]
        if field == "beta":
            cells.append(f"{entries[-1].beta_for(full=False):g}")
        by_text.setdefault(tuple(cells), []).append("all others" if loss == tables.FALLBACK else f"`{loss}`")
    if field == "beta":
        header[-1:] = ["Flow matching, all weights", "Flow matching, LoRA"]
    return _table(header, [(", ".join(names), *cells) for cells, names in by_text.items()])


def _families() -> Iterator[Any]:
    known = import_module(f"{PACKAGE}.families").FAMILIES
    for path in dict.fromkeys(known.values()):
        module, _, name = path.partition(":")
        yield getattr(import_module(module), name)


# ---- Files ----------------------------------------------------------------------------------------------------------


def file(name: str) -> str:
    """Return a Markdown file of the repository's root. Links into `docs` lead to its pages, others become code."""
    text = (ROOT / f"{name}.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
    return re.sub(r"\[(`?)([^\]`]+)`?\]\((?!https?:|#|[\w-]+\.md)[^)]+\)", r"`\2`", text)


# ---- Markdown -------------------------------------------------------------------------------------------------------


PARTS = {
    "file": file,
    "settings": settings,
    "changed_defaults": changed_defaults,
    "commands": commands,
    "options": options,
    "families": families,
    "lora_targets": lora_targets,
    "loss_defaults": loss_defaults,
}


def _table(header: Any, rows: Any) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Return help as Markdown: references to classes become code, and line breaks spaces."""
    return re.sub(r"\[`~?(?:[\w.]+\.)?(\w+)`\](?!\()", r"`\1`", " ".join(text.split()))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', ')')) else '.'}"


def _rate(value: float) -> str:
    return re.sub(r"e-0", "e-", f"{value:.0e}")


def _or(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _slug(heading: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


class WriteParts(Preprocessor):
    """Replaces markers by the parts that they ask for."""

    def run(self, lines: list[str]) -> list[str]:
        return [new for line in lines for new in _replaced(line)]


def _replaced(line: str) -> list[str]:
    asked = MARKER.match(line)
    return [line] if asked is None else part(asked[1], *asked[2].split()).splitlines()


class GeneratedExtension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(WriteParts(md), "generated", 40)  # before all others


def makeExtension(**given: Any) -> GeneratedExtension:  # noqa: N802, the name that Markdown asks for
    return GeneratedExtension(**given)

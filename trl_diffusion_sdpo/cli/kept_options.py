"""Help and option names of `train`, kept in the user's cache folder: reading them from transformers takes seconds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from ..utils.files import file_facts, json_object, user_cache, write_atomically
from . import launch
from .options import OneLineParser, option_name, refuse_unknown
from .train_parser import EXAMPLES, HELP, read_given, refuse_launch_options

PACKAGE = Path(__file__).parents[1]
DECLARED = {  # library -> its file that declares options
    "accelerate": "accelerate/commands/launch.py",
    "transformers": "transformers/training_args.py",
    "trl": "trl/trainer/model_config.py",
}
PAGES = 10  # the most layouts of the help that are kept, such as for other widths of the terminal


def answer_early(arguments: list[str], prog: str | None) -> bool:
    """Print the help if the command line asks for it, or refuse a mistyped option, before slow imports.

    It knows the options from an earlier call with the same versions of all libraries. Without one, it does nothing, and
    the parser answers.

    Returns:
        `bool`: Whether it printed the help.

    Raises:
        `UserError`: If an option of the command line or of its YAML file does not exist.
    """
    settings, accelerate_config, typed = read_given(arguments)
    kept = _read()
    if kept is None:
        return False
    if HELP & set(typed):
        text = kept["help"].get(_page(prog))
        print(text or "", end="")
        return text is not None
    options = {*kept["options"], *kept["former"]}
    words = [word for word in (*(f"--{name}" for name in settings), *typed) if option_name(word) not in options]
    others = [word for word in words if option_name(word) is not None]
    if accelerate_config is None:
        refuse_launch_options(others, kept["launcher"])
        refuse_unknown(others, kept["options"])
    else:
        unknown = [word for word in others if option_name(word) not in kept["launcher"]]
        refuse_unknown(unknown, [*kept["launcher"], *kept["options"]])
    return False


def keep(make_parser: Callable[[str | None], OneLineParser], prog: str | None) -> None:
    """Keep a parser's help and options for [`answer_early`], unless they are kept already."""
    kept = _read() or {"help": {}}
    if _page(prog) in kept["help"]:
        return
    parser = make_parser(prog)
    content = {
        "sources": _sources(),
        "options": sorted({name.replace("-", "_") for name in parser.names()}),
        "former": parser.former_names(),
        "launcher": sorted(launch.launch_options()),
        "help": {**dict(list(kept["help"].items())[1 - PAGES :]), _page(prog): parser.format_help()},
    }
    with contextlib.suppress(OSError):  # such as in a read-only home folder
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_file(), json.dumps(content).encode())


def _read() -> dict[str, Any] | None:
    """Return what is kept if it is of today's files and versions."""
    try:
        kept = json_object(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept if kept.get("sources") == _sources() else None


def _file() -> Path:
    environment = hashlib.sha256(str(PACKAGE).encode()).hexdigest()[:16]
    return user_cache() / "options" / f"{environment}.json"


def _page(prog: str | None) -> str:
    """Return what the layout of the help depends on."""
    return f"{prog} {shutil.get_terminal_size().columns} {sys.stdout.isatty()}"


def _sources() -> dict[str, Any]:
    """Return what the options depend on: versions of libraries, and the files of this package that declare some."""
    folders = {PACKAGE / "cli": "py", PACKAGE / "trainer/config": "py"}
    folders |= dict.fromkeys((*EXAMPLES, launch.CONFIGS), "yaml")
    files = [file for folder, ending in folders.items() for file in folder.glob(f"[!.]*.{ending}")]
    versions = {}
    for name, declares in DECLARED.items():
        installed = distribution(name)
        versions[name] = installed.version
        file = Path(str(installed.locate_file(declares)))
        files += [file] if file.is_file() else []  # which may change under one version, as in a clone of the library
    return {"python": sys.version, **versions, "files": sorted(map(file_facts, files))}

"""Rules between the folders of the package: imports go down, formulas are in `losses`, questions about the engine
are in `engines`, errors are for users, only the command line prints, and private names of other libraries are in
`utils/_compat.py`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_diffusion_sdpo"

# From the roof to the ground. A room may import the rooms after it, so no room of the trainer imports a tool.
ROOMS = """
    cli
    tools/demo tools/planning
    tools/pairing tools/evaluation
    tools/guidance tools/rewards
    trainer
    reporting cache saving
    step
    models
    engines
    data families losses
    utils
""".split()
# The scorers that `sample_scorers` names are imported when a run starts.
IMPORTS_TOOLS = "reporting/sample_scores.py"
ENGINE_MODULES = ("deepspeed", "transformers.integrations", "torch.distributed")
LAUNCHER = "torch.distributed.elastic"  # how a launched process has ended, whatever engine it ran
LOSS_FUNCTIONS = set(
    "logsigmoid softplus mse_loss l1_loss smooth_l1_loss huber_loss square expm1 log1p dot vdot".split()
)
COMPAT = "utils/_compat.py"
TRAINER = "trainer/diffusion_sdpo_trainer.py"  # tests/trainer/test_borrowed_names.py checks its private names
STANDARD_LIBRARY = ("_actions", "_asdict", "_exit", "_replace")  # of argparse, named tuples and os
WITHOUT_FORMULAS = ("cli", "tools/guidance", "models", "reporting", "saving", "step", "trainer")

Sources = dict[str, str]


def package_sources() -> Sources:
    return {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}


def room(path: str) -> str:
    return re.match(r"(tools/)?\w+", path)[0]


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each import, at any depth, for type checkers too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                folders = [PACKAGE.name, *path.split("/")[:-1]]
                base = [*folders[: len(folders) - node.level + 1], *base]
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def upward_imports(sources: Sources) -> list[str]:
    wrong = []
    for path, source in sources.items():
        if room(path) in ("__init__", "__main__", "tools/__init__"):
            continue
        if room(path) not in ROOMS:
            wrong.append(f"{path} is in a room that the list does not have")
            continue
        for line, name in imports(path, source):
            package, _, inside = name.partition(".")
            imported = room(inside.replace(".", "/") or "__init__")
            if package != PACKAGE.name or imported not in ROOMS:
                continue
            is_allowed = path == IMPORTS_TOOLS and imported.startswith("tools/")
            if ROOMS.index(imported) < ROOMS.index(room(path)) and not is_allowed:
                wrong.append(f"{path}:{line} imports {name}, which is above it")
    return wrong


def calls(sources: Sources) -> Iterator[tuple[str, str, str]]:
    """Room, place and name of the function of each call."""
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                yield room(path), f"{path}:{node.lineno}", ast.unparse(node.func)


def engine_questions(sources: Sources) -> list[str]:
    return [
        f"{path}:{line} imports {name}"
        for path, source in sources.items()
        if room(path) not in ("engines", "utils")
        for line, name in imports(path, source)
        if name.startswith(ENGINE_MODULES) and not name.startswith(LAUNCHER)
    ]


def formulas_outside_losses(sources: Sources) -> list[str]:
    return [
        f"{place} calls {name}"
        for of_room, place, name in calls(sources)
        if of_room in WITHOUT_FORMULAS and name.rpartition(".")[2] in LOSS_FUNCTIONS
    ]


def prints_outside_the_command_line(sources: Sources) -> list[str]:
    return [f"{place} prints" for of_room, place, name in calls(sources) if of_room != "cli" and name == "print"]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value  # a key of `self.__dict__`


def private_names_of_libraries(sources: Sources) -> list[str]:
    """Private imports, and private attributes that neither the package (on `self`) nor the module (else) defines."""
    trees = {path: ast.parse(source) for path, source in sources.items() if path != COMPAT}
    of_package = {name for tree in trees.values() for name in defined_names(tree)}
    wrong = []
    for path, tree in trees.items():
        for line, name in imports(path, sources[path]):
            if not name.startswith(PACKAGE.name) and any(map(is_private, name.split("."))):
                wrong.append(f"{path}:{line} imports {name}")
        of_module = {*defined_names(tree), *STANDARD_LIBRARY}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not is_private(node.attr) or node.attr in of_module:
                continue
            on_self = ast.unparse(node.value) in ("self", "cls", "super()")
            if not on_self or (node.attr not in of_package and path != TRAINER):
                wrong.append(f"{path}:{node.lineno} uses {ast.unparse(node)}")
    return wrong


def errors_that_are_not_for_users(sources: Sources) -> list[str]:
    """The command line shows the message of a `UserError`, and the traceback of every other error."""
    builtin = ("ValueError", "FloatingPointError", "OSError")
    return [f"{place} makes a {name}" for _, place, name in calls(sources) if name in builtin]


RULES = {
    "upward": (upward_imports, {"step/a.py": "from ..tools.rewards import b"}),
    "engines": (engine_questions, {"step/a.py": "def f():\n    import deepspeed"}),
    "formulas": (formulas_outside_losses, {"step/a.py": "x = torch.dot(a, b)"}),
    "private imports": (private_names_of_libraries, {"step/a.py": "from torch._dynamo import reset"}),
    "private names": (private_names_of_libraries, {"step/a.py": "x = stream._state"}),
    "inherited private names": (
        private_names_of_libraries,
        {"data/a.py": "class A(B):\n    f = lambda self: self._b"},
    ),
    "errors": (errors_that_are_not_for_users, {"data/a.py": "def f():\n    raise ValueError('too few rows')"}),
    "prints": (prints_outside_the_command_line, {"saving/a.py": "print(1)"}),
}


@pytest.mark.parametrize("name", RULES)
def test_the_package_keeps_the_rule(name):
    rule, planted = RULES[name]
    assert rule(planted), "The rule does not see what it is there for."
    wrong = rule(package_sources())
    assert not wrong, "\n".join(wrong)

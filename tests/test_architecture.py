"""The rules of the house: imports go down, each room touches what it may, and nothing that makes code brittle."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_diffusion_sdpo"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
IDS = [str(path.relative_to(PACKAGE)) for path in FILES]

# Room -> its floor. The package's own __init__ is above all.
FLOORS = {
    "_compat": 0,
    "import_utils": 0,
    "suggestions": 0,
    "switch_words": 0,
    "data": 1,
    "families": 1,
    "losses": 1,
    "rewards": 1,
    "trainer": 2,
    "evaluation": 2,
    "cli": 3,
    "demo": 3,
}
# On one floor: the callbacks draw and score, and the demo is one of the commands.
SIDEWAYS = {("trainer/callbacks.py", "evaluation"), ("cli/demo.py", "demo")}
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
FAMILY_LINES = range(60, 151)  # data and a few hooks; more would be a room of its own
# Of the families' room, what families share.
SHARED_BY_FAMILIES = {"__init__.py", "base.py", "noise.py", "packing.py", "timestep_sampling.py", "lora_keys.py"}

every_file = pytest.mark.parametrize("path", FILES, ids=IDS)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path, tree: ast.AST) -> list[str]:
    """Absolute names of all modules that a file imports, at any depth."""
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute_name(path, node)
            modules += [base] if node.module else [f"{base}.{alias.name}" for alias in node.names]
    return modules


def absolute_name(path: Path, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module
    package = path.relative_to(ROOT).parent.parts
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def imported_rooms(path: Path) -> set[str]:
    names = [module.split(".") for module in imported_modules(path, TREES[path])]
    return {parts[1] for parts in names if parts[0] == PACKAGE.name and len(parts) > 1}


def identifiers(tree: ast.AST) -> list[tuple[str, ast.AST]]:
    found = []
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                found.append((value, node))
    return found


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def called_names(tree: ast.AST) -> set[str]:
    """`f` of `f(...)`, and `.g` of `anything.g(...)`."""
    functions = [call.func for call in calls(tree)]
    plain = {function.id for function in functions if isinstance(function, ast.Name)}
    return plain | {f".{function.attr}" for function in functions if isinstance(function, ast.Attribute)}


def waits_for_the_accelerator(tree: ast.AST) -> list[int]:
    """Lines with `tensor.item()`; a method `item` with arguments is another one."""
    found = [call for call in calls(tree) if isinstance(call.func, ast.Attribute) and call.func.attr == "item"]
    return [call.lineno for call in found if not call.args and not call.keywords]


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def lines_without_docstring(function: ast.FunctionDef) -> int:
    length = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        length -= docstring.end_lineno - docstring.lineno + 1
    return length


def test_the_rooms_are_those_of_the_plan():
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms <= set(FLOORS), f"a room without a floor: {rooms - set(FLOORS)}"


@every_file
def test_imports_go_down_only(path):
    own = room_of(path)
    if own == "__init__":
        return
    here = path.relative_to(PACKAGE).as_posix()
    others = {room for room in imported_rooms(path) if room in FLOORS and room != own}
    wrong = {room for room in others if FLOORS[room] >= FLOORS[own] and (here, room) not in SIDEWAYS}
    assert not wrong, f"{here} imports {wrong}, on its own floor or above"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "losses"], ids=lambda p: p.name)
def test_losses_import_torch_and_the_standard_library_only(path):
    modules = {module.split(".")[0] for module in imported_modules(path, TREES[path])}
    assert modules <= {"torch", PACKAGE.name} | sys.stdlib_module_names
    assert imported_rooms(path) <= {"losses"}


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "data"], ids=lambda p: p.name)
def test_data_imports_no_model_library(path):
    modules = {module.split(".")[0] for module in imported_modules(path, TREES[path])}
    assert not modules & {"diffusers", "transformers", "peft", "accelerate", "trl"}


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "families"], ids=lambda p: p.name)
def test_families_know_no_preference(path):
    forbidden = {"winner", "loser", "chosen", "rejected", "reference", "ref"}
    named = {name for name, _ in identifiers(TREES[path]) if forbidden & set(name.lower().split("_"))}
    assert not named


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "families"], ids=lambda p: p.name)
def test_families_hold_beta_as_data_only(path):
    """As a field of `LossDefaults` and where one is made; no code of a family reads it."""
    tree = TREES[path]
    holders = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "LossDefaults"]
    makers = [call for call in calls(tree) if isinstance(call.func, ast.Name) and call.func.id == "LossDefaults"]
    allowed = {id(part) for node in [*holders, *makers] for part in ast.walk(node)}
    assert not [node.lineno for name, node in identifiers(tree) if name == "beta" and id(node) not in allowed]


def test_a_family_is_a_short_file():
    files = [path for path in FILES if room_of(path) == "families" and path.name not in SHARED_BY_FAMILIES]
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len(lengths) > 2
    assert not {name: length for name, length in lengths.items() if length not in FAMILY_LINES}


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "trainer"], ids=lambda p: p.name)
def test_the_trainer_names_no_family(path):
    names = {name for name, _ in identifiers(TREES[path])}
    assert not {name for name in names if name.startswith(("StableDiffusion", "Flux", "SanaPipeline"))}
    assert not {m for m in imported_modules(path, TREES[path]) if m.startswith(f"{PACKAGE.name}.families.stable")}


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "trainer"], ids=lambda p: p.name)
def test_two_files_of_the_trainer_know_that_engines_differ(path):
    """One for gradients, one for weights."""
    if path.name in ("branch_backward.py", "sharding.py"):
        return
    engines = ("deepspeed", "transformers.integrations", "torch.distributed.fsdp", "torch.distributed.tensor")
    assert not [module for module in imported_modules(path, TREES[path]) if module.startswith(engines)]
    assert "DistributedType" not in {name for name, _ in identifiers(TREES[path])}


@every_file
def test_nothing_probes_swallows_or_unpickles(path):
    assert not called_names(TREES[path]) & {"hasattr", "eval", "exec", "breakpoint"}
    assert not waits_for_the_accelerator(TREES[path])
    loads = [
        call for call in calls(TREES[path]) if ast.unparse(call.func) in ("torch.load", "pickle.load", "pickle.loads")
    ]
    assert not loads
    handlers = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.ExceptHandler)]
    assert not [node.lineno for node in handlers if node.type is None], "a bare except"
    names = {name for name, _ in identifiers(TREES[path])}
    assert not names & {"NotImplementedError", "BaseException"}


@every_file
def test_only_the_command_line_prints_and_exits(path):
    if room_of(path) == "cli":
        return
    assert "print" not in called_names(TREES[path])
    assert not [call for call in calls(TREES[path]) if ast.unparse(call.func) in ("sys.exit", "exit", "quit")]


@every_file
def test_a_file_begins_with_what_it_is_for(path):
    assert ast.get_docstring(TREES[path])


@every_file
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    long = {f.name: lines_without_docstring(f) for f in functions(TREES[path])}
    assert not {name: lines for name, lines in long.items() if lines > MAX_FUNCTION_LINES}


def test_no_file_names_a_place_on_a_machine():
    home = re.compile(r"(?<![\w./:-])/(" + "|".join(["work", "tmp", "root", "home", "Users"]) + r")/(?!someone)\w")
    texts = [path for path in project_files() if home.search(path.read_text(encoding="utf-8"))]
    assert not texts


def test_no_file_is_left_unfinished():
    mark = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]) + r")\b")
    assert not [path for path in project_files() if mark.search(path.read_text(encoding="utf-8"))]


def project_files() -> list[Path]:
    """The project's own text files, without what tools leave in hidden folders."""
    folders = [ROOT / name for name in (PACKAGE.name, "tests", "examples", "docs", "benchmarks")]
    inside = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    visible = [path for path in inside if not any(part.startswith((".", "__")) for part in path.parent.parts)]
    beside = [path for path in [*ROOT.glob("*"), ROOT / ".ci" / "run"] if path.is_file()]
    suffixes = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".cfg", ""}
    return [path for path in [*visible, *beside] if path.suffix in suffixes]

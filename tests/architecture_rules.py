"""The rules of the house as functions from the package's files to what breaks them; `test_architecture.py` holds them.

Every rule takes the files by their path within the package, so that a test can plant a violation, and returns one
message for each violation, which begins with the file.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PACKAGE = "trl_diffusion_sdpo"

# Room -> its floor; imports go to lower floors. The package's own `__init__` is above all.
GROUND = ("_compat", "derangement", "files", "import_utils", "masking", "own_errors", "suggestions", "switch_words")
FLOORS = {
    **dict.fromkeys(GROUND, 0),
    **dict.fromkeys(("data", "families", "losses", "rewards", "sources"), 1),
    **dict.fromkeys(("cache", "engines", "scoring"), 2),
    **dict.fromkeys(("artifacts", "evaluation", "guidance", "models", "planning", "runs", "settings", "step"), 3),
    "trainer": 4,
    **dict.fromkeys(("cli", "demo"), 5),
}
# Imports on one floor. `artifacts` and `step` know the networks, `runs` also the files, and a plan runs a step on
# networks without data; the demo is a command.
TIES = {
    ("step", "models"),
    ("artifacts", "models"),
    ("guidance", "models"),
    ("runs", "artifacts"),
    ("runs", "models"),
    ("planning", "models"),
    ("planning", "step"),
    ("cli", "demo"),
    ("data", "sources"),
}
NOT_EVEN_DOWN = {("evaluation", "engines")}

# What families share, beside the families.
SHARED_BY_FAMILIES = (
    *("__init__.py", "base.py", "inversion.py", "loss_defaults.py", "lora_keys.py", "noise.py", "packing.py"),
    *("model_files.py", "pipelines.py", "registry.py", "single_file.py", "timestep_sampling.py", "unet_checks.py"),
)
FAMILY_LINES = range(20, 151)  # data and a few hooks; more would be a room of its own
FUNCTION_LINES, FILE_LINES, ROOM_FILES = 40, 400, 10
ROOMS_OF_ANY_SIZE = ("cli", "families", "losses", "rewards")  # a file for each command, family, formula, scorer

ENGINE_MODULES = ("deepspeed", "transformers.integrations", "torch.distributed", "accelerate.utils.deepspeed")
LAUNCHER = "torch.distributed.elastic"  # how a launched process has ended, whatever engine it ran
ENGINE_WORDS = ("deepspeed", "fsdp", "zero_stage", "zero3", "DTensor", "DistributedType", "distributed_type")
# Calls that are mathematics on tensors; `log` only where it takes one, as `Trainer.log` is another.
FORMULAS = set(
    "square pow exp expm1 exp2 log1p log2 log10 sqrt rsqrt sigmoid logsigmoid softplus softmax log_softmax relu tanh "
    "erf ndtri mse_loss l1_loss smooth_l1_loss huber_loss norm vector_norm dot vdot inner lerp lerp_ addcmul addcdiv "
    "cosine_similarity var std".split()
)
ROOMS_WITHOUT_FORMULAS = ("artifacts", "cli", "evaluation", "guidance", "models", "runs", "scoring", "step", "trainer")
ROOMS_THAT_TRAIN = ("demo", "engines", "losses", "planning", "step")  # a plan walks the graph of fake tensors
# Names that begin with an underscore and are public: of named tuples, and `os._exit`.
PUBLIC_UNDERSCORES = {"_replace", "_asdict", "_fields", "_make", "_exit"}
PREFERENCE_WORDS = {"winner", "loser", "chosen", "rejected", "reference", "ref"}


@dataclass(frozen=True)
class File:
    """A file of the package."""

    path: str
    source: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @functools.cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @property
    def room(self) -> str:
        return self.path.split("/")[0].removesuffix(".py")

    @property
    def module(self) -> str:
        """Its absolute name; a room's `__init__` is the room."""
        parts = PurePosixPath(self.path).with_suffix("").parts
        return ".".join([PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)])

    @functools.cached_property
    def imports(self) -> list[tuple[str, int]]:
        """Absolute names of all that is imported, at any depth and for type checkers too: modules, or names in them."""
        found = []
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found += [(alias.name, node.lineno) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node)
                found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
        return found

    def _base(self, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        package = [PACKAGE, *PurePosixPath(self.path).parent.parts]
        return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])

    @functools.cached_property
    def identifiers(self) -> list[tuple[str, ast.AST]]:
        """Names that are read, written, defined, passed or imported."""
        fields = ("id", "attr", "arg", "name", "asname")
        values = [(getattr(node, field, None), node) for node in self.nodes for field in fields]
        return [(value, node) for value, node in values if isinstance(value, str)]

    @functools.cached_property
    def calls(self) -> list[ast.Call]:
        return [node for node in self.nodes if isinstance(node, ast.Call)]

    def functions(self) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        """With their names as `Class.method`."""
        yield from _functions(self.tree, "")

    def at(self, node: ast.AST | int, what: str) -> str:
        return f"{self.path}:{node if isinstance(node, int) else node.lineno} {what}"


Files = dict[str, File]
Rule = Callable[[Files], list[str]]


def files_of(sources: dict[str, str]) -> Files:
    return {path: File(path, source) for path, source in sources.items()}


def read_package(folder: Path) -> Files:
    paths = sorted(folder.rglob("*.py"))
    return files_of({path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in paths})


def rules() -> dict[str, Rule]:
    """All rules by their names."""
    prefix = "violations_of_"
    found = {name.removeprefix(prefix): rule for name, rule in globals().items() if name.startswith(prefix)}
    return dict(sorted(found.items()))


# ---- Imports -------------------------------------------------------------------------------------------------------


def violations_of_floors(files: Files) -> list[str]:
    """Every room has a floor, and imports go to lower floors, or along the ties of one floor."""
    found = [f"{file.path} is in a room without a floor" for file in files.values() if not _has_floor(file)]
    for file in files.values():
        if file.room not in FLOORS:
            continue
        for name, line in file.imports:
            parts = name.split(".")
            if parts[0] != PACKAGE or parts[1:2] == [file.room]:
                continue
            other = parts[1] if len(parts) > 1 else ""
            down = other in FLOORS and FLOORS[other] < FLOORS[file.room] and (file.room, other) not in NOT_EVEN_DOWN
            if not (down or (file.room, other) in TIES or other == "__version__"):
                found.append(file.at(line, f"{file.room} may not import {name}"))
    return found


def violations_of_circles(files: Files) -> list[str]:
    """No module imports itself over others, for type checkers or within a function either."""
    modules = {file.module: file for file in files.values()}
    graph = {
        module: sorted({_module_of(name, modules) for name, _ in file.imports} - {"", module})
        for module, file in modules.items()
    }
    found, done = [], set()
    for module in graph:
        circle = _circle(module, graph, done)
        if circle:
            found.append(f"{modules[circle[0]].path} imports itself: {' -> '.join(circle)}")
    return found


def violations_of_torch_only_losses(files: Files) -> list[str]:
    allowed = {"torch", PACKAGE} | sys.stdlib_module_names - {"logging", "warnings"}
    return [
        file.at(line, f"losses may not import {name}")
        for file in files.values()
        for name, line in file.imports
        if file.room == "losses" and name.split(".")[0] not in allowed
    ]


def violations_of_data_without_models(files: Files) -> list[str]:
    libraries = {"diffusers", "transformers", "peft", "accelerate", "trl"}
    return [
        file.at(line, f"data may not import {name}")
        for file in files.values()
        for name, line in file.imports
        if file.room in ("data", "sources") and name.split(".")[0] in libraries
    ]


def violations_of_config_in_the_trainer(files: Files) -> list[str]:
    """Rooms below the trainer are handed plain values."""
    return [
        file.at(node, f"names {name}")
        for file in files.values()
        for name, node in _names_and_annotations(file)
        if FLOORS.get(file.room, 9) < FLOORS["trainer"] and "DiffusionSDPOConfig" in name
    ]


# ---- Who knows what ------------------------------------------------------------------------------------------------


def violations_of_engine_questions(files: Files) -> list[str]:
    """Only `engines` knows which engine runs; a name that is imported from there may be called."""
    found = []
    for file in files.values():
        if file.room in ("engines", *GROUND):
            continue
        answers = {name.rsplit(".", 1)[1] for name, _ in file.imports if name.startswith(f"{PACKAGE}.engines.")}
        found += [
            file.at(line, f"imports {name}")
            for name, line in file.imports
            if name.startswith(ENGINE_MODULES) and not name.startswith(LAUNCHER)
        ]
        found += [
            file.at(node, f"asks for {name}")
            for name, node in [*file.identifiers, *_attribute_words(file)]
            if name not in answers and any(word in name for word in ENGINE_WORDS)
        ]
        found += [
            file.at(node, "asks torch.distributed")
            for node in file.nodes
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
        ]
    return found


def violations_of_formulas(files: Files) -> list[str]:
    """Mathematics is done in `losses` (of noise in `families`, of gradients in `engines`)."""
    return [
        file.at(node, f"computes {ast.unparse(node)[:60]}")
        for file in files.values()
        for node in file.nodes
        if file.room in ROOMS_WITHOUT_FORMULAS and _is_formula(node)
    ]


def violations_of_one_mean_squared_error(files: Files) -> list[str]:
    """A mean over squares is taken by `losses.pair_terms.mean_error` alone."""
    home = files.get("losses/pair_terms.py")
    inside = {
        id(node)
        for name, function in (home.functions() if home else ())
        if name == "mean_error"
        for node in ast.walk(function)
    }
    return [
        file.at(node, f"is a mean squared error: {ast.unparse(node)[:60]}")
        for file in files.values()
        for node in file.calls
        if id(node) not in inside and _is_mean_of_squares(node)
    ]


def violations_of_private_names(files: Files) -> list[str]:
    """`x._name` only where the file itself defines `_name`; `_compat` is the one way to those of other libraries."""
    found = []
    for file in files.values():
        if file.room == "_compat":
            continue
        own = _defined_names(file)
        for node in file.nodes:
            if isinstance(node, ast.Attribute) and _is_private(node.attr):
                if node.attr not in own and not _is_self(node.value):
                    found.append(file.at(node, f"reads {ast.unparse(node)}"))
            elif isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names if _is_private(alias.name)]
                found += [file.at(node, f"imports {name}") for name in names if name != "_compat"]
        found += [
            file.at(node, f"reads {word!r} of another object")
            for word, node in _attribute_words(file)
            if word[0] == "_"
        ]
    return found


def violations_of_collaborators(files: Files) -> list[str]:
    """Objects of the rooms below are handed what they need, not the trainer; mixins are for its overrides."""
    found = []
    for file in files.values():
        if file.room in ("trainer", "cli", "demo"):
            continue
        for node in file.nodes:
            if isinstance(node, ast.arg):
                kind = "" if node.annotation is None else ast.unparse(node.annotation)
                if node.arg == "trainer" or re.search(r"Trainer\b", kind):
                    found.append(file.at(node, f"takes the trainer as {node.arg!r}"))
            elif isinstance(node, ast.ClassDef) and node.name.endswith("Mixin"):
                found.append(file.at(node, f"{node.name} is a mixin"))
    return found


def violations_of_training_rooms(files: Files) -> list[str]:
    """Files, plots, networks and settings never train."""
    return [
        file.at(call, f"trains: {ast.unparse(call.func)}")
        for file in files.values()
        for call in file.calls
        if file.room not in ROOMS_THAT_TRAIN
        and (_called(call) == "backward" or ast.unparse(call.func) in ("torch.autograd.grad", "autograd.grad"))
    ]


def violations_of_families_without_preferences(files: Files) -> list[str]:
    """A family never knows winners, losers or a reference, and holds `beta` as data in `LossDefaults` alone."""
    found = []
    for file in files.values():
        if file.room != "families":
            continue
        defaults = [
            node
            for node in file.nodes
            if (isinstance(node, ast.ClassDef) and node.name == "LossDefaults")
            or (isinstance(node, ast.Call) and _called(node) == "LossDefaults")
        ]
        allowed = {id(part) for node in defaults for part in ast.walk(node)}
        for name, node in file.identifiers:
            if PREFERENCE_WORDS & set(name.lower().split("_")) or (name == "beta" and id(node) not in allowed):
                found.append(file.at(node, f"names {name}"))
    return found


def violations_of_families_of_their_own(files: Files) -> list[str]:
    """A family is 20 to 150 lines and inherits from no other family."""
    found = []
    for file in files.values():
        name = PurePosixPath(file.path).name
        if file.room != "families" or name in SHARED_BY_FAMILIES:
            continue
        lines = len(file.source.splitlines())
        if lines not in FAMILY_LINES:
            found.append(f"{file.path} has {lines} lines")
        families = {_stem(n) for n, _ in file.imports if n.startswith(f"{PACKAGE}.families.")} - {
            PurePosixPath(shared).stem for shared in SHARED_BY_FAMILIES
        }
        found += [f"{file.path} imports the family {family}" for family in sorted(families)]
    return found


def violations_of_a_trainer_for_all_families(files: Files) -> list[str]:
    """The trainer names no family."""
    shared = {PurePosixPath(name).stem for name in SHARED_BY_FAMILIES}
    found = []
    for file in files.values():
        if file.room != "trainer":
            continue
        modules = [(name, line) for name, line in file.imports if name.startswith(f"{PACKAGE}.families.")]
        found += [
            file.at(line, f"imports {name}")
            for name, line in modules
            if _stem(name).islower() and _stem(name) not in shared and f"families/{_stem(name)}.py" in files
        ]
        words = ("StableDiffusion", "Flux", "Sana", "PixArt", "QwenImage", "Wan")
        found += [file.at(node, f"names {name}") for name, node in file.identifiers if name.startswith(words)]
    return found


# ---- Code ----------------------------------------------------------------------------------------------------------


def violations_of_honest_code(files: Files) -> list[str]:
    """Nothing probes, swallows, unpickles or waits for the accelerator."""
    found = []
    for file in files.values():
        for call in file.calls:
            called = ast.unparse(call.func)
            if called in ("hasattr", "eval", "exec", "breakpoint", "torch.load", "pickle.load", "pickle.loads"):
                found.append(file.at(call, f"calls {called}"))
            if _called(call) == "item" and isinstance(call.func, ast.Attribute) and not (call.args or call.keywords):
                found.append(file.at(call, "waits for the accelerator with .item()"))
        for node in file.nodes:
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                found.append(file.at(node, "has a bare except"))
        names = ("NotImplementedError", "BaseException")
        found += [file.at(node, f"names {name}") for name, node in file.identifiers if name in names]
    return found


def violations_of_quiet_rooms(files: Files) -> list[str]:
    """Only the command line prints and exits."""
    words = ("print", "sys.exit", "exit", "quit")
    return [
        file.at(call, f"calls {ast.unparse(call.func)}")
        for file in files.values()
        for call in file.calls
        if file.room != "cli" and ast.unparse(call.func) in words
    ]


def violations_of_docstrings(files: Files) -> list[str]:
    return [f"{file.path} does not say what it is for" for file in files.values() if not ast.get_docstring(file.tree)]


# ---- Sizes ---------------------------------------------------------------------------------------------------------


def violations_of_sizes(files: Files) -> list[str]:
    """Functions of at most 40 lines of code, files of 400 lines, rooms of ten files beside their `__init__`."""
    found: dict[str, int] = {}
    rooms: Counter[str] = Counter()
    for file in files.values():
        lines = len(file.source.splitlines())
        if lines > FILE_LINES:
            found[file.path] = lines
        if "/" in file.path and not file.path.endswith("__init__.py"):
            rooms[file.room] += 1
        lengths = {name: lines_of_code(file.source, function) for name, function in file.functions()}
        found |= {f"{file.path}::{name}": length for name, length in lengths.items() if length > FUNCTION_LINES}
    large = {room: number for room, number in rooms.items() if number > ROOM_FILES and room not in ROOMS_OF_ANY_SIZE}
    return [f"{what} has {size}" for what, size in {**found, **{f"{room}/": n for room, n in large.items()}}.items()]


def lines_of_code(source: str, function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without docstring, comments and empty lines; with the signature."""
    lines = source.splitlines()
    numbers = set(range(function.lineno, function.end_lineno + 1))
    if ast.get_docstring(function) is not None:
        numbers -= set(range(function.body[0].lineno, function.body[0].end_lineno + 1))
    texts = [lines[number - 1].strip() for number in numbers]
    return sum(1 for text in texts if text and not text.startswith("#"))


# ---- Helpers -------------------------------------------------------------------------------------------------------


def _has_floor(file: File) -> bool:
    return file.room in FLOORS or file.path in ("__init__.py", "__main__.py")


def _module_of(name: str, modules: dict[str, File]) -> str:
    """The module of the package that an imported name is or comes from; nothing of other packages."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def _circle(start: str, graph: dict[str, list[str]], done: set[str], way: tuple[str, ...] = ()) -> list[str]:
    """Modules from `start` on that lead back to one of them, unless all of them were looked at before."""
    if start in way:
        return [*way[way.index(start) :], start]
    if start in done:
        return []
    for following in graph[start]:
        circle = _circle(following, graph, done, (*way, start))
        if circle:
            done |= set(circle)
            return circle
    done.add(start)
    return []


def _functions(tree: ast.AST, outer: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        inner = outer
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inner = f"{outer}.{node.name}" if outer else node.name
            if not isinstance(node, ast.ClassDef):
                yield inner, node
        yield from _functions(node, inner)


def _names_and_annotations(file: File) -> list[tuple[str, ast.AST]]:
    """Identifiers, what is imported, and annotations that are strings."""
    kinds = [getattr(node, field, None) for node in file.nodes for field in ("annotation", "returns")]
    strings = [
        (part.value, part)
        for kind in kinds
        if isinstance(kind, ast.AST)
        for part in ast.walk(kind)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]
    imported = [
        (alias.name, node)
        for node in file.nodes
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    ]
    return [(name, node) for name, node in file.identifiers if not isinstance(node, ast.alias)] + strings + imported


def _attribute_words(file: File) -> list[tuple[str, ast.AST]]:
    """Names of attributes that are asked for as strings, of other objects than `self`."""
    asked = [call for call in file.calls if _called(call) in ("getattr", "setattr", "delattr", "attrgetter")]
    return [
        (part.value, call)
        for call in asked
        if not (call.args and _is_self(call.args[0]))
        for part in call.args[:2]
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value
    ]


def _called(call: ast.Call) -> str:
    """`f` of `f(...)` and of `anything.f(...)`."""
    return getattr(call.func, "id", None) or getattr(call.func, "attr", "")


def _is_formula(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return not isinstance(node.left, ast.Constant)  # a power of two is a number
    if not isinstance(node, ast.Call):
        return False
    if _called(node) == "log":
        module = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) in ("math", "torch", "np")
        return module or not (node.args or node.keywords)
    return _called(node) in FORMULAS


def _is_mean_of_squares(call: ast.Call) -> bool:
    if _called(call) in ("mse_loss", "MSELoss"):
        return True
    if _called(call) != "mean":
        return False
    parts = list(ast.walk(call.func.value if isinstance(call.func, ast.Attribute) else call))
    parts += [part for argument in call.args for part in ast.walk(argument)]
    squares = [part for part in parts if isinstance(part, ast.Call) and _called(part) in ("square", "pow")]
    return bool(squares or [part for part in parts if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Pow)])


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC_UNDERSCORES


def _is_self(value: ast.AST) -> bool:
    return ast.unparse(value) in ("self", "cls", "type(self)", "super()")


def _defined_names(file: File) -> set[str]:
    """Names that the file's own classes and functions have, and attributes that it sets on `self`."""
    names = {
        node.name for node in file.nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }
    for node in file.nodes:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in [part for each in targets if each is not None for part in ast.walk(each)]:
            if isinstance(target, ast.Attribute) and _is_self(target.value):
                names.add(target.attr)
            elif isinstance(target, ast.Name):
                names.add(target.id)
    return names


def _stem(name: str) -> str:
    """The part of an absolute name that names a module of a room."""
    return name.split(".")[2]

"""The private names of transformers' Trainer that we borrow are all listed, and checked at import."""

import ast
import inspect
import tomllib
from pathlib import Path

import pytest
import transformers
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from transformers import Trainer

from trl_diffusion_sdpo.trainer import DiffusionSDPOTrainer
from trl_diffusion_sdpo.utils._compat import TRAINER_NAMES, TRANSFORMERS, UnsupportedVersionError, check_trainer

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def private_names(of_class: type) -> set[str]:
    """Private methods and attributes that a class defines, calls, reads or sets on itself."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(of_class))):
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()"):
            found.add(node.attr)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def test_the_list_names_exactly_what_is_borrowed():
    borrowed = private_names(DiffusionSDPOTrainer) & private_names(Trainer)
    assert borrowed == set(TRAINER_NAMES)


def test_the_installed_trainer_has_all_names():
    check_trainer(Trainer)


@pytest.mark.parametrize("name", TRAINER_NAMES)
def test_a_name_that_transformers_no_longer_has_is_refused(name):
    source = inspect.getsource(Trainer)
    renamed = source.replace(name, f"{name}_of_tomorrow")
    names = dict(vars(inspect.getmodule(Trainer)))
    exec(compile("from __future__ import annotations\n" + renamed, "trainer.py", "exec"), names)
    with pytest.raises(UnsupportedVersionError) as refused:
        check_trainer(names["Trainer"])
    for part in (name, transformers.__version__, TRANSFORMERS):
        assert part in str(refused.value)


def test_the_supported_versions_are_those_of_the_project():
    lines = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    (supported,) = [line.specifier for line in map(Requirement, lines) if line.name == "transformers"]
    assert supported == SpecifierSet(TRANSFORMERS)
    assert {clause.operator for clause in supported} == {">=", "<"}

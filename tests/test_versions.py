"""The versions that the package says it runs with, and what is made of them."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from transformers import TrainingArguments

from trl_diffusion_sdpo.utils import _compat

ROOT = Path(__file__).parents[1]
LOWEST = runpy.run_path(str(ROOT / "tests" / "versions" / "lowest.py"))["lowest_versions"]


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_lowest_versions_are_those_of_the_project_file(tmp_path):
    file = tmp_path / "pyproject.toml"
    file.write_text(
        '[project]\ndependencies = ["numpy>=2.0", "torch>=2.6", "trl >=1.0.0,<3"]\n[project.optional-dependencies]\n'
        'deepspeed = ["deepspeed>=0.1"]\ntest = ["deepspeed>=0.1"]\n'
    )
    assert LOWEST(file) == {"numpy": "2.0", "trl": "1.0.0", "deepspeed": "0.1"}


@pytest.mark.parametrize("requirement", ["numpy", "numpy<3", "numpy>=1,>=2", "deepspeed>=0.2"])
def test_a_requirement_without_one_floor_is_refused(tmp_path, requirement):
    file = tmp_path / "pyproject.toml"
    file.write_text(
        f'[project]\ndependencies = ["torch>=2.6", "{requirement}"]\n[project.optional-dependencies]\n'
        'deepspeed = ["deepspeed>=0.1"]\ntest = []\n'
    )
    with pytest.raises(ValueError, match="must have one lowest version"):
        LOWEST(file)


def test_every_place_names_the_same_lowest_python(pyproject):
    """Classifiers, linter, README, documentation and the examples' own headers."""
    lowest = pyproject["project"]["requires-python"].removeprefix(">=")
    classifiers = re.findall(r"Python :: (3\.\d+)", " ".join(pyproject["project"]["classifiers"]))
    assert min(classifiers, key=lambda version: int(version[2:])) == lowest
    assert all(version in SpecifierSet(f">={lowest}") for version in classifiers)
    assert pyproject["tool"]["ruff"]["target-version"] == f"py{lowest.replace('.', '')}"
    for page in ("README.md", "docs/quickstart.md"):
        assert re.findall(r"Python (3\.\d+) or newer", (ROOT / page).read_text(encoding="utf-8")) == [lowest]
    for script in (ROOT / "examples" / "scripts").glob("*.py"):
        assert f'# requires-python = ">={lowest}"' in script.read_text(encoding="utf-8")


@pytest.mark.parametrize("is_on", [True, False])
def test_activation_checkpointing_is_read_under_the_name_that_transformers_has(tmp_path, is_on):
    given = {_compat.CHECKPOINTING: is_on, f"{_compat.CHECKPOINTING}_kwargs": {"preserve_rng_state": False}}
    args = TrainingArguments(str(tmp_path), use_cpu=True, **given)
    assert _compat.activation_checkpointing(args) == (is_on, {"preserve_rng_state": False})
    assert _compat.activation_checkpointing(TrainingArguments(str(tmp_path), use_cpu=True)) == (False, {})

"""The versions that the package says it runs with, and what is made of them."""

import runpy
from pathlib import Path

import pytest
from transformers import TrainingArguments

from trl_diffusion_sdpo.utils import _compat

ROOT = Path(__file__).parents[1]
LOWEST = runpy.run_path(str(ROOT / "tests" / "versions" / "lowest.py"))["lowest_versions"]


def test_the_lowest_versions_are_those_of_the_project_file(tmp_path):
    file = tmp_path / "pyproject.toml"
    file.write_text(
        '[project]\ndependencies = ["numpy>=2.0", "torch>=2.6", "trl >=1.0.0,<3"]\n[project.optional-dependencies]\n'
        'deepspeed = ["deepspeed>=0.1"]\ntest = ["deepspeed>=0.1"]\n'
    )
    assert LOWEST(file) == {"numpy": "2.0", "trl": "1.0.0", "deepspeed": "0.1"}


@pytest.mark.parametrize("requirement", ["numpy<3", "deepspeed>=0.2"])
def test_a_requirement_without_one_floor_is_refused(tmp_path, requirement):
    file = tmp_path / "pyproject.toml"
    file.write_text(
        f'[project]\ndependencies = ["torch>=2.6", "{requirement}"]\n[project.optional-dependencies]\n'
        'deepspeed = ["deepspeed>=0.1"]\ntest = []\n'
    )
    with pytest.raises(ValueError, match="lowest version"):
        LOWEST(file)


@pytest.mark.parametrize("is_on", [True, False])
def test_activation_checkpointing_is_read_under_the_name_that_transformers_has(tmp_path, is_on):
    given = {_compat.CHECKPOINTING: is_on, f"{_compat.CHECKPOINTING}_kwargs": {"preserve_rng_state": False}}
    args = TrainingArguments(str(tmp_path), use_cpu=True, **given)
    assert _compat.activation_checkpointing(args) == (is_on, {"preserve_rng_state": False})
    assert _compat.activation_checkpointing(TrainingArguments(str(tmp_path), use_cpu=True)) == (False, {})

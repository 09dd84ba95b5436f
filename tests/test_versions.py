"""Differences between versions of transformers."""

import pytest
from transformers import TrainingArguments

from trl_diffusion_sdpo.utils import _compat


@pytest.mark.parametrize("is_on", [True, False])
def test_activation_checkpointing_is_read_under_the_name_that_transformers_has(tmp_path, is_on):
    given = {_compat.CHECKPOINTING: is_on, f"{_compat.CHECKPOINTING}_kwargs": {"preserve_rng_state": False}}
    args = TrainingArguments(str(tmp_path), use_cpu=True, **given)
    assert _compat.activation_checkpointing(args) == (is_on, {"preserve_rng_state": False})
    assert _compat.activation_checkpointing(TrainingArguments(str(tmp_path), use_cpu=True)) == (False, {})

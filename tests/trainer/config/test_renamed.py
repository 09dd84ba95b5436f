"""Settings of earlier versions: every way in says where they went, and their runs resume."""

import dataclasses
import json
import logging
from typing import get_args

import pytest

from trl_diffusion_sdpo import DiffusionSDPOConfig
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.losses import LOSSES, LossType
from trl_diffusion_sdpo.saving.setup import ARGS_FILE, SETUP_FILE
from trl_diffusion_sdpo.utils.renamed import RENAMED, with_new_names

# What an earlier version wrote into a checkpoint if none of its settings was changed.
AS_IT_WAS = {
    "safeguard_granularity": "batch",
    "safeguard_eps": 0.0,
    "safeguard_anchor": None,
    "safeguard_low_memory": False,
    "snr_gamma": None,
    "attention_backend": None,
    "auto_beta": False,
    "checkpoint_on_interrupt": True,
    "image_interpolation": "bilinear",
    "n_timesteps_per_pair": 1,
    "num_noise_bins": 8,
    "torch_compile_regional": False,
}


@pytest.mark.parametrize("name", [*AS_IT_WAS, "min_snr_gamma"])
def test_an_old_keyword_is_refused_with_its_new_place(name, tmp_path):
    assert name not in {field.name for field in dataclasses.fields(DiffusionSDPOConfig)}
    with pytest.raises(ValueError, match=f"`{name}` is"):
        DiffusionSDPOConfig(str(tmp_path), **{name: 1})


def test_a_keyword_that_never_was_is_pythons_error(tmp_path):
    with pytest.raises(TypeError, match="betta"):
        DiffusionSDPOConfig(str(tmp_path), betta=1)


@pytest.mark.parametrize("in_file", [False, True])
def test_an_old_option_is_refused_with_its_new_place(capsys, tmp_path, in_file):
    words = ["--safeguard-granularity", "pair"]
    if in_file:
        (tmp_path / "run.yaml").write_text("safeguard_granularity: pair\n")
        words = ["--config", str(tmp_path / "run.yaml")]
    assert main(["train", "--model_name_or_path", "none", "--dataset_name", "none", *words]) != 0
    assert "`safeguard_kwargs={'granularity': ...}`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("train --model_name_or_path m --dataset_name d --min-snr-gamma 5", "{'snr_gamma': ...}"),
        (
            "evaluate --models a=m --prompts p --output_dir o --layout geneval",
            "examples/scripts/benchmark_folders.py",
        ),
    ],
)
def test_an_option_that_no_run_stores_is_refused_with_its_place(capsys, words, place):
    assert main(words.split()) != 0
    assert place in capsys.readouterr().err


def test_old_values_move_to_their_new_places():
    settings, gone = with_new_names({**AS_IT_WAS, "beta": 2.0, "weighting_kwargs": {"mode_scale": 1.0}})
    assert settings == {"beta": 2.0, "weighting_kwargs": {"mode_scale": 1.0}, "safeguard_kwargs": {}} and not gone
    settings, gone = with_new_names({"snr_gamma": 3.0, "safeguard_eps": 1e-9, "num_noise_bins": 4})
    assert settings == {
        "timestep_weighting": "min_snr",
        "weighting_kwargs": {"snr_gamma": 3.0},
        "safeguard_kwargs": {"eps": 1e-9},
    }
    assert len(gone) == 1 and "num_noise_bins=4" in gone[0]
    assert set(AS_IT_WAS) == set(RENAMED)


@pytest.mark.parametrize("changed", [{}, {"auto_beta": True}])
def test_a_checkpoint_of_an_earlier_version_resumes(make_trainer, make_pairs, tmp_path, caplog, changed):
    def build(**settings):
        return make_trainer(train=make_pairs(4), max_steps=2, save_strategy="steps", save_steps=1, **settings)

    build().train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    for file in (checkpoint / SETUP_FILE, checkpoint / ARGS_FILE):
        stored = json.loads(file.read_text())
        old = {**AS_IT_WAS, **changed}
        stored.pop("safeguard_kwargs", None)
        file.write_text(json.dumps({**stored, **old}))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        build(overwrite_output_dir=True).train(resume_from_checkpoint=str(checkpoint))
    said = [record.getMessage() for record in caplog.records if record.name.endswith("resuming")]
    assert ["auto_beta=True" in message for message in said] == [True] * bool(changed)


def test_the_help_lists_the_losses_of_the_table():
    help_of = {field.name: field.metadata["help"] for field in dataclasses.fields(DiffusionSDPOConfig)}
    names = get_args(LossType)  # other tests may have registered losses of their own since
    assert all(f"`{name}`" in help_of["loss_type"] for name in names)
    for name in names:
        row = LOSSES[name]
        assert (f"`{name}`" in help_of["margin_clamp"]) == row.reads_logit_only
        assert (f"`{name}`" in help_of["safeguard_kwargs"]) == (row.anchor == "error")

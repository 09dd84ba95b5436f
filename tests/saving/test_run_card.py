"""The card at the end of a run: what it says, and which files it leaves alone."""

import json
import os
import re
import shutil
import signal
from importlib.metadata import version

import pytest
from peft import LoraConfig
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState

from trl_diffusion_sdpo.reporting.run_callbacks import RunReportCallback
from trl_diffusion_sdpo.saving.model_card import GENERATED

LORA = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_k"])


class At(TrainerCallback):
    """Calls something at the end of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def images_of(card: str) -> list[str]:
    return re.findall(r"!\[[^]]*\]\((.*?)\)", card)


def test_a_run_ends_with_a_card_of_what_it_did_and_names_nothing_of_the_machine(
    make_trainer, sd_folder, tmp_path, capfd
):
    sampled = {"sample_prompts": ["a red cube"], "sample_kwargs": {"num_inference_steps": 1}, "disable_tqdm": False}
    trainer = make_trainer(peft_config=LORA, beta=100.0, model_init_kwargs={"token": "hf_secretsecret"}, **sampled)

    trainer.add_callback(At(2, lambda: Image.new("RGB", (8, 8)).save(tmp_path / "run" / "curves.png")))
    trainer.train()
    card = (tmp_path / "run" / "README.md").read_text()
    verdict = json.loads((tmp_path / "run" / "verdict.json").read_text())
    for line in (
        f"{verdict['sentence']} {verdict['advice']}".strip(),
        "| LoRA | rank 2, alpha 6, targets `to_k`, `to_q` |",
        "| Pairs | 16, 0 dropped |",
        "| Optimizer steps | 2 of 2 |",
        "| `beta` | `100.0` |",
    ):
        assert line in card.splitlines()
    assert not re.search(r"`(safeguard_mu|vae_dtype|resolution|\w+_kwargs)` \|", card), "the user did not set them"
    assert f"trl-diffusion-sdpo {version('trl-diffusion-sdpo')}" in card
    shown = images_of(card)
    assert shown == ["curves.png", "samples/step-000000-0.png", "samples/step-000002-0.png"]
    assert all((tmp_path / "run" / name).is_file() for name in shown)
    for private in (str(tmp_path), os.path.dirname(sd_folder), "hf_secret", os.uname().nodename):
        assert private not in card
    (tmp_path / "run" / "samples" / "step-000002-0.png").unlink()
    trainer.create_model_card()
    assert "samples/" not in (tmp_path / "run" / "README.md").read_text()
    assert_console(*capfd.readouterr(), trainer, tmp_path / "run")


def assert_console(out: str, bar: str, trainer, run):
    """Check the console: a short line for each log, and at the end the written files and code that loads the model."""
    lines = out.splitlines()
    first = next(line for line in lines if line.startswith("step 1  loss 0.6931  winner "))
    assert "  lambda " in first and "grad_norm" not in out and "loss=" in bar and "accuracy=" in bar
    report = lines[lines.index("Training ended at step 2 of 2.") + 1 :]
    assert report == [f"  Files:   {run}", f'  To load the saved weights: pipeline.load_lora_weights("{run}")']
    state = json.loads((run / "trainer_state.json").read_text())
    assert {"grad_norm", "rewards/margins", "safeguard/active"} <= state["log_history"][0].keys()
    trainer.save_model()
    trainer.pipeline.unet.delete_adapters(trainer.adapter)
    exec(report[-1].partition(": ")[2], {"pipeline": trainer.pipeline})
    assert trainer.pipeline.get_active_adapters() == ["default_0"]


def test_a_run_whose_samples_a_user_removed_has_none_in_its_card(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1, sample_prompts=["a cube"], sample_kwargs={"num_inference_steps": 1})
    trainer.remove_callback(trainer.sample_images)
    trainer.train()
    assert not (tmp_path / "run" / "samples").exists()
    assert "samples/" not in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("loss_type", "sentence"),
    [
        ("sigmoid", "a small step of gradient descent does not raise the error on the preferred images."),
        ("sft", "It was trained without the safeguard of Diffusion-SDPO."),
        ("apo_down", "It was trained without the safeguard of Diffusion-SDPO."),
    ],
)
def test_a_card_claims_a_safeguard_only_if_the_run_has_one(make_trainer, tmp_path, loss_type, sentence):
    """A loss may have none although the user did not switch it off."""
    make_trainer(loss_type=loss_type, safeguard=None, max_steps=1).create_model_card()
    assert sentence in (tmp_path / "run" / "README.md").read_text()


def test_a_card_names_the_commit_of_the_base(make_trainer, sd_folder, tmp_path):
    """The name of a model on the Hub may mean other weights tomorrow."""
    commit = "c" * 40
    repository = tmp_path / "hub" / "models--owner--base"
    shutil.copytree(sd_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    trainer = make_trainer(model="owner/base", model_init_kwargs={"cache_dir": str(tmp_path / "hub")}, max_steps=1)
    trainer.create_model_card()
    assert commit in (tmp_path / "run" / "README.md").read_text()


def test_an_edited_card_is_left_as_it_is_and_one_that_is_asked_for_is_not(make_trainer, tmp_path, caplog):
    file = tmp_path / "run" / "README.md"
    file.parent.mkdir()
    file.write_text("Mine.")
    trainer = make_trainer(max_steps=1, peft_config=LORA)
    caplog.set_level("INFO", "trl_diffusion_sdpo")
    trainer.train()
    assert file.read_text() == "Mine." and "is left as it is" in caplog.text
    trainer.create_model_card(license="mit")
    assert "license: mit" in file.read_text() and GENERATED in file.read_text()


def test_an_interrupted_run_has_its_curves_state_and_card_as_well(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=9, peft_config=LORA)
    trainer.add_callback(At(2, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "| Optimizer steps | 2 of 9 |" in (tmp_path / "run" / "README.md").read_text()
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 2


def test_a_report_that_cannot_be_written_is_a_warning(make_args, tmp_path, caplog):
    (tmp_path / "run" / "trainer_state.json").mkdir(parents=True)
    ended, state = [], TrainerState()
    callback = RunReportCallback(lambda: ended.append(1))
    for event in (callback.on_save, callback.on_train_end):
        event(make_args(), state, TrainerControl())
    assert caplog.text.count("could not be written") == 2 and not ended
    (tmp_path / "run" / "trainer_state.json").rmdir()
    callback.on_train_end(make_args(), state, TrainerControl())
    assert ended and (tmp_path / "run" / "trainer_state.json").is_file()

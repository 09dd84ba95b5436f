"""One finished run, of which tests resume copies."""

import shutil
from pathlib import Path

import pytest
from peft import LoraConfig

SETTINGS = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}  # 8 steps an epoch


@pytest.fixture(scope="session")
def finished(sd_folder, make_pairs, tmp_path_factory) -> Path:
    """Output folder of a LoRA that has trained four steps: checkpoints of steps 2 and 4, and the weights. Not to be
    changed."""
    from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer

    folder = tmp_path_factory.mktemp("finished")
    common = {"learning_rate": 1e-3, "per_device_eval_batch_size": 4, "logging_steps": 1}
    common |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = DiffusionSDPOConfig(str(folder), max_steps=4, **SETTINGS, **common)
    trainer = DiffusionSDPOTrainer(sd_folder, None, args, make_pairs(), peft_config=LoraConfig(r=2))
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it where `build` writes."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def build(make_trainer):
    """`build(steps, **settings)`: a trainer like that of the finished run."""
    return lambda steps=2, **more: make_trainer(
        max_steps=steps, **{"peft_config": LoraConfig(r=2), **SETTINGS, **more}
    )

"""One finished run. Tests resume copies of it."""

import shutil
from pathlib import Path

import pytest
from peft import LoraConfig

SETTINGS = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}  # 8 steps an epoch


@pytest.fixture(scope="session")
def finished(sd_folder, make_pairs, tmp_path_factory) -> Path:
    """Output folder of a LoRA after four steps, with checkpoints of steps 2 and 4. Tests must not change it."""
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
    """A copy of the finished run, in the output folder of `build`."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def build(make_trainer):
    """`build(steps, **settings)`: a trainer with the settings of the finished run."""
    return lambda steps=2, **more: make_trainer(
        max_steps=steps, **{"peft_config": LoraConfig(r=2), **SETTINGS, **more}
    )

"""The example of guided images, as a program, on what two runs have saved."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "scripts" / "guided_sampling.py"


@pytest.fixture(scope="module")
def loras(tmp_path_factory, sd_folder):
    """LoRAs of two runs, the second one on swapped labels; trained by so little that images stay images."""
    from conftest import build_pairs

    from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer

    folders = []
    for swap in (False, True):
        folder = tmp_path_factory.mktemp("runs") / ("negative" if swap else "tuned")
        args = DiffusionSDPOConfig(
            str(folder),
            swap_labels=swap,
            max_steps=2,
            learning_rate=1e-2,
            per_device_train_batch_size=2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = DiffusionSDPOTrainer(sd_folder, None, args, build_pairs(4), peft_config=LoraConfig(r=2))
        trainer.train()
        trainer.save_model()
        folders.append(str(folder))
    return folders


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("more", "rows"),
    [(["--scales", "0", "1", "3"], 3), (["--form", "npo", "--negative_lora", "NEGATIVE", "--guidance_scale", "4"], 1)],
    ids=["scales", "npo"],
)
def test_it_draws_a_row_for_each_scale(more, rows, loras, sd_folder, tmp_path, monkeypatch, capsys):
    tuned, negative = loras
    output = tmp_path / "guided.png"
    words = ["--model_name_or_path", sd_folder, "--lora", tuned, "--prompt", "red", "--num_inference_steps", "2"]
    words += ["--images", "2", "--output", str(output)]
    words += [negative if word == "NEGATIVE" else word for word in more]
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    pixels = np.asarray(Image.open(output)).astype(int)
    side = pixels.shape[1] // 2
    assert pixels.shape == (rows * side, 2 * side, 3)
    images = [pixels[row * side : (row + 1) * side] for row in range(rows)]
    assert all((image != images[0]).any() for image in images[1:])
    assert str(output) in capsys.readouterr().out

"""The example of guided images, as a program, on what a run has saved."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "scripts" / "guided_sampling.py"


@pytest.mark.matrix
def test_it_draws_a_row_for_each_scale(make_trainer, sd_folder, tmp_path, monkeypatch):
    trainer = make_trainer(learning_rate=1e-2, peft_config=LoraConfig(r=2))
    trainer.train()
    trainer.save_model()
    output = tmp_path / "guided.png"
    words = ["--model_name_or_path", sd_folder, "--lora", trainer.args.output_dir, "--prompt", "red", "--images", "2"]
    words += ["--num_inference_steps", "2", "--output", str(output), "--scales", "0", "1", "3"]
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    pixels = np.asarray(Image.open(output)).astype(int)
    side = pixels.shape[1] // 2
    assert pixels.shape == (3 * side, 2 * side, 3)
    images = [pixels[row * side : (row + 1) * side] for row in range(3)]
    assert all((image != images[0]).any() for image in images[1:])

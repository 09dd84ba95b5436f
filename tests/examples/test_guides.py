"""The code of guides that loads tuned weights, run on a LoRA and a denoiser of the smallest pipeline."""

import re
from pathlib import Path

import pytest
from peft import LoraConfig

DOCS = Path(__file__).parents[2] / "docs"
MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CALL = 'pipeline("a photo of a fox"'
SMALLER = {'pipeline.to("cuda")': "", CALL: f"{CALL}, num_inference_steps=1"}


@pytest.fixture
def tuned(make_trainer, sd_folder, tmp_path, monkeypatch):
    """A working directory with the model and the runs that the guides name."""
    monkeypatch.chdir(tmp_path)
    Path(MODEL).parent.mkdir()
    Path(MODEL).symlink_to(sd_folder, target_is_directory=True)
    for folder in ("path/to/run", "negative"):
        make_trainer(MODEL, peft_config=LoraConfig(r=2), output_dir=folder).save_model()


def snippets(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    for size, smaller in SMALLER.items():
        text = text.replace(size, smaller)
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_code_of_use_it_elsewhere_runs(tuned, make_trainer):
    for text in snippets("use_elsewhere.md"):
        if "AutoModel" in text:
            make_trainer(MODEL, output_dir="full").save_model()
            text = text.replace("path/to/run", "full")
        exec(compile(text, "use_elsewhere.md", "exec"), {})
    assert Path("path/to/merged/model_index.json").is_file()


def test_the_code_of_preference_guidance_runs(tuned):
    names: dict = {}
    first, second = snippets("guidance.md")
    exec(compile(first, "guidance.md", "exec"), names)
    names["pipeline"].unload_lora_weights()
    exec(compile(second, "guidance.md", "exec"), names)
    assert names["image"].size == (16, 16)

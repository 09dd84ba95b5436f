"""Run the code of docs/first_lora.md in its order, in the smallest size."""

import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest

from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.demo import pairs as demo_pairs

PAGE = Path(__file__).parents[1] / "docs" / "first_lora.md"
# All that is changed in the text; each must be there.
SIZES = {
    "max_steps: 60": "max_steps: 2",
    "save_steps: 20": "save_steps: 1\nlogging_steps: 1",
    "eval_steps: 20": "eval_steps: 1",
    "per_device_train_batch_size: 8": "per_device_train_batch_size: 2\nper_device_eval_batch_size: 64",
    "num_inference_steps: 10": "num_inference_steps: 1",
    "num_inference_steps=10": "num_inference_steps=1",
    "[a red circle on white, a blue square on black, a green cross on gray]": "[a red circle on white]",
    "--max_steps 80": "--max_steps 3",
}


def code_of_page() -> list[tuple[str, str]]:
    text = PAGE.read_text(encoding="utf-8")
    for size, smaller in SIZES.items():
        assert size in text, f"the page has no {size}"
        text = text.replace(size, smaller)
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder after the code of the page."""
    folder, names = tmp_path_factory.mktemp("first_lora"), {"__name__": "reader"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("off_policy_pairs", "eval_pairs"):
            patch.setattr(demo_pairs, name, partial(getattr(demo_pairs, name), per_prompt=1))
        for language, text in code_of_page():
            if language == "yaml":
                (folder / "shapes.yaml").write_text(text, encoding="utf-8")
            elif language == "python":
                exec(compile(text, PAGE.name, "exec"), names)
            elif language == "bash":
                words = shlex.split(text.replace("\\\n", " "))
                assert main([*words[1:], *(["--use_cpu"] if words[1] == "train" else [])]) == 0
    return folder


def test_every_file_that_comfyui_and_the_page_read_is_there(finished):
    files = ["shapes.safetensors", "circle.png", "shapes-lora/verdict.json", "shapes-lora/README.md"]
    assert [file for file in files if not (finished / file).is_file()] == []


def test_the_run_is_resumed_without_a_step_twice(finished):
    state = json.loads((finished / "shapes-lora" / "trainer_state.json").read_text())
    steps = [entry["step"] for entry in state["log_history"] if "loss" in entry]
    assert state["global_step"] == 3 and steps == [1, 2, 3]

"""The first hour of docs/first_hour.md, acted out: its code in its order, in the smallest size, and what it prints."""

import contextlib
import io
import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.demo import comparison

PAGE = Path(__file__).parents[1] / "docs" / "first_hour.md"
# All that is changed in the text; each must be there.
SIZES = {
    "max_steps: 60": "max_steps: 2",
    "save_steps: 20": "save_steps: 1\nlogging_steps: 1",
    "eval_steps: 20": "eval_steps: 1",
    "per_device_train_batch_size: 8": "per_device_train_batch_size: 2\nper_device_eval_batch_size: 64",
    "sample_inference_steps: 10": "sample_inference_steps: 1",
    "num_inference_steps=10": "num_inference_steps=1",
    "[a red circle on white, a blue square on black, a green cross on gray]": "[a red circle on white]",
    "--max_steps 20": "--max_steps 2",
    "--max_steps 40": "--max_steps 3",
}
# What may differ from one run to another: numbers, which way they point, the verdict's word, where the package is.
VARYING = re.compile(
    r"\S*/demo/base|[+-]?\d[\d.,e+-]*%?|\b(above|below|better|unchanged|worse|ruined|unknown|None)\b"
    r"|\b((not )?learned|reversed)\b",
)


def code_of_page() -> list[tuple[str, str]]:
    text = PAGE.read_text(encoding="utf-8")
    for size, smaller in SIZES.items():
        assert size in text, f"the page has no {size}"
        text = text.replace(size, smaller)
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shapes(text: str) -> set[str]:
    """The lines without what may differ, and of a verdict that it is one."""
    lines = (re.sub("^Verdict: .*", "Verdict", line) for line in text.splitlines())
    return {" ".join(VARYING.sub("#", line).split()) for line in lines}


@pytest.fixture(scope="module")
def hour(tmp_path_factory):
    """The folder after the hour, and each block of output on the page with what was printed since the one before."""
    folder, blocks, output = tmp_path_factory.mktemp("hour"), [], io.StringIO()
    names = {"__name__": "reader"}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.chdir(folder)
        for name in ("off_policy_pairs", "eval_pairs"):
            patch.setattr(comparison, name, partial(getattr(comparison, name), per_prompt=1))
        for language, text in code_of_page():
            if language == "text":
                blocks.append((text, output.getvalue()))
                output.truncate(output.seek(0))
            elif language == "yaml":
                (folder / "shapes.yaml").write_text(text, encoding="utf-8")
            elif language == "python":
                exec(compile(text, PAGE.name, "exec"), names)
            else:
                words = shlex.split(text.replace("\\\n", " "))
                assert main([*words[1:], *(["--use_cpu"] if words[1] == "train" else [])]) == 0
    return folder, blocks


def test_what_the_page_shows_is_what_is_printed(hour):
    folder, blocks = hour
    for shown, printed in blocks:
        if printed:
            assert shapes(shown) == shapes(printed)
        else:
            assert all((folder / file).is_file() for file in shown.split())
    assert sum(bool(printed) for _, printed in blocks) == 6


def test_the_files_that_the_page_names_are_there(hour):
    folder, _ = hour
    files = ["curves.png", "noise_bins.png", "verdict.png", "verdict.json", "README.md", "samples/step-000000.png"]
    assert [file for file in files if not (folder / "shapes-lora" / file).is_file()] == []
    assert (folder / "circle.png").is_file()


def test_the_exported_keys_and_scale_are_what_comfyui_and_kohya_compute(hour):
    """`lora_unet_` and the module's name with underscores; readers add `alpha / r * up @ down`, and training adds
    `8 / 16 * B @ A` of PEFT's file. Every kind of layer is in tests/saving/test_lora_export.py."""
    folder, _ = hour
    exported = load_file(folder / "shapes.safetensors")
    ours = load_file(folder / "shapes-lora" / "adapter_model.safetensors")
    modules = {key.rpartition(".lora")[0] for key in ours}
    assert len(exported) == 3 * len(modules) > 0
    for module in modules:
        key = "lora_unet_" + module.removeprefix("base_model.model.").replace(".", "_")
        down, up = exported[f"{key}.lora_down.weight"], exported[f"{key}.lora_up.weight"]
        trained = 8 / 16 * ours[f"{module}.lora_B.weight"] @ ours[f"{module}.lora_A.weight"]
        torch.testing.assert_close(exported[f"{key}.alpha"].item() / down.shape[0] * up @ down, trained)
    assert any(ours[f"{module}.lora_B.weight"].any() for module in modules)


def test_the_second_stage_starts_from_the_first_and_resumes(hour):
    folder, _ = hour
    state = json.loads((folder / "shapes-second" / "trainer_state.json").read_text())
    start = next(entry for entry in state["log_history"] if "eval_errors/winner" in entry)
    first = json.loads((folder / "shapes-lora" / "verdict.json").read_text())
    assert start["step"] == 0 and start["eval_errors/winner"] == pytest.approx(first["winner_error"], rel=1e-4)
    steps = [entry["step"] for entry in state["log_history"] if "loss" in entry]
    assert state["global_step"] == 3 and steps == [1, 2, 3]  # no step twice

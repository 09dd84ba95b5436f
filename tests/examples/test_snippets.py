"""Run the code of the README, the quick start and the notebook in the smallest size; read the commands of each card.

Models are found under the names that the code gives them: folders of the working directory hold tiny pipelines of the
same classes. The pairs are those of `demo --write_pairs`, fewer. `SIZES` is all that is changed in the text, and a size
that no snippet has any more is an error.
"""

import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest

from trl_diffusion_sdpo.cli import train
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.demo import pairs as demo_pairs
from trl_diffusion_sdpo.demo.pairs import eval_pairs, off_policy_pairs, write_pairs

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd_folder",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl_folder",
}
SIZES = {
    "README.md": {
        "max_steps=2000": "max_steps=1",
        'in the rain").images': 'in the rain", num_inference_steps=1).images',
    },
    "docs/quickstart.md": {
        "max_steps=60": "max_steps=1",
        "per_device_train_batch_size=8": "per_device_train_batch_size=1",
    },
}
# Of the notebook's first cell.
SMALLEST = {"PAIRS": 4, "HELD_OUT": 2, "STEPS": 1, "BATCH": 1, "ACCUMULATED": 1, "INFERENCE_STEPS": 1}
SMALLEST |= {"SHAPES_PER_PROMPT": 1, "SHAPES_STEPS": 1, "SHAPES_BATCH": 2, "SHAPES_IMAGES": 2}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    splits = {"train": off_policy_pairs(per_prompt=1), "test": eval_pairs(per_prompt=1)}
    return write_pairs(splits, tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def beside(request, pairs, tmp_path, monkeypatch) -> Path:
    """A working directory with the pairs and the models."""
    (tmp_path / "pairs").symlink_to(pairs, target_is_directory=True)
    for name, fixture in MODELS.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(request.getfixturevalue(fixture), target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snippets(page: str) -> list[tuple[str, str]]:
    """Language and text of a page's code, in the smallest size."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for size, smaller in SIZES[page].items():
        assert size in text, f"{page} has no {size}"
        text = text.replace(size, smaller)
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# Options that make a run of `sdxl_lora` tiny.
TINY = "--use_cpu true --bf16 false --dtype float32 --resolution 16 --max_steps 1 --gradient_accumulation_steps 1"
TINY += " --dataloader_num_workers 0 --sample_kwargs '{\"num_inference_steps\": 1}'"


def run_command(text: str) -> None:
    """Run the training commands of a block; `demo` has tests of its own."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["trl-diffusion-sdpo", "train"]:
            assert main([*words[1:], *shlex.split(TINY)]) == 0


@pytest.mark.parametrize("page", SIZES)
def test_the_code_of_a_page_runs(page, beside):
    names: dict = {"__name__": "reader"}
    for language, text in snippets(page):
        if language == "python":
            exec(compile(text, page, "exec"), names)
        elif language == "bash":
            run_command(text)
    assert list(beside.glob("*/diffusion_sdpo_setup.json"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run(path, beside):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code[0]["metadata"]["tags"] == ["parameters"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code), "with outputs"
    names: dict = {"__name__": "reader"}
    for number, cell in enumerate(code):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
        if number == 0:
            assert set(SMALLEST) == {name for name, value in names.items() if isinstance(value, int)}
            names |= SMALLEST | {"DATASET": "pairs"}
    assert 0 <= names["after"] <= 1 and (beside / "sd15-lora" / "pytorch_lora_weights.safetensors").is_file()


def test_the_command_writes_pairs_that_a_run_reads(beside, monkeypatch, capsys):
    for name in ("off_policy_pairs", "eval_pairs"):
        monkeypatch.setattr(demo_pairs, name, partial(getattr(demo_pairs, name), per_prompt=1))
    assert main(["demo", "--write_pairs", "written"]) == 0
    printed = capsys.readouterr().out
    assert re.match(r"Wrote 54 pairs in written/train and 57 pairs in written/test\. ", printed)
    command = shlex.split(printed.partition("\n\n")[2].replace("\\\n", " "))
    assert main([*command[1:], "--max_steps", "1", "--per_device_train_batch_size", "2", "--use_cpu"]) == 0
    assert main(["demo", "--write_pairs", "written"]) == 2
    assert "must be new or empty" in capsys.readouterr().err


def test_the_commands_for_each_card_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "your_card.md").read_text(encoding="utf-8")
    commands = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(commands) == 23  # six cards and four models, but FLUX does not fit 8 GB
    for command in commands:
        command = command.replace("adamw_bnb_8bit", "adamw_torch")  # bitsandbytes may not be installed
        words = shlex.split(command.replace("\\\n", " "))
        assert words[:2] == ["trl-diffusion-sdpo", "train"]
        _, args, model = train.parse([*words[2:], "--use_cpu", "true"])
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64
        assert model.use_peft == args.output_dir.endswith("-lora")

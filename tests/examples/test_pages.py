"""Run the code of the pages and the notebook in its smallest size.

Models are found under their own names: folders of the working directory hold tiny pipelines of the same classes, and
the runs that a page takes for granted. The pairs are a few of `demo --write_pairs`. `SMALLER` is all that changes in a
page; a text that the page does not have is an error.
"""

import json
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest
from peft import LoraConfig

from trl_diffusion_sdpo.cli import train
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.tools.demo import pairs

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "notebooks" / "first_lora.ipynb"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
MODELS = {SD15: "sd_folder", "stabilityai/stable-diffusion-xl-base-1.0": "sdxl_folder"}
SMALLER = {
    "README.md": {"max_steps=60": "max_steps=1", "max_steps=1400": "max_steps=1", ", bf16=True": ""},
    "docs/quickstart.md": {
        "max_steps=60": "max_steps=1",
        "per_device_train_batch_size=8": "per_device_train_batch_size=1",
    },
    "docs/first_lora.md": {
        "max_steps: 60": "max_steps: 2",
        "save_steps: 20": "save_steps: 1\nlogging_steps: 1",
        "eval_steps: 20": "eval_steps: 1",
        "per_device_train_batch_size: 8": "per_device_train_batch_size: 2\nper_device_eval_batch_size: 64",
        "num_inference_steps: 10": "num_inference_steps: 1",
        "num_inference_steps=10": "num_inference_steps=1",
        "[a red circle on white, a blue square on black, a green cross on gray]": "[a red circle on white]",
        "--max_steps 80": "--max_steps 3",
    },
    "docs/use_elsewhere.md": {'"path/to/run", subfolder': '"full", subfolder'},
    "docs/guidance.md": {'pipeline.to("cuda")': "", 'of a fox"': 'of a fox", num_inference_steps=1'},
}
# Files that exist after the code of a page.
WRITTEN = {
    "README.md": ("shapes-lora/diffusion_sdpo_setup.json", "sd15/diffusion_sdpo_setup.json"),
    "docs/quickstart.md": ("shapes-lora/diffusion_sdpo_setup.json",),
    "docs/first_lora.md": ("shapes.safetensors", "circle.png", "shapes-lora/verdict.json", "shapes-lora/README.md"),
    "docs/use_elsewhere.md": ("path/to/merged/model_index.json", "my-lora.safetensors"),
    "docs/guidance.md": (),
}
# Options that make a run of `sdxl_lora` tiny.
TINY = "--use_cpu true --bf16 false --dtype float32 --resolution 16 --max_steps 1 --gradient_accumulation_steps 1"
TINY += " --dataloader_num_workers 0 --sample_kwargs '{\"num_inference_steps\": 1}'"
# The first cell of the notebook sets these.
SMALLEST = {"PER_PROMPT": 1, "STEPS": 2, "BATCH": 2, "IMAGES": 1, "REAL": True, "REAL_PAIRS": 4, "REAL_HELD_OUT": 2}
SMALLEST |= {"REAL_STEPS": 1, "REAL_BATCH": 1, "ACCUMULATED": 1, "INFERENCE_STEPS": 1}


@pytest.fixture(autouse=True)
def beside(request, tmp_path, monkeypatch) -> Path:
    """A working directory with the models. `demo --write_pairs` writes one pair for each prompt."""
    for name, fixture in MODELS.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(request.getfixturevalue(fixture), target_is_directory=True)
    for name in ("off_policy_pairs", "eval_pairs"):
        monkeypatch.setattr(pairs, name, partial(getattr(pairs, name), per_prompt=1))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(text: str, page: str) -> None:
    """Run the commands of a block, but for those that need the Hub or the whole demo."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["trl-diffusion-sdpo"] or words[1:] == ["demo"] or page == "docs/guidance.md":
            continue
        smaller = {"train": "--use_cpu" if page == "docs/first_lora.md" else TINY}.get(words[1], "")
        assert main([*words[1:], *shlex.split(smaller)]) == 0


@pytest.mark.parametrize("page", SMALLER)
def test_the_code_of_a_page_runs(page, beside, make_trainer):
    text = (ROOT / page).read_text(encoding="utf-8")
    for size, smaller in SMALLER[page].items():
        assert size in text, f"{page} has no {size}"
        text = text.replace(size, smaller)
    if "path/to/run" in text:
        for folder in ("path/to/run", "negative"):
            make_trainer(SD15, peft_config=LoraConfig(r=2), output_dir=folder).save_model()
        make_trainer(SD15, output_dir="full").save_model()
    names: dict = {"__name__": "reader"}
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(compile(block, page, "exec"), names)
        elif language == "yaml" and page == "docs/first_lora.md":
            Path("shapes.yaml").write_text(block, encoding="utf-8")
        elif language == "bash":
            run_command(block, page)
        if page == "README.md" and "Trainer" in block:  # the other block changes three lines of this one
            whole = block
            shutil.copytree("pairs", "data-is-better-together/open-image-preferences-v1-binarized")
    if page == "README.md":
        for line in block.splitlines():
            whole = re.sub(f"^{line.split()[0]} = .*", line, whole, flags=re.MULTILINE)
        exec(compile(whole, page, "exec"), names)
    assert [file for file in WRITTEN[page] if not (beside / file).is_file()] == []
    if page == "docs/first_lora.md":  # it resumes its run, without a step twice
        history = json.loads((beside / "shapes-lora" / "trainer_state.json").read_text())["log_history"]
        assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3]


def test_the_cells_of_the_notebook_run(beside):
    assert main(["demo", "--write_pairs", "pairs"]) == 0
    names: dict = {"__name__": "reader"}
    for number, cell in enumerate(code_cells()):
        exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec"), names)
        if number == 0:
            assert set(SMALLEST) == {name for name, value in names.items() if isinstance(value, int)}
            names |= SMALLEST | {"DATASET": "pairs"}
    assert names["picture"] is not None and (beside / "sd15-lora" / "pytorch_lora_weights.safetensors").is_file()


def test_the_notebook_is_stored_with_its_outputs_and_three_pictures():
    """`python docs_build/notebook.py` stores them."""
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result"}
    assert "Verdict: " in str(outputs)


def code_cells() -> list[dict]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_command_that_the_demo_prints_trains_on_its_pairs(capsys):
    assert main(["demo", "--write_pairs", "written"]) == 0
    command = shlex.split(capsys.readouterr().out.partition("\n\n")[2].replace("\\\n", " "))
    assert main([*command[1:], "--max_steps", "1", "--per_device_train_batch_size", "2", "--use_cpu"]) == 0
    assert main(["demo", "--write_pairs", "written"]) == 2  # the folder is not empty


def test_the_commands_for_each_card_are_understood():
    text = (ROOT / "docs" / "your_card.md").read_text(encoding="utf-8")
    commands = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(commands) == 24  # six cards and four models; FLUX does not fit 8 GB, SDXL has two on 24 GB
    for command in commands:
        command = command.replace("adamw_bnb_8bit", "adamw_torch")  # bitsandbytes may not be installed
        words = shlex.split(command.replace("\\\n", " "))
        _, args, model = train.parse([*words[2:], "--use_cpu", "true"])
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 16
        assert model.use_peft == args.output_dir.endswith("-lora")

"""The example script with the example configurations, and the command line, end to end: two steps on tiny pipelines in
diffusers' format, and a run that is interrupted and resumed."""

import json
import runpy
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from trl_diffusion_sdpo.cli.main import main

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "scripts" / "diffusion_sdpo.py"
CONFIGS = ROOT / "examples" / "configs"
LORA = "pytorch_lora_weights.safetensors"
TINY = [
    *("--use_cpu", "--bf16", "false", "--dtype", "float32", "--resolution", "16", "--max_steps", "2"),
    *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--dataloader_num_workers", "0"),
    *("--logging_steps", "1", "--report_to", "none"),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """Folder of a small canonical data set: eight pairs to train on, four to evaluate."""
    folder = tmp_path_factory.mktemp("pairs")
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(24)]
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
    )
    columns = {"prompt": [f"number {i}" for i in range(12)], "chosen": images[:12], "rejected": images[12:]}
    rows = datasets.Dataset.from_dict(columns, features=features)
    rows.select(range(8)).to_parquet(folder / "train.parquet")
    rows.select(range(8, 12)).to_parquet(folder / "test.parquet")
    return str(folder)


@pytest.fixture
def run_example(monkeypatch, pairs, tmp_path):
    """Run the example as a program, in this process, with a configuration; returns the output folder."""

    def run(config: str, pipeline: str, *more: str) -> Path:
        output = tmp_path / config
        words = ["--config", config, "--model_name_or_path", pipeline]
        words += ["--dataset_name", pairs, "--output_dir", str(output), *TINY, *more]
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *words])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return output

    return run


class PublishingRecorder:
    """Replaces the trainer, which would talk to the Hub: records the names of the data sets to publish."""

    published: list = []

    def __init__(self, *_, **__):
        pass

    def train(self):
        pass

    def save_model(self, folder):
        pass

    def push_to_hub(self, dataset_name):
        self.published.append(dataset_name)


def history(output: Path) -> list[dict]:
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((newest / "trainer_state.json").read_text())["log_history"]


def logged(output: Path, name: str) -> list[float]:
    return [entry[name] for entry in history(output) if name in entry]


def test_the_example_writes_a_lora_that_the_pipeline_loads_and_resumes(run_example, sd_folder):
    output = run_example("sd15_lora", sd_folder)
    assert logged(output, "loss")[0] == pytest.approx(np.log(2), abs=1e-6)
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder)
    pipeline.load_lora_weights(output, weight_name=LORA)
    assert pipeline.get_active_adapters()
    run_example("sd15_lora", sd_folder, "--resume_from_checkpoint", "true", "--max_steps", "3")
    assert [entry["step"] for entry in history(output) if "loss" in entry] == [1, 2, 3]


def test_the_example_tunes_all_weights_and_evaluates(run_example, sd_folder):
    output = run_example("sd15_sigmoid", sd_folder, "--eval_strategy", "steps", "--eval_steps", "1")
    assert logged(output, "loss")[0] == pytest.approx(np.log(2), abs=1e-6)
    assert len(logged(output, "eval_loss")) == 2
    assert UNet2DConditionModel.from_pretrained(output / "unet").config.sample_size == 8


def test_the_example_writes_a_lora_of_a_transformer(run_example, family_folder):
    output = run_example("flux_lora", family_folder("flux"), "--load_in_4bit", "false")
    assert logged(output, "loss")[0] == pytest.approx(np.log(2), abs=1e-6)
    assert all(weight.startswith("transformer.") for weight in load_file(output / LORA))


@pytest.mark.parametrize(("dataset", "published"), [("PAIRS", None), ("owner/preferences", "owner/preferences")])
def test_the_example_publishes_no_path_of_this_machine(monkeypatch, pairs, tmp_path, dataset, published):
    """With a fake trainer and without data: only the name that the script hands on counts."""
    monkeypatch.setattr("trl_diffusion_sdpo.DiffusionSDPOTrainer", PublishingRecorder)
    monkeypatch.setattr("trl_diffusion_sdpo.cli.pair_arguments.load_datasets", lambda *_: (None, None))
    monkeypatch.setattr(PublishingRecorder, "published", [])
    words = ["--dataset_name", dataset.replace("PAIRS", pairs), "--output_dir", str(tmp_path), "--push_to_hub", *TINY]
    runpy.run_path(str(SCRIPT))["main"](words)
    assert PublishingRecorder.published == [published]


def test_a_configuration_of_the_paper_runs_through_the_command_line(sd_folder, pairs, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = ["--config", str(CONFIGS / "sd15_dmpo.yaml"), "--model_name_or_path", sd_folder]
    arguments += ["--dataset_name", pairs, "--output_dir", str(output), *TINY]
    assert main(["train", *arguments]) == 0
    assert "The tuned weights are in" in capsys.readouterr().out
    settings = json.loads((output / "training_args.json").read_text())
    assert (settings["loss_type"], settings["beta"], settings["loss_kwargs"]) == ("dmpo", 2000, {"dmpo_alpha": 0.01})
    assert (output / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_a_data_set_saved_to_disk_is_read_as_a_stream(sd_folder, pairs, tmp_path):
    saved = tmp_path / "saved"
    datasets.load_dataset(pairs).save_to_disk(saved)
    arguments = [
        "--model_name_or_path",
        sd_folder,
        "--dataset_name",
        str(saved),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert main(["train", *arguments, *TINY, "--dataset_streaming", "true"]) == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--dataset_name", "EMPTY", "--model_name_or_path", "MODEL"], "data"),
        (["--dataset_name", "PAIRS", "--model_name_or_path", "MODEL", "--dataset_train_split", "trian"], "trian"),
    ],
)
def test_a_wrong_folder_or_split_is_an_error_of_one_line(arguments, named, sd_folder, pairs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    paths = {"PAIRS": pairs, "MODEL": sd_folder, "EMPTY": str(tmp_path / "empty")}
    words = [paths.get(word, word) for word in arguments]
    assert main(["train", *words, "--output_dir", str(tmp_path / "run"), *TINY]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and named in errors[0]

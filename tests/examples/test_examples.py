"""The example scripts as programs, in their smallest size."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image

from trl_diffusion_sdpo import PairTerms, UserError, register_loss
from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.cli.pair_arguments import public_name
from trl_diffusion_sdpo.cli.train import parse
from trl_diffusion_sdpo.families import registry
from trl_diffusion_sdpo.losses import LOSSES, diffusion_preference_loss
from trl_diffusion_sdpo.tools.demo.world import captions

EXAMPLES = Path(__file__).parents[2] / "examples"
LORA = "pytorch_lora_weights.safetensors"
TINY = "--use_cpu --bf16 false --dtype float32 --resolution 16 --max_steps 2 --per_device_train_batch_size 2"
TINY += " --gradient_accumulation_steps 1 --dataloader_num_workers 0 --logging_steps 1 --report_to none"


@pytest.fixture
def example(monkeypatch):
    """`example(name)`: an example script as a module. Losses and families that it registers are forgotten."""
    known = dict(LOSSES)
    monkeypatch.setattr(registry, "_registered", {})

    def loaded(name: str):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    yield loaded
    LOSSES.clear()
    LOSSES.update(known)


@pytest.fixture
def words(make_pairs, tmp_path, sd_folder) -> list[str]:
    """Options of a tiny training run, without a configuration."""
    make_pairs(8).to_parquet(tmp_path / "pairs" / "train.parquet")
    make_pairs(4).to_parquet(tmp_path / "pairs" / "test.parquet")
    paths = {"model_name_or_path": sd_folder, "dataset_name": tmp_path / "pairs", "output_dir": tmp_path / "run"}
    return [*(word for name, path in paths.items() for word in (f"--{name}", str(path))), *TINY.split()]


def losses(run: Path) -> dict[int, float]:
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_the_training_script_writes_a_lora_that_the_pipeline_loads_and_resumes(example, words, sd_folder, tmp_path):
    script = example("diffusion_sdpo")
    script.main(["--config", "sd15_lora", *words])
    assert losses(tmp_path / "run")[1] == pytest.approx(np.log(2), abs=1e-6)
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder)
    pipeline.load_lora_weights(tmp_path / "run", weight_name=LORA)
    assert pipeline.get_active_adapters()
    script.main(["--config", "sd15_lora", *words, "--resume_from_checkpoint", "true", "--max_steps", "3"])
    assert list(losses(tmp_path / "run")) == [1, 2, 3]


def test_a_configuration_of_the_paper_runs_through_the_command_line(words, tmp_path):
    assert main(["train", "--config", "sd15_dmpo", *words, "--eval_strategy", "steps", "--eval_steps", "1"]) == 0
    settings = json.loads((tmp_path / "run" / "training_args.json").read_text())
    assert (settings["loss_type"], settings["beta"], settings["loss_kwargs"]) == ("dmpo", 2000, {"dmpo_alpha": 0.01})
    assert (tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize(("dataset", "published"), [("PAIRS", None), ("owner/preferences", "owner/preferences")])
def test_no_path_of_this_machine_is_published(dataset, published, tmp_path):
    script_args, *_ = parse(
        ["--dataset_name", dataset.replace("PAIRS", str(tmp_path)), "--output_dir", str(tmp_path), *TINY.split()]
    )
    assert public_name(script_args) == published


@pytest.mark.matrix
def test_guided_sampling_draws_a_row_for_each_scale(example, make_trainer, sd_folder, tmp_path, monkeypatch):
    trainer = make_trainer(learning_rate=1e-2, peft_config=LoraConfig(r=2))
    trainer.train()
    trainer.save_model()
    options = f"--lora {trainer.args.output_dir} --prompt red --images 2 --num_inference_steps 2 --scales 0 1 3"
    words = ["--model_name_or_path", sd_folder, "--output", str(tmp_path / "guided.png"), *options.split()]
    monkeypatch.setattr(sys, "argv", ["guided_sampling.py", *words])
    example("guided_sampling").main()
    pixels = np.asarray(Image.open(tmp_path / "guided.png")).astype(int)
    side = pixels.shape[1] // 2
    assert pixels.shape == (3 * side, 2 * side, 3)
    images = [pixels[row * side : (row + 1) * side] for row in range(3)]
    assert all((image != images[0]).any() for image in images[1:])


def test_a_model_improves_on_its_own_images_in_two_rounds_and_a_second_call_repeats_none(example, tmp_path):
    texts = [caption.text for caption in captions()]
    (tmp_path / "prompts.txt").write_text("\n".join(texts[:3]))
    (tmp_path / "test.txt").write_text("\n".join(texts[3:5]))
    words = ["--prompts", str(tmp_path / "prompts.txt"), "--test_prompts", str(tmp_path / "test.txt")]
    words += ["--output_dir", str(tmp_path / "out"), "--images", "4", "--max_steps", "2", "--num_inference_steps", "2"]
    words += ["--margin", "0.1", "--batch_size", "2"]
    script = example("self_improve")
    assert script.main(words).models == ("base", "round-1", "round-2")
    assert (tmp_path / "out" / "evaluation" / "report.html").is_file()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/round-*/adapter_model.safetensors")}
    assert len(times) == 2
    script.main(words)
    assert times == {path: path.stat().st_mtime_ns for path in times}


# ---- A loss and a family of one's own ------------------------------------------------------------------------------


def test_the_example_trains_by_its_own_loss_and_family(example, tmp_path):
    words = ["--max_steps", "1", "--pairs_per_prompt", "1", "--output_dir", str(tmp_path / "run")]
    trainer = example("own_loss_and_family").main(words)
    assert type(trainer.family).__name__ == "OwnFamily"
    assert trainer.state.log_history[0]["loss"] == 1.0  # relu(1 - 0)^2 before the first step
    assert (tmp_path / "run" / LORA).is_file()


@pytest.mark.usefixtures("example")
def test_a_registered_loss_is_the_function_that_was_passed():
    """Its setting has a default, and can be passed to the function."""

    def scaled(terms: PairTerms, *, beta: float, factor: float = 3.0) -> torch.Tensor:
        return factor * beta * (terms.winner_error - terms.loser_error)

    register_loss("scaled", scaled, needs_reference=False)
    pred, target = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    assert float(diffusion_preference_loss(pred, target, loss_type="scaled", beta=2.0).loss) == -18  # 3 * 2 * (1 - 4)
    halved = diffusion_preference_loss(pred, target, loss_type="scaled", beta=2.0, factor=0.5)
    assert float(halved.loss) == -3
    summed = diffusion_preference_loss(pred, target, loss_type=["scaled", "sft"], loss_weights=[1.0, 2.0], beta=2.0)
    assert float(summed.loss) == -16
    with pytest.raises(ValueError, match="'sigmoid'"):
        register_loss("sigmoid", scaled)
    with pytest.raises(ValueError, match="'plain'"):
        register_loss("plain", lambda terms, beta: terms.logit(beta))
    with pytest.raises(UserError, match="needs_reference.*default_beta"):
        register_loss("unheard_of", scaled, default_beta=5.0)

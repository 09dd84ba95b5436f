"""The average of the trained weights: the recurrence by hand, evaluated, saved, resumed and published beside them."""

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

LORA_FILE, PEFT_FILE = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
RATES = {"full": 1e-3, "lora": 1e-2}


class KeepWeights(TrainerCallback):
    """The trained weights at the start and after every step, under the names of the saved files."""

    def __init__(self):
        self.weights = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append(self.trained(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(self.trained(model))

    def trained(self, model):
        named = {name.removeprefix("denoiser."): weight for name, weight in model.named_parameters()}
        lora = any("lora_" in name for name in named)
        return {
            f"unet.{name.replace('.default.', '.')}" if lora else name: weight.detach().clone()
            for name, weight in named.items()
            if weight.requires_grad
        }


@pytest.fixture
def build(make_trainer, make_pairs):
    """`build(tuning, callbacks=(), **settings)`: a trainer with an average, and what keeps its weights."""

    def trainer_of(tuning, **settings):
        keep = KeepWeights()
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"]) if tuning == "lora" else None
        given = {"train": make_pairs(8), "max_steps": 3, "ema_decay": 0.5, "beta": 50.0, "callbacks": [keep]}
        return make_trainer(peft_config=lora, **{"learning_rate": RATES[tuning], **given, **settings}), keep

    return trainer_of


def averaged_by_hand(walk, decay):
    """`average <- d average + (1 - d) weights`, `d = min(decay, (1 + n) / (10 + n))` at step `n`, in float64."""
    average = {name: weight.double() for name, weight in walk[0].items()}
    for step, weights in enumerate(walk[1:], start=1):
        share = min(decay, (1 + step) / (10 + step))
        average = {name: share * average[name] + (1 - share) * weights[name].double() for name in average}
    return average


def saved(folder, tuning):
    """Return trained weights. Those of a LoRA are without its scale."""
    if tuning == "full":
        return load_file(folder / UNET_FILE)
    weights = load_file(folder / PEFT_FILE)
    return {name.replace("base_model.model.", "unet."): weight for name, weight in weights.items()}


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.eval()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
    return torch.from_numpy(pipeline("a cat", latents=noise, **arguments).images)


def tuned(base, folder, tuning):
    """Load saved weights as a user does, in plain diffusers."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    if tuning == "full":
        pipeline.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    else:
        pipeline.load_lora_weights(str(folder))
    return pipeline


# ---- The recurrence ------------------------------------------------------------------------------------------------


# A decay that the ramp of 2/11, 3/12, 4/13 reaches, and one that it does not.
@pytest.mark.parametrize(("tuning", "decay"), [("full", 0.25), ("lora", 0.999)])
def test_the_average_is_the_recurrence_over_the_weights_of_every_step(build, tmp_path, tuning, decay):
    trainer, keep = build(tuning, ema_decay=decay)
    trainer.train()
    trainer.save_model()
    assert len(keep.weights) == 4
    expected, stored = averaged_by_hand(keep.weights, decay), saved(tmp_path / "run" / "ema", tuning)
    assert set(expected) <= set(stored)  # and buffers
    for name, value in expected.items():
        torch.testing.assert_close(stored[name].double(), value, rtol=1e-6, atol=1e-7)
    raw = saved(tmp_path / "run", tuning)
    assert raw.keys() == stored.keys()
    for name, weight in keep.weights[-1].items():
        assert torch.equal(raw[name], weight), name
    assert any(not torch.equal(raw[name], stored[name]) for name in raw)


# ---- Evaluated, saved, resumed, published --------------------------------------------------------------------------


def test_the_average_is_evaluated_as_a_model_of_these_weights_and_loads_elsewhere(
    build, make_trainer, make_pairs, sd_folder, tmp_path
):
    tuning = "lora"
    pairs = make_pairs(6, seed=7)
    trainer, _ = build(tuning, eval_dataset=pairs)
    trainer.train()
    found = trainer.evaluate()
    trainer.save_model()
    for folder, prefix in ((tmp_path / "run", "eval_"), (tmp_path / "run" / "ema", "eval_ema_")):
        policy = tuned(sd_folder, folder, tuning)
        other = make_trainer(policy, sd_folder, eval_dataset=pairs, beta=50.0, output_dir=str(tmp_path / "other"))
        expected = other.evaluate()
        names = [name.removeprefix("eval_") for name in expected if "/" in name or name == "eval_loss"]
        assert len(names) > 10
        for name in names:
            assert found[prefix + name] == pytest.approx(expected[f"eval_{name}"], rel=1e-4, abs=1e-6), name
    assert found["eval_ema_errors/winner"] != found["eval_errors/winner"]
    raw, average = (draw(tuned(sd_folder, tmp_path / "run" / part, tuning)) for part in ("", "ema"))
    torch.testing.assert_close(draw(trainer.pipeline), raw, rtol=0, atol=1e-5)  # the policy itself is given back
    assert (average - raw).abs().max() > 1e-4


def test_a_resumed_run_has_the_same_average_to_the_bit(build, tmp_path):
    tuning = "full"
    settings = {"max_steps": 4, "random_crop": True, "ema_decay": 0.9, "lr_scheduler_type": "constant"}
    whole, _ = build(tuning, output_dir=str(tmp_path / "whole"), save_strategy="steps", save_steps=2, **settings)
    whole.train()
    whole.save_model()
    resumed, keep = build(tuning, output_dir=str(tmp_path / "resumed"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    resumed.save_model()
    assert len(keep.weights) == 3  # where it was taken up, and two steps
    for part in ("", "ema"):
        expected, ours = (saved(tmp_path / folder / part, tuning) for folder in ("whole", "resumed"))
        assert expected.keys() == ours.keys()
        for name, weight in expected.items():
            assert torch.equal(ours[name], weight), (part, name)


# ---- The start, and bad input --------------------------------------------------------------------------------------

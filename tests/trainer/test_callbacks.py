"""Callbacks: sample images that leave training untouched, a checkpoint on interruption, and epochs."""

import signal
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments

from trl_diffusion_sdpo.models.frozen_components import FrozenComponents
from trl_diffusion_sdpo.models.loading import load_model
from trl_diffusion_sdpo.reporting.interrupts import CheckpointOnInterrupt
from trl_diffusion_sdpo.reporting.sample_images import SampleImagesCallback

PROMPTS = ["a red cube", "ein Würfel 🧊"]


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none")


@pytest.fixture
def sampler(sd_pipeline):
    return make_sampler(sd_pipeline)


def make_sampler(pipeline, **changes):
    call = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 16, "width": 16}
    given = {"every_n_steps": 2, "call_options": call, "seed": 7}
    return SampleImagesCallback(pipeline, PROMPTS, **{**given, **changes})


def run(callback, args, steps, start=0, **state):
    """The events of a training of so many steps."""
    state, control = TrainerState(global_step=start, **state), TrainerControl()
    callback.on_train_begin(args, state, control)
    for step in range(start + 1, start + steps + 1):
        state.global_step = step
        callback.on_step_end(args, state, control)
    callback.on_train_end(args, state, control)
    return control


def args_folder(args):
    return Path(args.output_dir) / "samples"


def same_images(first, second):
    return all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


def test_an_image_is_what_the_pipeline_gives_for_the_seed(sampler, sd_pipeline):
    for i, image in enumerate(sampler.generate()):
        generator = torch.Generator().manual_seed(7 + i)
        expected = sd_pipeline(PROMPTS[i], generator=generator, num_inference_steps=2, guidance_scale=5.0).images[0]
        assert image.tobytes() == expected.tobytes()


def test_files_hold_the_prompt_and_the_gallery_names_them(sampler, args):
    run(sampler, args, steps=2)
    assert sampler.gallery(2) == [("samples/step-000002-0.png", PROMPTS[0]), ("samples/step-000002-1.png", PROMPTS[1])]
    with Image.open(args_folder(args) / "step-000002-1.png") as image:
        assert image.text["prompt"] == PROMPTS[1] and image.text["seed"] == "8"
        assert image.size == (16, 16)


def test_a_secret_in_a_prompt_is_not_in_the_file(sampler, args):
    sampler.prompts = ["a cube, token=s3cr3t"]
    run(sampler, args, steps=2)
    files = list(args_folder(args).glob("*.png"))
    assert files and all(b"a cube" in file.read_bytes() and b"s3cr3t" not in file.read_bytes() for file in files)
    assert len(sampler.comparison(Path(args.output_dir))) == 1


@pytest.mark.parametrize("changed", ["nothing", "call", "scheduler"])
def test_images_of_other_settings_are_not_compared(changed, sampler, args, sd_pipeline):
    """A resumed run may have other `sample_kwargs` or another scheduler than the images from before training."""
    run(sampler, args, steps=1)
    call = {"num_inference_steps": 2, "guidance_scale": 1.0 if changed == "call" else 5.0, "height": 16, "width": 16}
    if changed == "scheduler":
        sd_pipeline.scheduler = DDPMScheduler.from_config(sd_pipeline.scheduler.config)
    resumed = make_sampler(sd_pipeline, call_options=call)
    run(resumed, args, steps=1, start=1)
    assert len(resumed.comparison(Path(args.output_dir))) == (len(PROMPTS) if changed == "nothing" else 0)


def test_generating_leaves_training_as_it_was(sd_pipeline, args):
    sd_pipeline.scheduler = DDPMScheduler.from_config(sd_pipeline.scheduler.config)  # draws noise at every step
    sd_pipeline.unet.train()
    sd_pipeline.unet.mid_block.eval()
    sd_pipeline.vae.eval()
    modes = {name: part.training for name, part in sd_pipeline.unet.named_modules()}
    timesteps = sd_pipeline.scheduler.timesteps.clone()
    keys = set(vars(sd_pipeline))
    seen = []
    handle = sd_pipeline.unet.register_forward_hook(
        lambda module, args, output: seen.append((module.training, torch.is_grad_enabled()))
    )
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    run(make_sampler(sd_pipeline), args, steps=2)
    handle.remove()
    assert torch.equal(torch.rand(4), expected)
    assert {name: part.training for name, part in sd_pipeline.unet.named_modules()} == modes
    assert set(seen) == {(False, False)}
    assert set(vars(sd_pipeline)) == keys and torch.equal(sd_pipeline.scheduler.timesteps, timesteps)
    assert not sd_pipeline.unet._forward_hooks and not sd_pipeline.unet._forward_pre_hooks
    assert torch.is_grad_enabled()


@pytest.fixture
def own_handlers():
    """Handlers of the test's own, which record; pytest's come back afterwards."""
    seen = []
    before = {
        number: signal.signal(number, lambda n, frame: seen.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_saves_and_stops_after_the_step(own_handlers, args, number):
    callback, control = CheckpointOnInterrupt(), TrainerControl()
    callback.on_train_begin(args, TrainerState(), control)
    callback.on_step_end(args, TrainerState(), control)
    assert not control.should_save and not control.should_training_stop
    signal.raise_signal(number)
    assert not control.should_save
    callback.on_step_end(args, TrainerState(), control)
    assert control.should_save and control.should_training_stop
    callback.on_train_end(args, TrainerState(), control)
    assert callback.interrupted is number
    assert own_handlers == []


def test_the_second_signal_stops_at_once_and_gives_the_handlers_back(own_handlers, args):
    callback, control = CheckpointOnInterrupt(), TrainerControl()
    callback.on_train_begin(args, TrainerState(), control)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="SIGINT"):
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    assert own_handlers == [signal.SIGINT]


@pytest.mark.parametrize("where", ["absent", "offloaded"])
def test_images_are_the_same_from_components_that_are_brought_for_them(where, sd_folder, sampler):
    loaded = load_model(sd_folder, encoders=where != "absent")
    frozen = FrozenComponents(
        loaded.family,
        device=torch.device("cpu"),
        half_dtype=None,
        vae_dtype="auto",
        offload=where == "offloaded",
        load=loaded.load_encoders,
    )
    assert frozen.state == where
    for _ in range(2):
        assert same_images(make_sampler(frozen.family.pipeline, frozen=frozen).generate(), sampler.generate())
    vae = frozen.family.pipeline.vae
    assert all(weight.is_meta == (where == "absent") for weight in vae.parameters())

"""Edit models, which take a source image beside the prompt."""

import functools

import datasets
import numpy as np
import pytest
import torch
from diffusers import (
    FluxKontextPipeline,
    LongCatImageEditPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
)
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from peft import LoraConfig
from PIL import Image
from tiny_pipelines import case, quiet
from tiny_pipelines.parts import enlarged
from transformers import BatchFeature
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trl_diffusion_sdpo import DiffusionSDPOTrainer
from trl_diffusion_sdpo.data import PairOptions, PairTransform, prepare_dataset
from trl_diffusion_sdpo.families import find_family
from trl_diffusion_sdpo.families.packing import pack_patches, unpack_patches
from trl_diffusion_sdpo.guidance import preference_guidance
from trl_diffusion_sdpo.models.adapters import add_lora


@pytest.fixture
def kontext(monkeypatch):
    """A tiny Kontext pipeline whose preferred resolutions are as small."""
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(16, 32), (24, 24), (32, 16)])
    return quiet(FluxKontextPipeline(**case("flux").build().components))


def image(seed, height=20, width=26):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def rows(count=4, source_size=(20, 44), **columns):
    return [
        {
            "prompt": f"edit {row}",
            "chosen": image(3 * row),
            "rejected": image(3 * row + 1),
            "source": image(3 * row + 2, *source_size),
            **columns,
        }
        for row in range(count)
    ]


def edit_args(make_args, **settings):
    batch = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    return make_args(**{"resolution": 16, "max_steps": 2, **batch, **settings})


@pytest.fixture
def recorded(monkeypatch):
    """`recorded(pipeline)`: a list of what its scheduler is given at each step: prediction, timestep, noisy latents."""

    def record(pipeline):
        steps, step = [], pipeline.scheduler.step

        def noted(prediction, timestep, sample, **options):
            steps.append((prediction, timestep, sample))
            return step(prediction, timestep, sample, **options)

        monkeypatch.setattr(pipeline.scheduler, "step", noted)
        return steps

    return record


@torch.no_grad()
def assert_predicted_alike(pipeline, steps, source, from_pipeline, to_pipeline, prompt="make it red"):
    """The family predicts what the pipeline handed to its scheduler."""
    family = find_family(pipeline)
    conditioning = family.encode_prompts([prompt]) | family.encode_sources([source], [prompt])
    assert len(steps) == 2
    for prediction, timestep, sample in steps:
        ours = family.predict(family.denoiser, from_pipeline(sample), timestep.expand(1), conditioning)
        torch.testing.assert_close(to_pipeline(ours), prediction, rtol=1e-5, atol=1e-5)


def assert_trains(trainer):
    """Its first step is neutral and has a gradient."""
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0 and trainer.state.log_history[0]["grad_norm"] > 0


def test_kontext_edits(kontext, recorded, make_args):
    steps, source = recorded(kontext), image(0, 21, 45)
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16, "max_area": 256}
    with torch.no_grad():
        kontext(image=source, prompt="make it red", output_type="latent", **call)
    assert_predicted_alike(kontext, steps, source, case("flux").from_pipeline, case("flux").to_pipeline)
    trainer = DiffusionSDPOTrainer(kontext, None, edit_args(make_args, safeguard="parameter"), rows())
    assert_trains(trainer)
    assert "image=load_image(" in trainer.model_card._model.example("me/edit", "make it red")


@pytest.mark.parametrize("name", ["flux2", "flux2_klein"])
def test_flux2_edits_if_there_is_a_source(name, recorded, make_args):
    module = case(name)
    pipeline = quiet(module.build())
    steps, source = recorded(pipeline), image(0, 69, 93)
    call = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent", **module.CALL}
    with torch.no_grad():
        pipeline(image=source, prompt="make it red", **call)
    assert_predicted_alike(pipeline, steps, source, module.from_pipeline, module.to_pipeline)
    assert_trains(DiffusionSDPOTrainer(pipeline, None, edit_args(make_args), rows(), peft_config=LoraConfig(r=4)))
    with pytest.raises(ValueError, match="precompute_latents"):
        DiffusionSDPOTrainer(module.build(), None, edit_args(make_args, precompute_latents=True), rows())


class VisionProcessor:
    """The real image processor and tokenizer of Qwen2.5-VL, joined as its processor joins them. That one cannot be made
    without torchvision, for its video half."""

    def __init__(self, tokenizer):
        self.tokenizer, self.image_processor = tokenizer, Qwen2VLImageProcessorPil(min_pixels=28 * 28)

    def __call__(self, text, images, padding, return_tensors):
        seen = self.image_processor(images=images, return_tensors=return_tensors)
        count = int(seen["image_grid_thw"][0].prod()) // self.image_processor.merge_size**2
        text = [one.replace("<|image_pad|>", "<|image_pad|>" * count) for one in text]
        return BatchFeature({**self.tokenizer(text, padding=padding, return_tensors=return_tensors), **seen})


@pytest.mark.parametrize(
    ("pipeline_class", "module", "options"),
    [
        (QwenImageEditPipeline, pipeline_qwenimage_edit, {}),
        (QwenImageEditPlusPipeline, pipeline_qwenimage_edit_plus, {}),
        (QwenImageEditPlusPipeline, pipeline_qwenimage_edit_plus, {"zero_cond_t": True}),  # as in the version of 2511
        (LongCatImageEditPipeline, pipeline_longcat_image_edit, {}),
    ],
)
def test_models_edit_with_a_text_encoder_that_sees_the_source(
    pipeline_class, module, options, make_args, recorded, monkeypatch
):
    dimensions = module.calculate_dimensions
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: dimensions(area // 256, ratio))
    is_longcat = pipeline_class is LongCatImageEditPipeline
    parts = dict(case("longcat_image" if is_longcat else "qwen_image").build().components)
    if options:
        config = {name: value for name, value in parts["transformer"].config.items() if not name.startswith("_")}
        parts["transformer"] = enlarged(type(parts["transformer"])(**{**config, **options}))
    if is_longcat:
        pipeline = quiet(pipeline_class(**parts | {"text_processor": VisionProcessor(parts["tokenizer"])}))
    else:
        pipeline = quiet(pipeline_class(**parts, processor=None))
        pipeline.processor = VisionProcessor(pipeline.tokenizer)
    steps, source, prompt = recorded(pipeline), image(0, 50, 93), "make it red"
    call, height, width = {"height": 32, "width": 48, "true_cfg_scale": 1.0}, 32, 48
    if is_longcat:  # its call takes no size
        call = {"guidance_scale": 1.0}
        width, height = module.calculate_dimensions(1024 * 1024, source.width / source.height)
    with torch.no_grad():
        pipeline(image=source, prompt=prompt, num_inference_steps=2, output_type="latent", **call)
    scale = find_family(pipeline).vae_scale_factor
    unpack = functools.partial(unpack_patches, height=height // scale, width=width // scale)
    assert_predicted_alike(pipeline, steps, source, unpack, pack_patches)
    args = edit_args(make_args, resolution=32, safeguard="parameter")
    assert_trains(DiffusionSDPOTrainer(pipeline, None, args, rows(), peft_config=LoraConfig(r=4)))


def test_reference_errors_computed_before_training_are_those_of_the_step(kontext, make_args, tmp_path):
    settings = {"precompute_ref_errors": True, "precompute_dir": str(tmp_path), "precompute_epochs": 1}
    args = edit_args(make_args, max_steps=-1, num_train_epochs=1, **settings)
    trainer = DiffusionSDPOTrainer(kontext, None, args, rows(2), peft_config=LoraConfig(r=4, lora_alpha=8))
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0


def test_the_source_is_mirrored_with_its_pair():
    options = PairOptions(PairTransform(16, center_crop=False, random_flip=True), verify_images="none", compare=False)
    data = rows(8)
    mirrored = 0
    for number, item in enumerate(prepare_dataset(data, options)):
        pixels = np.asarray(data[number]["source"])
        assert np.array_equal(np.asarray(item["source"]), pixels[:, ::-1] if item["is_mirrored"] else pixels)
        mirrored += item["is_mirrored"]
    assert 0 < mirrored < 8


def test_a_missing_source_is_counted_and_its_pair_replaced(caplog):
    features = datasets.Features({"prompt": datasets.Value("string")})
    features |= dict.fromkeys(("chosen", "rejected", "source"), datasets.Image())
    data = rows(3)
    data[1]["source"] = None
    table = datasets.Dataset.from_list(data, features=datasets.Features(features))
    prepared = prepare_dataset(table, PairOptions(PairTransform(16), verify_images="none", compare=False))
    assert prepared[1]["row"] == 2
    assert prepared.report.undecodable == 1 and "source" in caplog.text


def test_a_text_column_named_source_is_no_image():
    data = [{**row, "source": "web"} for row in rows(2)]
    options = PairOptions(PairTransform(16), verify_images="none", compare=False)
    assert not prepare_dataset(data, options).has_sources


def test_preference_guidance_combines_predictions_of_edits(kontext, recorded):
    add_lora(kontext.transformer, LoraConfig(r=4, target_modules=["to_q", "to_v"]), (), seed=0)
    with torch.no_grad():
        for name, weight in kontext.transformer.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    steps = recorded(kontext)
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 16, "width": 16, "max_area": 256}
    for scale in (0.0, 1.0, 2.0):
        with torch.no_grad(), preference_guidance(kontext, scale=scale):
            generator = torch.Generator().manual_seed(0)
            kontext(image=image(0, 21, 45), prompt="red", generator=generator, output_type="latent", **call)
    base, tuned, guided = (prediction for prediction, *_ in steps)
    assert not torch.allclose(base, tuned)
    torch.testing.assert_close(guided, base + 2 * (tuned - base))


def test_bad_combinations_are_refused(kontext, make_args, make_trainer, make_pairs):
    with pytest.raises(ValueError, match="source"):
        make_trainer(train=rows())  # a text-to-image model
    with pytest.raises(ValueError, match="source"):
        DiffusionSDPOTrainer(kontext, None, edit_args(make_args), make_pairs())
    for setting in ({"precompute_latents": True}, {"sample_prompts": ["a"]}, {"random_crop": True}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            DiffusionSDPOTrainer(kontext, None, edit_args(make_args, **setting), rows())
    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        DiffusionSDPOTrainer(kontext, None, edit_args(make_args, per_device_train_batch_size=2), rows())
    stream = datasets.Dataset.from_list(rows(2)).to_iterable_dataset()
    with pytest.raises(ValueError, match="source"):
        prepare_dataset(stream, PairOptions(PairTransform(16), compare=False))

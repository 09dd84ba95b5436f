"""Edit models: source images beside the prompt."""

from dataclasses import replace

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
from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21
from peft import LoraConfig
from PIL import Image
from tiny_pipelines import case, quiet
from tiny_pipelines.parts import enlarged
from transformers import BatchFeature
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trl_diffusion_sdpo import DiffusionSDPOTrainer
from trl_diffusion_sdpo.data import PairMixture, PairOptions, PairTransform, prepare_dataset
from trl_diffusion_sdpo.data.buckets import AspectRatioBuckets
from trl_diffusion_sdpo.data.images import ImageReader
from trl_diffusion_sdpo.data.transforms import PairDraws
from trl_diffusion_sdpo.families import find_family
from trl_diffusion_sdpo.families.packing import unpack_patches
from trl_diffusion_sdpo.models.adapters import add_lora
from trl_diffusion_sdpo.tools.guidance import preference_guidance

LORA = LoraConfig(r=4, lora_alpha=8)
MODULES = (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus, pipeline_qwenimage21, pipeline_longcat_image_edit)
DIMENSIONS = {module: module.calculate_dimensions for module in MODULES}  # as published


class VisionProcessor:
    """The image processor and tokenizer of a Qwen model with vision. The joint processor needs torchvision."""

    def __init__(self, tokenizer, patch_size=14):
        self.tokenizer = tokenizer
        self.image_processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, patch_size=patch_size)

    def __call__(self, text, return_tensors, images=None, **options):
        if images is None:
            return BatchFeature(dict(self.tokenizer(text, return_tensors=return_tensors, **options)))
        seen = self.image_processor(images=images, return_tensors=return_tensors)
        counts = iter(seen["image_grid_thw"].prod(1).tolist())
        first, *others = text[0].split("<|image_pad|>")
        slots = ["<|image_pad|>" * (next(counts) // self.image_processor.merge_size**2) + other for other in others]
        tokens = self.tokenizer([first + "".join(slots)], return_tensors=return_tensors, **options)
        is_image = tokens["input_ids"] == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        kinds = {"mm_token_type_ids": is_image.long()} if "padding_side" in options else {}  # of Qwen3-VL
        return BatchFeature({**tokens, **seen, **kinds})


class EditModel:
    """A tiny edit pipeline, with the arguments of its call and the size of its images."""

    def __init__(self, name, monkeypatch):
        self.number = 2 if name in SEVERAL else 1  # of sources
        self.is_packed = True  # whether a token has two by two latents
        self.size, self.resolution = (16, 16), 16
        self.call = {"height": 16, "width": 16}
        if name == "kontext":
            monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(16, 32), (24, 24), (32, 16)])
            self.pipeline = FluxKontextPipeline(**case("flux").build().components)
            self.call |= {"guidance_scale": 1.0, "max_area": 256}
        elif name.startswith("flux2"):
            self.is_packed = False
            self.pipeline = case(name).build()
            self.call |= case(name).CALL
        elif name.startswith("qwen_image_21"):
            _shrink(pipeline_qwenimage21, monkeypatch)
            self.is_packed = False
            self.size, self.resolution = (64, 96), 64
            self.call = {"height": 64, "width": 96, "true_cfg_scale": 1.0, "use_kv_cache": "cached" in name}
            self.pipeline = case("qwen_image_21").build()
            tokenizer = self.pipeline.processor.tokenizer
            self.pipeline.text_encoder.config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
            self.pipeline.processor = VisionProcessor(tokenizer, patch_size=16)
        elif name == "longcat":
            _shrink(pipeline_longcat_image_edit, monkeypatch)
            self.size, self.resolution = (64, 80), 32
            self.call = {"guidance_scale": 1.0}  # the size is that of the source
            parts = case("longcat_image").build().components
            processor = VisionProcessor(parts["tokenizer"])
            self.pipeline = LongCatImageEditPipeline(**parts | {"text_processor": processor})
        else:
            self.size, self.resolution = (32, 48), 32
            self.call = {"height": 32, "width": 48, "true_cfg_scale": 1.0}
            parts = dict(case("qwen_image").build().components)
            if name == "qwen_edit_2511":
                config = {key: value for key, value in parts["transformer"].config.items() if key[0] != "_"}
                parts["transformer"] = enlarged(type(parts["transformer"])(**config | {"zero_cond_t": True}))
            module, kind = pipeline_qwenimage_edit_plus, QwenImageEditPlusPipeline
            if name == "qwen_edit":
                module, kind = pipeline_qwenimage_edit, QwenImageEditPipeline
            _shrink(module, monkeypatch)
            self.pipeline = kind(**parts, processor=None)
            self.pipeline.processor = VisionProcessor(self.pipeline.tokenizer)
        self.pipeline = quiet(self.pipeline)
        self.sources = [image(0, 69, 93), image(1, 93, 69)][: self.number]
        self._monkeypatch = monkeypatch

    def steps(self, **call):
        """The prediction, timestep and sample of each step of the pipeline's own call."""
        recorded = []
        step = self.pipeline.scheduler.step

        def record(prediction, timestep, sample, **options):
            recorded.append((prediction, timestep, sample))
            return step(prediction, timestep, sample, **options)

        with self._monkeypatch.context() as patched, torch.no_grad():
            patched.setattr(self.pipeline.scheduler, "step", record)
            source = self.sources if self.number > 1 else self.sources[0]
            call = {"image": source, "prompt": "make it red", "output_type": "latent", **self.call, **call}
            self.pipeline(num_inference_steps=2, **call)
        assert len(recorded) == 2
        return recorded

    def latents(self, tokens):
        family = find_family(self.pipeline)
        height, width = (side // family.vae_scale_factor for side in self.size)
        if self.is_packed:
            return unpack_patches(tokens, height, width)
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def rows(self, count=4, **columns):
        """Pairs whose sources have one size, but not that of the images."""
        seeds = [range(100 + row, 1000, 100)[: self.number] for row in range(count)]
        sources = [[image(seed, 20 + 5 * i, 44) for i, seed in enumerate(of_row)] for of_row in seeds]
        column = [of_row if self.number > 1 else of_row[0] for of_row in sources]
        return [{**row, "source": source, **columns} for row, source in zip(rows(count), column, strict=True)]


def _shrink(module, monkeypatch):
    """Make a pipeline resize sources to a 256th of their published area."""
    dimensions = DIMENSIONS[module]
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: dimensions(area // 256, ratio))


SIDES = ("chosen", "rejected")
SEVERAL = ("flux2", "flux2_klein", "qwen_edit_plus", "qwen_edit_2511", "qwen_image_21", "qwen_image_21_cached")
MODELS = ("kontext", "longcat", "qwen_edit", *SEVERAL)


@pytest.fixture
def model(request, monkeypatch):
    return EditModel(request.param, monkeypatch)


each_model = pytest.mark.parametrize("model", MODELS, indirect=True)


@pytest.fixture
def kontext(monkeypatch):
    """A tiny Kontext pipeline whose preferred resolutions are as small."""
    return EditModel("kontext", monkeypatch).pipeline


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


@each_model
def test_predict_reproduces_what_the_pipeline_hands_to_its_scheduler(model):
    family = find_family(model.pipeline)
    with torch.no_grad():
        conditioning = family.encode_edits(["make it red"], [model.sources])
        for prediction, timestep, sample in model.steps():
            ours = family.predict(family.denoiser, model.latents(sample), timestep.expand(1), conditioning)
            torch.testing.assert_close(ours, model.latents(prediction), rtol=1e-5, atol=1e-5)


@each_model
def test_every_edit_model_trains_from_the_reference_on(model, make_args):
    lora = None if isinstance(model.pipeline, FluxKontextPipeline) else LORA
    args = edit_args(make_args, resolution=model.resolution, safeguard="parameter")
    trainer = DiffusionSDPOTrainer(model.pipeline, None, args, model.rows(), peft_config=lora)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0 and trainer.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize("name", ["kontext", "kontext, wide images in buckets", "qwen_image_21"])
def test_a_run_from_the_cache_is_that_without_and_reads_no_source(name, make_args, monkeypatch):
    """With flips and dropped prompts, to the bit. The cache has what two epochs draw, and a longer run adds to it."""
    encoded = []

    def logs(**settings):
        model_name, *is_wide = name.split(",")
        model = EditModel(model_name, monkeypatch)
        data = model.rows(3)
        settings = {"num_train_epochs": 2} | settings | {"max_steps": -1, "proportion_empty_prompts": 0.4}
        settings |= {"resolution": model.resolution}
        if is_wide:  # cropped together
            sizes = [(30, 61), (30, 61), (61, 30)]
            images = [{name: image(i, *size) for i, name in enumerate((*SIDES, "source"))} for size in sizes]
            data = [row | each for row, each in zip(data, images, strict=True)]
            settings |= {"aspect_ratio_buckets": True, "bucket_kwargs": {"step": 8}, "resolution": 32}
            settings |= {"per_device_train_batch_size": 2}
        args = edit_args(make_args, **settings)
        trainer = DiffusionSDPOTrainer(model.pipeline, None, args, data, peft_config=LORA)
        if trainer.encoding is not None:
            report = trainer.encoding.report
            encoded.append((report.encoded_images, report.encoded_prompts))
        trainer.train()
        history = trainer.state.log_history[:-1]  # the last entry has times
        return [{name: value for name, value in entry.items() if "flos" not in name} for entry in history]

    expected = logs()
    assert logs(precompute_latents=True) == expected
    seed = make_args().seed
    draws = [(pair, PairDraws.from_key(seed, epoch, pair)) for epoch in (0, 1) for pair in range(3)]
    flips = {(pair, draw.flip < 0.5) for pair, draw in draws}
    edits = {(pair, draw.flip < 0.5, draw.dropout < 0.4) for pair, draw in draws}
    assert encoded == [(2 * len(flips), len(edits))] and len(edits) < 12
    with monkeypatch.context() as patched:
        patched.setattr(ImageReader, "decode", None)
        assert logs(precompute_latents=True) == expected and encoded[-1] == (0, 0)
    live = logs(num_train_epochs=3)
    assert logs(num_train_epochs=3, precompute_latents=True) == live
    assert encoded[-1] == (12 - 2 * len(flips), 12 - len(edits))


def test_a_source_that_cannot_be_encoded_is_counted_and_its_pair_replaced(kontext, make_args, caplog):
    data = rows(3)
    data[1]["source"] = b"no image"
    args = edit_args(make_args, precompute_latents=True)
    trainer = DiffusionSDPOTrainer(kontext, None, args, data, peft_config=LORA)
    assert trainer.train_dataset[1]["row"] == 2
    assert trainer.train_dataset.report.undecodable == 1 and "row 1 has a source" in caplog.text


@each_model
def test_preference_guidance_combines_predictions_of_edits(model):
    denoiser = model.pipeline.transformer
    add_lora(denoiser, LoraConfig(r=4, target_modules=["to_q", "to_v"]), (), seed=0)
    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    predictions = []
    for scale in (0.0, 1.0, 2.0):
        with preference_guidance(model.pipeline, scale=scale):
            step, _ = model.steps(generator=torch.Generator().manual_seed(0))
        predictions.append(step[0])
    base, tuned, guided = predictions
    assert not torch.allclose(base, tuned)
    torch.testing.assert_close(guided, base + 2 * (tuned - base))


@pytest.mark.parametrize("model", ["kontext", "longcat"], indirect=True)
def test_sample_images_edit_their_sources_and_the_card_shows_how(model, make_args, tmp_path):
    model.sources[0].save(tmp_path / "source.png")
    samples = {"sample_prompts": ["make it red"], "sample_sources": [str(tmp_path / "source.png")]}
    samples["sample_kwargs"] = {"num_inference_steps": 2}
    args = edit_args(make_args, resolution=model.resolution, max_steps=1, **samples)
    trainer = DiffusionSDPOTrainer(model.pipeline, None, args, model.rows(2), peft_config=LORA)
    trainer.train()
    folder = tmp_path / "run"
    before, after = (Image.open(folder / "samples" / f"step-00000{step}-0.png") for step in (0, 1))
    side = (80, 64) if "LongCat" in type(model.pipeline).__name__ else (model.resolution, model.resolution)
    assert before.size == after.size == side and np.any(np.asarray(before) != np.asarray(after))
    # Cropped to the shape of the sample image, unless the source determines that shape.
    shown = model.sources[0].size if "LongCat" in type(model.pipeline).__name__ else side
    assert Image.open(folder / "samples" / "source-0.png").size == shown
    card = (folder / "README.md").read_text()
    assert "image=load_image(" in card and "samples/source-0.png" in card


def test_the_source_is_mirrored_with_its_pair():
    options = PairOptions(PairTransform(16, center_crop=False, random_flip=True), verify_images="none")
    data = rows(8)
    items = list(prepare_dataset(data, options))
    for row, item in zip(data, items, strict=True):
        pixels, (source,) = np.asarray(row["source"]), map(np.asarray, item["sources"])
        assert np.array_equal(source, pixels[:, ::-1] if item["is_mirrored"] else pixels)
    assert 0 < sum(item["is_mirrored"] for item in items) < 8


def paint(size, color, around="blue"):
    """An image of `size` (width, height) whose central square has another color than the rest."""
    painted = Image.new("RGB", size, around)
    side = min(size) + 8  # so that no other color is blended in at the edges
    painted.paste(color, ((size[0] - side) // 2, (size[1] - side) // 2, (size[0] + side) // 2, (size[1] + side) // 2))
    return painted


@pytest.mark.parametrize("size", [(128, 64), (64, 128), (256, 128), (64, 64)])
def test_a_source_shows_the_part_of_the_picture_that_its_pair_shows(size):
    """At 64 pixels, the pair is the central square of 128 x 64 pixels, so the source must be that square too."""
    edited = paint((128, 64) if size == (256, 128) else size, "red")
    row = {"prompt": "edit", "source": paint(size, "red"), "chosen": edited, "rejected": edited}
    (item,) = prepare_dataset([row], PairOptions(PairTransform(64)))
    (source,) = item["sources"]
    assert item["pixel_values"][0].flatten(1).unique(dim=1).flatten().tolist() == [255, 0, 0]
    assert source.getcolors() == [(64 * 64, (255, 0, 0))]


def test_sources_are_cropped_and_flipped_as_their_pair_to_the_pixel_in_buckets_too(caplog):
    """The first source is the winner itself; the second one, of another shape, stays whole."""
    sizes = [(30, 61), (44, 33), (33, 44), (40, 40)]
    pairs = [{side: image(9 * i + j, *size) for j, side in enumerate(SIDES)} for i, size in enumerate(sizes)]
    data = [{"prompt": "edit", "source": [pair["chosen"], image(7, 20, 50)], **pair} for pair in pairs]
    data[3]["source"] = data[3]["source"][:1]
    for buckets in (None, AspectRatioBuckets((32, 32), step=8)):
        transform = PairTransform(32, center_crop=False, random_flip=True)
        dataset = prepare_dataset(data, PairOptions(transform, buckets=buckets))
        flipped = set()
        for epoch in range(3):
            dataset.set_epoch(epoch)
            for row, item in zip(data, list(dataset), strict=True):
                winner, (source, *others) = item["pixel_values"][0].permute(1, 2, 0), item["sources"]
                assert np.array_equal(source, winner)
                flipped.add(item["is_mirrored"])
                for other in others:
                    whole = np.asarray(row["source"][1])
                    assert np.array_equal(other, whole[:, ::-1] if item["is_mirrored"] else whole)
        assert flipped == {True, False}
        assert any("3 of 4 pairs" in note for note in dataset.report.notes) and "3 of 4 pairs" in caplog.text


@pytest.mark.parametrize("precompute_latents", [False, True])
@pytest.mark.parametrize("fewer", [0, 1])
def test_one_and_two_sources_in_a_batch_are_refused_at_the_start(fewer, precompute_latents, monkeypatch, make_args):
    """Whichever row comes first. In batches of one pair, all sources train."""
    model = EditModel("flux2_klein", monkeypatch)
    data = model.rows(2)
    data[fewer]["source"] = data[fewer]["source"][:1]
    settings = {"resolution": model.resolution, "precompute_latents": precompute_latents}
    with pytest.raises(ValueError, match="same number of source images"):
        args = edit_args(make_args, per_device_train_batch_size=2, **settings)
        DiffusionSDPOTrainer(model.pipeline, None, args, data, peft_config=LORA)
    trainer = DiffusionSDPOTrainer(model.pipeline, None, edit_args(make_args, **settings), data)
    trainer.train()
    assert trainer.state.global_step == 2


# ---- Single images, each with its own source and prompt


def judged_edits(model, count=4, **columns):
    rows = [row | {"image": row["chosen"], "label": i % 2 == 0, **columns} for i, row in enumerate(model.rows(count))]
    return [{name: value for name, value in row.items() if name not in SIDES} for row in rows]


@pytest.mark.parametrize("model", ["kontext", "longcat", "qwen_edit", "flux2_klein", "qwen_edit_plus"], indirect=True)
def test_each_half_of_a_matched_pair_is_predicted_with_its_own_prompt_and_source(model, make_args):
    """As if it were alone."""
    data = judged_edits(model)
    settings = {"resolution": model.resolution, "loss_type": "tgo", "per_device_train_batch_size": 2}
    settings |= {"random_flip": False, "bf16": False}
    trainer = DiffusionSDPOTrainer(model.pipeline, None, edit_args(make_args, **settings), data)
    pairs = trainer.train_dataset
    inputs = trainer._inputs_of([pairs[0], pairs[1]])
    rows = [data[row] for row in pairs.positions[:2, [0, 2]].T.reshape(-1).tolist()]
    assert [row["label"] for row in rows] == [True, True, False, False]
    forward, family = trainer.pair_forward, trainer.pair_forward.family
    with torch.no_grad():
        batch = forward.noisy_batch(inputs)
        together = forward.predict(trainer.denoiser, batch)
        for i, row in enumerate(rows):
            sources = row["source"] if model.number > 1 else [row["source"]]
            for seen in (sources, [image(77, *each.size[::-1]) for each in sources]):
                encoded = family.encode_edits([row["prompt"]], [seen])
                alone = forward.predict(trainer.denoiser, replace(batch.take(slice(i, i + 1)), conditioning=encoded))
                assert torch.allclose(together[i], alone[0], rtol=1e-4, atol=1e-5) == (seen is sources)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize("name", ["kontext", "kontext, in buckets", "flux2_klein"])
def test_single_edits_train_and_are_evaluated_from_the_cache_as_without(name, make_args, monkeypatch):
    """With flips and dropped prompts, beside pairs, to the bit."""

    def logs(**settings):
        model_name, *in_buckets = name.split(",")
        model = EditModel(model_name, monkeypatch)
        single = judged_edits(model, 5)
        settings |= {"max_steps": -1, "num_train_epochs": 2, "proportion_empty_prompts": 0.4, "loss_type": "tgo"}
        settings |= {"resolution": model.resolution, "per_device_train_batch_size": 2}
        data = PairMixture([datasets.Dataset.from_list(single), datasets.Dataset.from_list(model.rows(2))])
        if in_buckets:  # cropped together
            sizes = [(30, 61), (30, 61), (61, 30), (61, 30), (30, 61)]
            images = [
                {n: image(j, *size) for j, n in ((i, "image"), (9 + i, "source"))} for i, size in enumerate(sizes)
            ]
            data = single = [row | each for row, each in zip(single, images, strict=True)]
            settings |= {"aspect_ratio_buckets": True, "bucket_kwargs": {"step": 8}, "resolution": 32}
        args = edit_args(make_args, **settings)
        trainer = DiffusionSDPOTrainer(model.pipeline, None, args, data, single, peft_config=LORA)
        trainer.train()
        trainer.evaluate()
        history = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
        return [
            {k: v for k, v in each.items() if not {"flos", "runtime", "second"} & set(k.split("_"))}
            for each in history
        ]

    expected = logs()
    assert "eval_loss" in expected[-1] and len(expected) > 3
    assert logs(precompute_latents=True) == expected
    if name == "kontext":
        found = logs(precompute_ref_errors=True, precompute_epochs=2)  # in other batches, which round differently
        losses = [[entry["loss"] for entry in entries if "loss" in entry] for entries in (found, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    monkeypatch.setattr(ImageReader, "decode", None)
    assert logs(precompute_latents=True) == expected


def test_a_source_is_cropped_and_flipped_as_its_own_image_in_buckets_too():
    """Each source is its image, and images of a bucket have other shapes than that with which they are matched."""
    sizes = [(30, 61), (44, 33), (33, 44), (40, 40), (61, 30), (30, 60)]
    images = [image(i, *size) for i, size in enumerate(sizes)]
    data = [{"prompt": "p", "image": each, "source": each, "label": i % 2} for i, each in enumerate(images)]
    for buckets in (None, AspectRatioBuckets((32, 32), step=8)):
        transform = PairTransform(32, center_crop=False, random_flip=True)
        dataset = prepare_dataset(data, PairOptions(transform, buckets=buckets))
        assert not dataset.report.notes or buckets
        flipped = set()
        for epoch in range(3):
            dataset.set_epoch(epoch)
            for item in dataset:
                for pixels, (source,) in zip(
                    item["pixel_values"], (item["sources"], item["loser_sources"]), strict=True
                ):
                    assert np.array_equal(source, pixels.permute(1, 2, 0))
                flipped.add(item["is_mirrored"])
        assert flipped == {True, False}


def test_an_edit_without_a_source_costs_its_pair(kontext, make_args, caplog):
    data = [{"prompt": "p", "image": image(i), "source": image(9 + i, 20, 44), "label": i < 2} for i in range(4)]
    data[3]["source"] = b"no image"
    for cached in (False, True):
        args = edit_args(make_args, precompute_latents=cached, loss_type="tgo")
        trainer = DiffusionSDPOTrainer(kontext, None, args, data, peft_config=None if cached else LORA)
        bad = int(np.flatnonzero(trainer.train_dataset.positions[:, 2] == 3)[0])
        assert trainer.train_dataset[bad]["row"] == 1 - bad and trainer.train_dataset.report.undecodable == 1
    assert "row 3 has a source" in caplog.text


def test_sources_of_matched_images_must_have_one_size_even_in_batches_of_one_pair(kontext, make_args):
    sources = [image(9 + i, *size) for i, size in enumerate([(20, 44), (44, 20)])]
    data = [{"prompt": "p", "image": image(i), "source": sources[i], "label": i} for i in range(2)]
    with pytest.raises(ValueError, match="Single images are matched, so all of theirs must be equal"):
        DiffusionSDPOTrainer(kontext, None, edit_args(make_args, loss_type="tgo"), data, peft_config=LORA)


def test_a_winner_budget_measures_sources_of_several_sizes_one_pair_at_a_time(kontext, make_args):
    data = [*rows(1), *rows(1, source_size=(44, 20))] * 2
    budget = {"winner_budget": 0.5, "winner_budget_kwargs": {"pairs": 4, "steps": 1}}
    args = edit_args(make_args, per_device_eval_batch_size=1, max_steps=2, **budget)
    trainer = DiffusionSDPOTrainer(kontext, None, args, data, peft_config=LORA)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("precompute_latents", [False, True])
def test_sources_of_one_size_train_in_larger_batches_and_others_are_refused(kontext, make_args, precompute_latents):
    settings = {"per_device_train_batch_size": 2, "max_steps": 2, "precompute_latents": precompute_latents}
    args = edit_args(make_args, **settings)
    different = [*rows(3), *rows(1, source_size=(44, 20))]
    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        DiffusionSDPOTrainer(kontext, None, args, different, peft_config=LORA)
    near = [*rows(3), *rows(1, source_size=(22, 44))]  # the nearest preferred resolution is the same
    trainer = DiffusionSDPOTrainer(kontext, None, args, near)  # trains the LoRA of the first trainer further
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0


@pytest.mark.parametrize(
    ("settings", "columns", "match"),
    [
        ({"random_crop": True}, {}, "random_crop"),
        ({"sample_prompts": ["a"]}, {}, "sample_sources"),
        ({"sample_prompts": ["a"], "sample_sources": ["a.png", "b.png"]}, {}, "sample_sources"),
        ({"sample_prompts": ["a"], "sample_sources": ["missing.png"]}, {}, "missing.png"),
        ({}, {"source": "web"}, "source"),  # a column of text
    ],
)
def test_wrong_settings_and_sources_are_refused(settings, columns, match, kontext, make_args):
    with pytest.raises(ValueError, match=match):
        DiffusionSDPOTrainer(kontext, None, edit_args(make_args, **settings), rows(**columns))


def test_two_sources_are_refused_by_a_model_that_takes_one(kontext, make_args):
    with pytest.raises(ValueError, match="one source image"):
        DiffusionSDPOTrainer(kontext, None, edit_args(make_args), rows(source=[image(8), image(9)]))


def test_wrong_models_are_refused(make_trainer):
    with pytest.raises(ValueError, match="source"):
        make_trainer(train=rows())  # a text-to-image model
    with pytest.raises(ValueError, match="sample_sources"):
        make_trainer(sample_prompts=["a"], sample_sources=["a.png"])
    stream = datasets.Dataset.from_list(rows(2)).to_iterable_dataset()
    with pytest.raises(ValueError, match="source"):
        prepare_dataset(stream, PairOptions(PairTransform(16)))

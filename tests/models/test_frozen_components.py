"""The VAE's precision, and how many images it encodes at once."""

import copy
import functools

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import CASES, case
from tiny_pipelines.parts import kl_vae

from trl_diffusion_sdpo.demo.pipeline import load_base_pipeline
from trl_diffusion_sdpo.families import base, find_family, load_pipeline
from trl_diffusion_sdpo.models import frozen_components
from trl_diffusion_sdpo.models.frozen_components import cast_copy, pin, working_pipeline

IN_CI = ("stable_diffusion", "sana", "wan")  # one for each kind of VAE
HALVES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FULL, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def working_vae(pipeline, wanted="auto", mixed_precision="no"):
    half = HALVES[mixed_precision]
    cpu = torch.device("cpu")
    return working_pipeline(find_family(pipeline), device=cpu, half_dtype=half, vae_dtype=wanted).vae


def encode(family, pixels, seeds):
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        return family.encode_images(pixels, [*streams, *streams])


@pytest.mark.parametrize("overflows", [True, False])
@pytest.mark.parametrize(
    ("wanted", "precision", "loaded", "expected"),
    [
        ("auto", "no", FULL, FULL),
        ("auto", "bf16", FULL, BF16),  # float32's range: nothing overflows there
        ("auto", "fp16", FULL, {True: FULL, False: FP16}),
        ("auto", "bf16", FP16, {True: BF16, False: FP16}),
        ("auto", "fp16", FP16, {True: FULL, False: FP16}),
        ("auto", "fp16", BF16, BF16),
        ("float32", "bf16", FULL, FULL),
        ("float32", "fp16", FP16, FULL),
        ("bfloat16", "no", FULL, BF16),
        ("bfloat16", "fp16", FULL, BF16),
        ("float16", "bf16", FULL, FP16),
        ("float16", "fp16", FP16, FP16),
    ],
)
def test_the_vae_runs_in_the_precision_of_autocast_unless_it_overflows_there(
    sd_pipeline, overflows, wanted, precision, loaded, expected
):
    sd_pipeline.register_modules(vae=kl_vae(force_upcast=overflows).to(loaded))
    vae = working_vae(sd_pipeline, wanted, precision)
    assert vae.dtype == (expected[overflows] if isinstance(expected, dict) else expected)
    assert sd_pipeline.vae.dtype == loaded and sd_pipeline.vae.config.force_upcast == overflows


def test_a_vae_that_keeps_its_precision_is_not_copied(sd_pipeline):
    assert working_vae(sd_pipeline) is sd_pipeline.vae
    assert working_vae(sd_pipeline, "float32", "bf16") is sd_pipeline.vae


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"offload_frozen_components": True}])
def test_convolutions_of_the_vae_have_channels_last_and_saved_ones_do_not(make_trainer, tmp_path, settings):
    trainer = make_trainer(**settings)
    with trainer.frozen_components.in_use() as family:
        kernel = family.pipeline.vae.encoder.conv_in.weight
        assert kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()
    trainer.pipeline.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")["encoder.conv_in.weight"]
    assert torch.equal(saved, trainer.pipeline.vae.encoder.conv_in.weight)


def test_what_overflows_runs_in_float16_if_one_insists_and_says_so(sd_pipeline, caplog):
    """Otherwise its weights would be lent in float32 for every batch."""
    sd_pipeline.vae.register_to_config(force_upcast=True)
    ran = []
    vae = working_vae(sd_pipeline, "float16", "bf16")
    vae.encoder.register_forward_pre_hook(lambda part, args: ran.append(args[0].dtype))
    sd_pipeline.register_modules(vae=vae)
    encode(find_family(sd_pipeline), torch.zeros(2, 3, 16, 16), [0])
    assert ran == [FP16]
    assert "it overflows there (`force_upcast`)" in caplog.text


def test_training_in_bf16_encodes_in_bf16_unless_told_otherwise(make_trainer, sd_folder, caplog):
    trainer = make_trainer(bf16=True, max_steps=2, save_strategy="steps", save_steps=1)
    assert trainer.family.pipeline.vae.dtype == BF16 and trainer.pipeline.vae.dtype == FULL
    assert trainer.args.vae_dtype == "bfloat16"
    trainer.train()
    other = make_trainer(bf16=True, max_steps=2, vae_dtype="float32")
    assert other.family.pipeline.vae.dtype == FULL
    other.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-1")
    assert "Resuming with another `vae_dtype`: it was 'bfloat16', is 'float32'." in caplog.text


@pytest.mark.parametrize(
    "name", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.matrix) for name in CASES]
)
def test_latents_do_not_depend_on_how_many_images_are_encoded_at_once(name, whole_latents):
    """A stream draws for a pair's winner and then for its loser, so the order of the draws counts."""
    family, pixels, whole = whole_latents(name)
    family.vae_encode_batch_size = 4
    torch.testing.assert_close(encode(family, pixels, [1, 2, 3]), whole, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def whole_latents(family_folder):
    """`whole_latents(name)`: a family, six images, and their latents, encoded together."""

    @functools.cache
    def build(name):
        family = find_family(load_pipeline(family_folder(name)))
        side = case(name).RESOLUTION
        pixels = torch.rand(6, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return family, pixels, encode(family, pixels, [1, 2, 3])

    return build


def test_the_vae_meets_no_more_images_than_it_is_told_and_casts_no_more(make_trainer):
    trainer = make_trainer(bf16=True, max_steps=1, vae_encode_batch_size=3)
    met = []
    trainer.family.pipeline.vae.encoder.register_forward_pre_hook(
        lambda part, args: met.append((len(args[0]), args[0].dtype))
    )
    trainer.train()
    assert met == [(3, BF16), (3, BF16), (2, BF16)]  # four pairs


def test_by_default_the_vae_meets_a_bounded_number_of_pixels(make_trainer, monkeypatch):
    met = []
    monkeypatch.setattr(base, "PIXELS_AT_ONCE", 3 * 16 * 16)
    trainer = make_trainer(max_steps=1)
    trainer.family.pipeline.vae.encoder.register_forward_pre_hook(lambda part, args: met.append(len(args[0])))
    trainer.train()
    assert met == [3, 3, 2]  # four pairs


def peak_of_encoding(family, pixels) -> int:
    """Bytes that are held at most beyond those at the beginning, by PyTorch's profiler."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        encode(family, pixels, range(len(pixels) // 2))
    return peak_of(profiler)


def peak_of(profiler) -> int:
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_fewer_images_at_once_need_less_memory():
    family = find_family(load_base_pipeline())
    pixels = torch.zeros(16, 3, 32, 32)
    whole = peak_of_encoding(family, pixels)
    family.vae_encode_batch_size = 2
    assert peak_of_encoding(family, pixels) < whole / 4


def test_pinned_memory_is_little_more_than_what_is_pinned(monkeypatch):
    """Each piece is rounded up to a power of two, which would take 40 GB for the 24 GB of these sizes."""
    pieces = []

    def allocate(size):
        pieces.append(1 << (size - 1).bit_length())
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(frozen_components, "pinned_bytes", allocate)
    monkeypatch.setattr(frozen_components, "PINNED_BUFFER", 1 << 16)
    tensors = [torch.randn(3, 5, 7).to(BF16), torch.arange(5), torch.zeros(0), torch.randn(())]
    tensors += [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)]
    tensors += [torch.full((3000,), float(number)) for number in range(60)]
    pinned = pin(tensors)
    for tensor, there in zip(tensors, pinned, strict=True):
        assert torch.equal(tensor, there) and tensor.dtype == there.dtype and tensor.stride() == there.stride()
    assert sum(pieces) < 1.15 * sum(tensor.nbytes for tensor in tensors)


def test_a_copy_in_another_precision_needs_no_copy_in_that_of_the_original(sd_pipeline):
    text_encoder = sd_pipeline.text_encoder.requires_grad_(False)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        cast_copy(text_encoder, BF16)
    size = sum(weight.nbytes for weight in text_encoder.parameters())
    assert peak_of(profiler) < 0.7 * size
    copied = cast_copy(text_encoder, BF16)
    plain = copy.deepcopy(text_encoder).to(BF16)
    assert copied.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in copied.state_dict().items())
    assert {value.dtype for value in text_encoder.parameters()} == {FULL}

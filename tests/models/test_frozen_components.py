"""The VAE's precision, and how many images it encodes at once."""

import functools

import pytest
import torch
from tiny_pipelines import CASES, case
from tiny_pipelines.parts import kl_vae

from trl_diffusion_sdpo.families import find_family
from trl_diffusion_sdpo.models import frozen_components
from trl_diffusion_sdpo.models.frozen_components import pin, working_pipeline
from trl_diffusion_sdpo.models.pipelines import load_pipeline

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


@pytest.mark.parametrize(("dtype", "warns"), [("float16", True), ("auto", False)])
def test_a_vae_that_is_forced_into_a_precision_where_it_overflows_says_so(
    make_trainer, sd_pipeline, caplog, dtype, warns
):
    sd_pipeline.register_modules(vae=kl_vae(force_upcast=True))
    make_trainer(model=sd_pipeline, vae_dtype=dtype)
    assert any("`vae_dtype='float16'`" in record.message for record in caplog.records) == warns


def test_pinned_memory_is_little_more_than_what_is_pinned(monkeypatch):
    """PyTorch rounds each allocation of pinned memory up to a power of two. The sizes are those of a T5 encoder, in
    bytes in place of thousands, pinned in buffers of 2 ** 18 bytes: one large embedding, then squares of 33,600."""
    monkeypatch.setattr(frozen_components, "PINNED_BUFFER", 1 << 18)
    allocated = []

    def allocate(size):
        allocated.append(1 << (size - 1).bit_length())
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(frozen_components, "pinned_bytes", allocate)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(263_000 // 2, generator=generator).to(BF16)]
    tensors += [torch.randn(16_800, generator=generator).to(BF16) for _ in range(96)]
    tensors += [
        torch.randn(4, 6, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        torch.arange(5).expand(3, 5),  # a buffer whose values overlap
        torch.tensor(2.5),
        torch.empty(0),
    ]
    assert pin([]) == []
    copies = pin(tensors)
    for tensor, copied in zip(tensors, copies, strict=True):
        assert torch.equal(copied, tensor) and copied.dtype == tensor.dtype
    assert copies[-4].is_contiguous(memory_format=torch.channels_last)
    pinned_bytes_of_all = sum(tensor.nbytes for tensor in tensors)
    alone = sum(1 << (tensor.nbytes - 1).bit_length() for tensor in tensors if tensor.nbytes)
    assert alone > 1.9 * pinned_bytes_of_all and sum(allocated) < 1.25 * pinned_bytes_of_all

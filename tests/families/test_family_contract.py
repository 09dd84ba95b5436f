"""Stable Diffusion and SDXL: precisions, sizes, published defaults, and pipelines that are refused."""

from types import SimpleNamespace

import pytest
import torch

from trl_diffusion_sdpo.families import LossDefaults, family_for_class_name, find_family

PROMPTS = ["red circle", "blue square", ""]
RESOLUTION = 16


@pytest.fixture(params=["sd_pipeline", "sdxl_pipeline"])
def case(request):
    pipeline = request.getfixturevalue(request.param)
    return SimpleNamespace(pipeline=pipeline, family=find_family(pipeline))


def conditioning_of(family, prompts):
    """Return the family's conditioning, for sizes as the collator gives them."""
    n = len(prompts)
    sizes = family.size_conditioning(torch.tensor([[40, 24]] * n), torch.tensor([[3, 5]] * n), (16, 16))
    with torch.no_grad():
        return {**family.encode_prompts(prompts), **sizes}


def test_predict_casts_its_inputs_to_the_denoiser_but_keeps_time_ids_exact(case):
    case.pipeline.unet.to(torch.bfloat16)
    seen = []
    hook = case.pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    conditioning = conditioning_of(case.family, PROMPTS)
    if "time_ids" in conditioning:
        conditioning["time_ids"] += 1023  # bfloat16 would make it 1024
    with torch.no_grad():
        prediction = case.family.predict(
            case.family.denoiser, torch.ones(3, 4, 8, 8), torch.tensor([3, 420, 990]), conditioning
        )
    hook.remove()
    _, kwargs = seen[0]
    assert kwargs["sample"].dtype == kwargs["encoder_hidden_states"].dtype == prediction.dtype == torch.bfloat16
    added = kwargs.get("added_cond_kwargs", {})
    assert "time_ids" not in conditioning or torch.equal(added["time_ids"], conditioning["time_ids"])


def test_latents_follow_the_means_and_deviations_that_an_sdxl_vae_states(sdxl_pipeline):
    """The pipeline decodes encoded images to what the VAE alone gives back."""
    sdxl_pipeline.vae.register_to_config(latents_mean=[0.5, -1.0, 0.25, 2.0], latents_std=[2.0, 0.5, 1.5, 1.0])
    pixels = torch.rand(2, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(2)) * 2 - 1
    vae = sdxl_pipeline.vae
    with torch.no_grad():
        latents = find_family(sdxl_pipeline).encode_images(pixels)
        vae_alone = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    images = sdxl_pipeline(
        ["red", "blue"],
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="pt",
        callback_on_step_end=lambda *args: {"latents": latents},
    ).images
    torch.testing.assert_close(images, (vae_alone / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_half_precision_vae_that_overflows_is_lent_float32(case):
    vae = case.pipeline.vae.to(torch.float16)
    stored = {name: value.clone() for name, value in vae.state_dict().items()}
    dtypes = []
    hook = vae.encoder.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.no_grad():
        latents = case.family.encode_images(torch.zeros(1, 3, RESOLUTION, RESOLUTION))
    hook.remove()
    assert dtypes == [torch.float32]
    assert latents.dtype == torch.float32
    assert vae.dtype == torch.float16
    assert all(torch.equal(value, stored[name]) for name, value in vae.state_dict().items())


def test_default_resolution_is_the_pipelines_own(case, make_sd_pipeline):
    assert case.family.default_resolution == RESOLUTION
    assert case.family.vae_scale_factor == 2
    assert find_family(make_sd_pipeline(sample_size=(8, 12))).default_resolution == (16, 24)


def test_time_ids_are_original_size_then_crop_then_target_size(sdxl_pipeline):
    family = find_family(sdxl_pipeline)
    sizes = family.size_conditioning(torch.tensor([[768, 512], [1, 2]]), torch.tensor([[10, 20], [3, 4]]), (64, 96))
    expected = torch.tensor([[768.0, 512, 10, 20, 64, 96], [1, 2, 3, 4, 64, 96]])
    assert torch.equal(sizes["time_ids"], expected)


# arXiv 2511.03317, training details; the dspo row of SDXL is the SDXL form of the loss.
PUBLISHED = [
    ("StableDiffusionPipeline", "sigmoid", 5000.0, 0.9),
    ("StableDiffusionPipeline", "dmpo", 2000.0, 0.9),
    ("StableDiffusionPipeline", "dspo", 0.001, 0.2),
    ("StableDiffusionXLPipeline", "sigmoid", 5000.0, 0.6),
    ("StableDiffusionXLPipeline", "dmpo", 6000.0, 0.6),
    ("StableDiffusionXLPipeline", "dspo_sdxl", 5000.0, 0.6),
]


@pytest.mark.parametrize(("class_name", "loss_type", "beta", "mu"), PUBLISHED)
def test_published_settings_are_the_defaults(class_name, loss_type, beta, mu):
    assert family_for_class_name(class_name).loss_defaults(loss_type) == LossDefaults(beta, mu)


def test_a_unet_with_more_inputs_than_latents_is_refused(make_sd_pipeline):
    with pytest.raises(ValueError, match="has 9"):
        find_family(make_sd_pipeline(in_channels=9))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_pipeline_without_one_of_its_networks_is_refused(component, sd_pipeline):
    sd_pipeline.register_modules(**{component: None})
    with pytest.raises(ValueError, match=f"`{component}`"):
        find_family(sd_pipeline)


def test_a_unet_distilled_to_take_the_guidance_scale_is_refused(make_sd_pipeline):
    with pytest.raises(ValueError, match="distilled"):
        find_family(make_sd_pipeline(time_cond_proj_dim=8))


def test_an_sdxl_unet_that_takes_five_sizes_is_refused(make_sdxl_pipeline):
    refiner = make_sdxl_pipeline(projection_class_embeddings_input_dim=5 * 8 + 32)
    with pytest.raises(ValueError, match="72"):
        find_family(refiner)

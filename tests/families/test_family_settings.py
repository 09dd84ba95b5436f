"""Settings that act by the kind of model, through the real trainer: what reaches the denoiser, where timesteps are
drawn, how errors are weighed, precisions and sizes of Stable Diffusion, defaults, and refusals."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from tiny_pipelines import case, quiet

from trl_diffusion_sdpo.families import LossDefaults, family_for_class_name, find_family
from trl_diffusion_sdpo.models.loading import load_model
from trl_diffusion_sdpo.models.pipelines import load_pipeline

SEEDS = list(range(64))


@pytest.fixture
def trainer_of(make_trainer, make_pairs, family_folder):
    """`trainer_of(name, lora=True, **settings)`: a trainer around one tiny pipeline, at its own image size."""

    def build(name, lora=True, **settings):
        settings = {"resolution": case(name).RESOLUTION, "train": make_pairs(4), **settings}
        return make_trainer(family_folder(name), peft_config=LoraConfig(r=2) if lora else None, **settings)

    return build


def uniform_draws():
    """The first draw of each seed's stream: what a pair's timestep is made of."""
    return torch.cat([torch.rand(1, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])


def drawn_timesteps(trainer, channels=4, side=8):
    timesteps, _ = trainer.pair_forward.draw_noise(SEEDS, torch.zeros(2, channels, side, side))
    assert torch.equal(*timesteps.chunk(2))
    return timesteps[: len(SEEDS)]


# ---- Guidance as an input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "given", "expected"), [("flux", None, 1.0), ("flux2", 2.0, 2.0)])
def test_guidance_reaches_the_transformer_of_policy_and_reference(trainer_of, name, given, expected):
    trainer, met = trainer_of(name, guidance_scale=given, max_steps=1, safeguard="output"), []

    trainer.denoiser.register_forward_pre_hook(
        lambda module, args, inputs: met.append(inputs["guidance"]), with_kwargs=True
    )
    trainer.train()
    assert len(met) == 2
    assert all(guidance.tolist() == [expected] * 8 for guidance in met)


# ---- Where timesteps are drawn ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "used"), [(None, "logit_normal"), ("none", "none")])
def test_stable_diffusion_3_draws_logit_normal_levels_by_default(trainer_of, scheme, used):
    trainer = trainer_of("stable_diffusion_3", weighting_scheme=scheme)
    assert trainer.args.weighting_scheme == used
    levels = uniform_draws()
    if used == "logit_normal":
        levels = torch.distributions.Normal(0.0, 1.0).icdf(levels).sigmoid()
    expected = 1000 * 3 * levels / (1 + 2 * levels)  # its scheduler's shift is 3
    torch.testing.assert_close(drawn_timesteps(trainer, channels=16), expected, rtol=1e-4, atol=1e-2)


# Two by two latents are a token. mu is a line through (256, 0.5) and (4096, 1.15).
@pytest.mark.parametrize(("side", "mu"), [(8, 0.5 - 0.65 * 240 / 3840), (128, 1.15)])
def test_draws_for_flux_follow_the_shift_for_the_images_tokens(trainer_of, side, mu):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    expected = 1000 * scheduler.time_shift(mu, 1.0, uniform_draws())
    torch.testing.assert_close(drawn_timesteps(trainer_of("flux"), side=side), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("tokens", [16, 6400])
def test_krea_2_turbo_has_one_shift_for_all_sizes(tokens):
    process = find_family(case("krea2").build(is_distilled=True)).noise_process
    expected = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).time_shift(1.15, 1.0, torch.tensor([0.5]))
    torch.testing.assert_close(process.timesteps(torch.tensor([0.5]), image_seq_len=tokens), 1000 * expected)


def test_draws_for_ideogram_4_follow_the_schedule_of_its_call():
    pipeline = quiet(case("ideogram4").build())
    process = find_family(pipeline).noise_process
    for side in (16, 32):
        pipeline("a", side, side, num_inference_steps=4, output_type="latent", **case("ideogram4").CALL)
        shares = torch.tensor([0.75, 0.5, 0.25])
        tokens = (side // 4) ** 2  # a token is 4 x 4 pixels in this pipeline, and 16 x 16 in the published one
        drawn = process.timesteps(shares, image_seq_len=tokens // 16)
        torch.testing.assert_close(drawn, pipeline.scheduler.timesteps[1:], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("name", "only"), [("flux_schnell", [1000.0, 750.0, 500.0]), ("stable_diffusion", [999])])
def test_given_timesteps_are_the_only_ones(trainer_of, name, only):
    trainer = trainer_of(name, timesteps=only)
    assert trainer.args.weighting_scheme is None
    assert set(drawn_timesteps(trainer).tolist()) == set(only)


# ---- How errors are weighed -------------------------------------------------------------------------------------


def test_timestep_weighting_multiplies_the_errors(trainer_of, family_folder):
    reference = load_pipeline(family_folder("stable_diffusion_3"))
    with torch.no_grad():  # another reference, so that margins are not 0
        for parameter in reference.transformer.parameters():
            parameter.mul_(1.05)
    settings = {"lora": False, "ref_model": reference, "beta": 50.0, "timestep_weighting": "one_minus_t_squared"}
    trainer = trainer_of("stable_diffusion_3", **settings)
    inputs = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        predictions = trainer.pair_forward.predict_pairs(trainer.model, inputs)
        batch, policy, frozen = predictions.batch, predictions.policy, predictions.reference
        loss = trainer.compute_loss(trainer.model, inputs)
    weights = (1 - batch.timesteps[:4] / 1000) ** 2
    errors, ref_errors = ((seen - batch.target).square().mean((1, 2, 3)) for seen in (policy, frozen))
    winner, loser = (errors - ref_errors).chunk(2)
    expected = torch.log1p(torch.exp(25 * weights * (winner - loser))).mean()
    assert (winner - loser).abs().min() > 1e-5
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


# ---- What is refused before training ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("flux", {"timestep_weighting": "min_snr"}, "min_snr"),
        ("stable_diffusion", {"timestep_weighting": "one_minus_t_squared"}, "`timestep_weighting"),
        ("flux", {"timesteps": [500.0], "timestep_range": [0, 500]}, "`timesteps`"),
        ("flux", {"timesteps": [1000.5]}, "`timesteps`"),
        ("stable_diffusion", {"timesteps": [1000]}, "`timesteps`"),
        ("flux", {"timestep_range": [0, 1001]}, "`timestep_range`"),
        ("flux", {"weighting_scheme": "cosmap"}, "`weighting_scheme`"),
        # Pixels per latent, times latents per token.
        ("flux", {"resolution": 18}, "multiple of 4 pixels.*18"),
        ("wan", {"resolution": 40}, "multiple of 16 pixels.*40"),
        ("qwen_image_21", {"resolution": 80}, "32 pixels, got 80 x 80"),
        ("stable_diffusion", {"guidance_scale": 3.5}, "`guidance_scale`"),
        ("flux_schnell", {"guidance_scale": 3.5}, "`guidance_scale`"),
    ],
)
def test_what_cannot_act_is_refused_at_set_up(trainer_of, name, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(name, **settings)


# ---- Precisions and sizes of Stable Diffusion -------------------------------------------------------------------


def test_predict_casts_its_inputs_to_the_denoiser_but_keeps_time_ids_exact(sdxl_pipeline):
    sdxl_pipeline.unet.to(torch.bfloat16)
    family, seen = find_family(sdxl_pipeline), []
    sdxl_pipeline.unet.register_forward_pre_hook(lambda module, args, kw: seen.append(kw), with_kwargs=True)
    time_ids = torch.tensor([[1023.0, 24, 3, 5, 16, 16]])  # bfloat16 would make it 1024
    with torch.no_grad():
        conditioning = {**family.encode_prompts(["red"]), "time_ids": time_ids}
        prediction = family.predict(family.denoiser, torch.ones(1, 4, 8, 8), torch.tensor([420]), conditioning)
    assert seen[0]["sample"].dtype == seen[0]["encoder_hidden_states"].dtype == prediction.dtype == torch.bfloat16
    assert torch.equal(seen[0]["added_cond_kwargs"]["time_ids"], time_ids)


def test_half_precision_vae_that_overflows_is_lent_float32(sd_pipeline):
    vae = sd_pipeline.vae.to(torch.float16)
    stored = {name: value.clone() for name, value in vae.state_dict().items()}
    dtypes = []
    vae.encoder.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.no_grad():
        latents = find_family(sd_pipeline).encode_images(torch.zeros(1, 3, 16, 16))
    assert dtypes == [torch.float32] and latents.dtype == torch.float32
    assert all(torch.equal(value, stored[name]) for name, value in vae.state_dict().items())


def test_latents_follow_the_means_and_deviations_that_an_sdxl_vae_states(sdxl_pipeline):
    """The pipeline decodes `latents * std / scaling_factor + mean`."""
    sdxl_pipeline.vae.register_to_config(latents_mean=[0.5, -1.0, 0.25, 2.0], latents_std=[2.0, 0.5, 1.5, 1.0])
    scaled = find_family(sdxl_pipeline).scale_latents(torch.ones(1, 4, 1, 1))
    by_hand = [0.13025 * 0.5 / 2, 0.13025 * 2 / 0.5, 0.13025 * 0.75 / 1.5, 0.13025 * -1]
    assert scaled.flatten().tolist() == pytest.approx(by_hand)


def test_default_resolution_is_the_pipelines_own(make_sd_pipeline):
    assert find_family(make_sd_pipeline()).default_resolution == 16
    assert find_family(make_sd_pipeline(sample_size=(8, 12))).default_resolution == (16, 24)


def test_time_ids_are_original_size_then_crop_then_target_size(sdxl_pipeline):
    family = find_family(sdxl_pipeline)
    sizes = family.size_conditioning(torch.tensor([[768, 512], [1, 2]]), torch.tensor([[10, 20], [3, 4]]), (64, 96))
    expected = torch.tensor([[768.0, 512, 10, 20, 64, 96], [1, 2, 3, 4, 64, 96]])
    assert torch.equal(sizes["time_ids"], expected)


# ---- Defaults ---------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(("lora", "beta", "learning_rate"), [(True, 100.0, 1e-4), (False, 2000.0, 1e-6)])
def test_beta_and_rate_of_a_flow_model_depend_on_what_is_tuned(trainer_of, lora, beta, learning_rate):
    trainer = trainer_of("flux", lora=lora, learning_rate=None)
    assert (trainer.args.beta, trainer.args.learning_rate) == (beta, learning_rate)


@pytest.mark.parametrize(
    ("name", "buffer"), [("qwen_image_21", "time_text_embed.time_proj.freqs"), ("ideogram4", "rotary_emb.inv_freq")]
)
def test_frequencies_stay_exact_in_a_denoiser_that_is_cast(name, buffer):
    """Large positions would get wrong angles from frequencies in bfloat16."""
    pipeline = case(name).build()
    exact = pipeline.transformer.get_buffer(buffer).clone()
    pipeline.transformer.to(torch.bfloat16)
    given = load_model(pipeline)
    for cast_before in (True, False):
        denoiser = copy.deepcopy(given.denoiser)
        if not cast_before:
            predict_once(given.family, denoiser)
            denoiser.to(torch.bfloat16)
        predict_once(given.family, denoiser)
        assert denoiser.get_buffer(buffer).dtype == torch.float32
        assert torch.equal(denoiser.get_buffer(buffer), exact)


@pytest.mark.parametrize("name", ["qwen_image_21", "ideogram4"])
def test_networks_get_one_hook_from_training_however_often_they_are_loaded_and_none_from_their_family(name):
    pipeline = case(name).build()
    networks = [part for part in pipeline.components.values() if isinstance(part, type(pipeline.transformer))]

    def hooks():
        return [sum(len(module._forward_pre_hooks) for module in network.modules()) for network in networks]

    find_family(pipeline)
    assert hooks() == [0] * len(networks)
    load_model(pipeline)
    pipeline.transformer = networks[0] = copy.deepcopy(networks[0])
    load_model(pipeline)
    assert hooks() == [1] * len(networks)


def predict_once(family, denoiser):
    latents = family.encode_images(torch.zeros(1, 3, 64, 64))
    with torch.no_grad():
        family.predict(denoiser, latents, torch.tensor([500]), family.encode_prompts(["a"]))

"""The walk of a batch against the same mathematics written out by hand on the real pipeline's parts."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

BETA, MU = 2000.0, 0.6


def by_hand(folder, batch, prompts_of, *, seeds) -> dict[str, torch.Tensor]:
    """Diffusion-DPO with the safeguard, pair by pair in float64 where it matters, sharing no code with the package."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    policy, frozen = pipe.unet, StableDiffusionPipeline.from_pretrained(folder).unet
    with torch.no_grad():  # a reference that differs, so that margins are not 0
        for parameter in frozen.parameters():
            parameter.mul_(1.001)
    pairs = len(seeds)
    pixels = (batch["pixel_values"].float() / 255 - 0.5) / 0.5
    errors, residuals = {}, {}
    for half, side in enumerate(("winner", "loser")):
        for i, seed in enumerate(seeds):
            encode = torch.Generator().manual_seed(seed ^ 0x5DEECE66D)
            posterior = pipe.vae.encode(pixels[half * pairs + i : half * pairs + i + 1]).latent_dist
            draws = [torch.randn(1, 4, 8, 8, generator=encode) for _ in range(half + 1)]
            latent = (posterior.mean + posterior.std * draws[half]).detach() * 0.18215
            stream = torch.Generator().manual_seed(seed)
            t = int(torch.rand(1, generator=stream) * 1000)
            noise = torch.randn(1, 4, 8, 8, generator=stream)
            noisy = (alphas[t] ** 0.5 * latent + (1 - alphas[t]) ** 0.5 * noise).float()
            tokens = pipe.tokenizer(prompts_of[half][i], padding="max_length", max_length=16, truncation=True)
            text = pipe.text_encoder(torch.tensor([tokens.input_ids]))[0].detach()
            for name, unet in (("policy", policy), ("reference", frozen)):
                with torch.set_grad_enabled(name == "policy"):
                    residual = (unet(noisy, torch.tensor([t]), text).sample - noise).double()
                errors[side, name, i] = residual.square().mean()
                residuals[side, name, i] = residual.detach()
    squares = sum(residuals["winner", "policy", i].square().sum() for i in range(pairs))
    dot = sum((residuals["winner", "policy", i] * residuals["loser", "policy", i]).sum() for i in range(pairs))
    scale = min(1.0, max(0.0, float((1 - MU) * squares / dot))) if dot > 0 else 1.0
    total, losses = 0.0, []
    for i in range(pairs):
        winner = errors["winner", "policy", i] - errors["winner", "reference", i]
        loser = errors["loser", "policy", i] - errors["loser", "reference", i]
        logit = -BETA / 2 * (winner - loser)
        losses.append(float(torch.log1p(torch.exp(-logit.detach()))))
        weight = BETA / 2 * torch.sigmoid(-logit.detach())  # dL/d err_w = -dL/d err_l
        total = total + weight * (errors["winner", "policy", i] - scale * errors["loser", "policy", i]) / pairs
    total.backward()
    gradient = {name: p.grad for name, p in policy.named_parameters()}
    return {"loss": float(np.mean(losses)), "scale": scale, "gradient": gradient}


@pytest.mark.parametrize("two_prompts", [False, True])
def test_a_step_is_the_papers_step(make_trainer, make_pairs, sd_folder, two_prompts):
    reference = StableDiffusionPipeline.from_pretrained(sd_folder)
    with torch.no_grad():
        for parameter in reference.unet.parameters():
            parameter.mul_(1.001)
    pairs = make_pairs()
    if two_prompts:
        pairs = pairs.rename_column("prompt", "chosen_prompt")
        pairs = pairs.add_column("rejected_prompt", [f"another text {row}" for row in range(len(pairs))])
    trainer = make_trainer(ref_model=reference, train=pairs, beta=BETA, safeguard="output", safeguard_mu=MU)
    batch = next(iter(trainer.get_train_dataloader()))
    rows = batch["rows"].tolist()
    prompts = (
        [f"prompt {row}" for row in rows],
        [f"{'another text' if two_prompts else 'prompt'} {row}" for row in rows],
    )
    expected = by_hand(sd_folder, batch, prompts, seeds=batch["seeds"])

    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    loss.backward()

    assert float(loss) == pytest.approx(expected["loss"], rel=2e-4)
    assert float(outputs.scale) == pytest.approx(expected["scale"], rel=1e-4)
    ours = torch.cat([p.grad.flatten() for p in trainer.denoiser.parameters()])
    theirs = torch.cat([expected["gradient"][name].flatten() for name, _ in trainer.denoiser.named_parameters()])
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()
    plain_scale_would_be = torch.nn.functional.cosine_similarity(ours, theirs, dim=0)
    assert plain_scale_would_be > 0.99999


def test_one_draw_serves_both_images_of_a_pair(make_trainer):
    trainer = make_trainer(noise_offset=0.3)
    latents = torch.zeros(6, 4, 8, 8)
    timesteps, noise = trainer.pair_forward.draw_noise([11, 12, 13], latents)
    for drawn in (timesteps, noise):
        assert torch.equal(drawn[:3], drawn[3:])
    assert len(set(timesteps.tolist())) > 1 and not torch.equal(noise[0], noise[1])


def test_noise_offset_is_one_value_a_channel(make_trainer):
    latents = torch.zeros(2, 4, 8, 8)
    plain = make_trainer().pair_forward.draw_noise([5], latents)[1]
    offset = make_trainer(noise_offset=0.1).pair_forward.draw_noise([5], latents)[1] - plain
    torch.testing.assert_close(offset, offset[..., :1, :1].expand_as(offset))
    assert offset[0, 0, 0, 0] != offset[0, 1, 0, 0]


def test_timesteps_stay_in_their_range(make_trainer):
    trainer = make_trainer(timestep_range=[250, 260])
    timesteps, _ = trainer.pair_forward.draw_noise(list(range(200)), torch.zeros(2, 4, 8, 8))
    assert timesteps.min() == 250 and timesteps.max() == 259

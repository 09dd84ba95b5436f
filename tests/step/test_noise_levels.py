"""Draws of timestep and noise: their seeds, and the gradient with min-SNR weights by hand."""

import copy

import torch
from step.walks import gradient, moved

from trl_diffusion_sdpo.step.pair_evaluation import seeds_of_draws

BETA = 50.0
SETTINGS = {"safeguard": "none", "beta": BETA, "timestep_weighting": "min_snr"}


def test_the_first_draw_has_the_pairs_own_seeds_and_no_two_have_one():
    seeds = [3, 2**63 - 1, 0]
    assert seeds_of_draws(seeds, 1) == seeds
    all_seeds = seeds_of_draws(seeds, 50)
    assert all_seeds[:3] == seeds and len(set(all_seeds)) == 150
    assert all(0 <= seed < 2**63 for seed in all_seeds)  # what a generator takes
    assert all_seeds[:9] == seeds_of_draws(seeds, 3)
    assert seeds_of_draws([2**63 - 1], 3)[1:] == seeds_of_draws(seeds, 3)[4::3]  # of a pair alone


def test_the_gradient_has_the_min_snr_weights_by_hand(make_trainer, sd_folder):
    trainer = make_trainer(ref_model=moved(sd_folder), **SETTINGS)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    forward, process = trainer.pair_forward, trainer.family.noise_process
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    loss.backward()

    policy = copy.deepcopy(trainer.denoiser).double().requires_grad_()
    policy.zero_grad()
    reference = copy.deepcopy(trainer.reference.module).double()
    latents, conditioning = forward.encode(batch)
    timesteps, noise = forward.draw_noise(batch["seeds"], latents)
    noisy, target = process.add_noise(latents, noise, timesteps).double(), noise.double()
    text = conditioning["prompt_embeds"].double()

    def errors(unet):
        return (unet(noisy, timesteps, text).sample - target).square().flatten(1).mean(1)

    alphas = process.scheduler.alphas_cumprod[timesteps[:4]].double()
    weights = (5 * (1 - alphas) / alphas).clamp(max=1)  # min(snr, 5) / snr
    with torch.no_grad():
        old = errors(reference)
    winner, loser = (errors(policy) - old).chunk(2)
    losses = torch.nn.functional.softplus(BETA / 2 * weights * (winner - loser))
    losses.mean().backward()

    torch.testing.assert_close(outputs.pair_losses.double(), losses.detach(), rtol=1e-4, atol=1e-6)
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert (gradient(trainer) - expected).norm() < 1e-4 * expected.norm()

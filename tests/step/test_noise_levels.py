"""Several draws of timestep and noise of one encoded pair: the mean of as many micro-batches, for one encoding."""

import copy

import torch
from step.walks import gradient, moved

from trl_diffusion_sdpo.step.pair_forward import seeds_of_draws

LEVELS, BETA = 3, 50.0
SETTINGS = {"safeguard": "none", "beta": BETA, "snr_gamma": 5.0}


def test_the_first_draw_has_the_pairs_own_seeds_and_no_two_have_one():
    seeds = [3, 2**63 - 1, 0]
    assert seeds_of_draws(seeds, 1) == seeds
    all_seeds = seeds_of_draws(seeds, 50)
    assert all_seeds[:3] == seeds and len(set(all_seeds)) == 150
    assert all(0 <= seed < 2**63 for seed in all_seeds)  # what a generator takes
    assert all_seeds[:9] == seeds_of_draws(seeds, 3)
    assert seeds_of_draws([2**63 - 1], 3)[1:] == seeds_of_draws(seeds, 3)[4::3]  # of a pair alone


def test_the_gradient_is_the_mean_of_those_of_as_many_micro_batches(make_trainer, sd_folder):
    trainer = make_trainer(ref_model=moved(sd_folder), n_timesteps_per_pair=LEVELS, **SETTINGS)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    forward, process = trainer.pair_forward, trainer.family.noise_process
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    loss.backward()

    # In float64, take a micro-batch for each draw, each with a single draw from its own seeds.
    policy = copy.deepcopy(trainer.denoiser).double().requires_grad_()
    policy.zero_grad()
    reference = copy.deepcopy(trainer.reference.module).double()
    latents, conditioning = forward.encode(batch)
    seeds, losses = seeds_of_draws(batch["seeds"], LEVELS), []
    for level in range(LEVELS):
        timesteps, noise = forward.draw_noise(seeds[4 * level : 4 * level + 4], latents)
        noisy, target = process.add_noise(latents, noise, timesteps).double(), noise.double()
        text = conditioning["prompt_embeds"].double()

        def errors(unet, at=(noisy, timesteps, text), target=target):
            return (unet(*at).sample - target).square().flatten(1).mean(1)

        alphas = process.scheduler.alphas_cumprod[timesteps[:4]].double()
        weights = (5 * (1 - alphas) / alphas).clamp(max=1)  # min(snr, 5) / snr
        with torch.no_grad():
            old = errors(reference)
        winner, loser = (errors(policy) - old).chunk(2)
        loss_of_pairs = torch.nn.functional.softplus(BETA / 2 * weights * (winner - loser))
        (loss_of_pairs.mean() / LEVELS).backward()
        losses.append(loss_of_pairs.detach())

    torch.testing.assert_close(outputs.pair_losses.double(), torch.cat(losses), rtol=1e-4, atol=1e-6)
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert (gradient(trainer) - expected).norm() < 1e-4 * expected.norm()
    alone = make_trainer(ref_model=moved(sd_folder), **SETTINGS)
    alone.model.train()
    alone.compute_loss(alone.model, batch).backward()
    assert (gradient(alone) - expected).norm() > 0.1 * expected.norm()  # one draw is something else


def test_a_pair_is_encoded_once_whatever_the_number_of_draws(make_trainer, monkeypatch):
    trainer = make_trainer(n_timesteps_per_pair=LEVELS)
    encoded, predicted, encode = [], [], trainer.family.encode_images
    monkeypatch.setattr(
        trainer.family, "encode_images", lambda pixels, *rest: encoded.append(len(pixels)) or encode(pixels, *rest)
    )
    trainer.denoiser.register_forward_hook(lambda module, args, output: predicted.append(len(output[0])))
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    for model, draws in ((trainer.model.train(), LEVELS), (trainer.model.eval(), 1)):  # evaluation has one draw
        encoded.clear()
        predicted.clear()
        with torch.no_grad():
            trainer.compute_loss(model.train(draws > 1), batch)
        assert encoded == [8] and predicted == [8 * draws]

"""Several draws of timestep and noise of one encoded pair: the mean of as many micro-batches, for one encoding."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

from trl_diffusion_sdpo.step.pair_forward import repeat_pairs, seeds_of_draws

LEVELS, BETA = 3, 50.0


@pytest.fixture
def moved(sd_folder):
    """A reference that differs from the policy, so that margins are not 0."""
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.mul_(1.01)
    return pipeline


def gradient(trainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in trainer.denoiser.parameters() if p.grad is not None])


def test_the_first_draw_has_the_pairs_own_seeds_and_no_two_have_one():
    seeds = [3, 2**63 - 1, 0]
    assert seeds_of_draws(seeds, 1) == seeds
    all_seeds = seeds_of_draws(seeds, 50)
    assert all_seeds[:3] == seeds and len(set(all_seeds)) == 150
    assert all(0 <= seed < 2**63 for seed in all_seeds)  # what a generator takes
    assert all_seeds[:9] == seeds_of_draws(seeds, 3)
    assert seeds_of_draws([2**63 - 1], 3)[1:] == seeds_of_draws(seeds, 3)[4::3]  # of a pair alone


def test_pairs_are_repeated_in_their_order_with_the_winners_first():
    assert repeat_pairs(torch.tensor([1, 2, -1, -2]), 2).tolist() == [1, 2, 1, 2, -1, -2, -1, -2]


def test_the_gradient_is_the_mean_of_those_of_as_many_micro_batches(make_trainer, moved):
    trainer = make_trainer(ref_model=moved, n_timesteps_per_pair=LEVELS, safeguard="none", beta=BETA, snr_gamma=5.0)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    forward, process = trainer.pair_forward, trainer.family.noise_process
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    loss.backward()

    # The same in float64: a micro-batch for each draw, each with a single draw from seeds of its own.
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
    alone = make_trainer(ref_model=moved, safeguard="none", beta=BETA, snr_gamma=5.0)
    alone.model.train()
    alone.compute_loss(alone.model, batch).backward()
    assert (gradient(alone) - expected).norm() > 0.1 * expected.norm()  # one draw is something else


def test_a_pair_is_encoded_once_whatever_the_number_of_draws(make_trainer, monkeypatch):
    safeguard, calls = "parameter", {}
    for levels in (1, LEVELS):
        trainer = make_trainer(
            n_timesteps_per_pair=levels,
            safeguard=safeguard,
            max_steps=2,
            peft_config=LoraConfig(r=2),
            eval_strategy="steps",
            eval_steps=2,
            eval_dataset=make_trainer().train_dataset,
        )
        counts = calls[levels] = {"images": 0, "prompts": 0, "predicted": []}
        images, prompts = trainer.family.encode_images, trainer.family.encode_prompts

        def encode_images(pixels, *rest, counts=counts, images=images):
            counts["images"] += len(pixels)
            return images(pixels, *rest)

        def encode_prompts(texts, counts=counts, prompts=prompts):
            counts["prompts"] += len(texts)
            return prompts(texts)

        monkeypatch.setattr(trainer.family, "encode_images", encode_images)
        monkeypatch.setattr(trainer.family, "encode_prompts", encode_prompts)
        trainer.denoiser.register_forward_hook(
            lambda module, args, output, counts=counts: counts["predicted"].append(len(output[0]))
        )
        trainer.train()
        counts["eval_loss"] = next(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e)
    one, several = calls[1], calls[LEVELS]
    assert (one["images"], one["prompts"]) == (several["images"], several["prompts"]) == (16 + 32, 8 + 16)
    rows = 4
    assert set(one["predicted"]) - {8} <= {rows}
    assert max(several["predicted"]) == rows * LEVELS and several["predicted"][-1] == 8  # evaluation has one draw

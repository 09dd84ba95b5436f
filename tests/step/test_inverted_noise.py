"""Training at the noise of each image's own inversion: a step by hand on a real pipeline, and what must not change
it."""

import copy

import pytest
import torch
from step.walks import ALPHAS, gradient, moved

from trl_diffusion_sdpo.models.pipelines import load_pipeline

INVERSION = {"noise_source": "inversion", "inversion_kwargs": {"kind": "renoise", "steps": 3}}


def with_inversion(**more):
    """Return `INVERSION` with further constants."""
    return {**INVERSION, "inversion_kwargs": {**INVERSION["inversion_kwargs"], **more}}


BETA = 50.0


@pytest.fixture
def policy(sd_folder):
    return moved(sd_folder)


def batch_of(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def by_hand(predict, clean, t, grid, at, step):
    """The latents of one image at its timestep: `step(x, e, s, t)` is one step, `at` where the clean latents are."""
    x, before = clean, at
    for now in [*(k for k in grid if k < t), t]:
        first = predict(x, now)
        second = predict(step(x, first, before, now), now)
        x, before = step(x, (first + second) / 2, before, now), now
    return x


def ddim_up(x, e, s, t):
    """Take a step of DDIM from the timestep `s` up to `t`. At `s = -1` the latents are clean."""
    a_s, a_t = ALPHAS[s] if s >= 0 else torch.ones((), dtype=torch.float64), ALPHAS[t]
    return a_t.sqrt() * (x - (1 - a_s).sqrt() * e) / a_s.sqrt() + (1 - a_t).sqrt() * e


def diffusion_dpo(policy, reference, target):
    """`log(1 + exp(beta/2 (d_w - d_l)))`, the mean over the pairs."""
    now, before = ((each - target).square().flatten(1).mean(1) for each in (policy, reference))
    winner, loser = (now - before).chunk(2)
    return torch.nn.functional.softplus(BETA / 2 * (winner - loser)).mean()


def test_a_step_of_a_ddpm_model_by_hand(make_trainer, policy, sd_folder):
    trainer = make_trainer(policy, sd_folder, safeguard="none", beta=BETA, **INVERSION)
    batch = batch_of(trainer)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()

    unet = copy.deepcopy(trainer.denoiser).double().requires_grad_()
    unet.zero_grad()
    reference = copy.deepcopy(trainer.reference.module).double()
    latents, conditioning = trainer.pair_forward.encode(batch)
    clean, text = latents.double(), conditioning["prompt_embeds"].double()
    timesteps = [
        int(torch.rand(1, generator=torch.Generator().manual_seed(seed)) * 1000) for seed in batch["seeds"]
    ] * 2
    rows = []
    with torch.no_grad():
        for row, t in enumerate(timesteps):
            prompt = text[row : row + 1]
            rows.append(
                by_hand(
                    lambda x, now, prompt=prompt: unet(x, now, prompt).sample,
                    *(clean[row : row + 1], t, (1, 334, 667), -1, ddim_up),
                )
            )
    a = ALPHAS[timesteps].view(-1, 1, 1, 1)
    noisy, noise = torch.cat(rows), (torch.cat(rows) - a.sqrt() * clean) / (1 - a).sqrt()
    at = (noisy, torch.tensor(timesteps), text)
    expected = diffusion_dpo(unet(*at).sample, reference(*at).sample.detach(), noise)
    expected.backward()

    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    theirs = torch.cat([p.grad.flatten() for p in unet.parameters()])
    assert (gradient(trainer) - theirs).norm() < 1e-3 * theirs.norm()
    drawn = make_trainer(policy, sd_folder, safeguard="none", beta=BETA)
    drawn.denoiser.zero_grad()
    drawn.model.train()
    drawn.compute_loss(drawn.model, batch).backward()
    assert (gradient(drawn) - theirs).norm() > 0.1 * theirs.norm()  # drawn noise is something else


def test_a_step_of_a_flow_model_by_hand(make_trainer, family_folder):
    """Velocities: Euler's step up between the shifted levels, in float64; the target is `noise - clean`."""
    folder = family_folder("stable_diffusion_3")
    reference = load_pipeline(folder)
    for weight in reference.transformer.parameters():
        weight.data *= 1.02
    trainer = make_trainer(folder, reference, safeguard="none", beta=BETA, weighting_scheme="none", **INVERSION)
    batch = batch_of(trainer)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()

    policy = copy.deepcopy(trainer.denoiser).double().requires_grad_()
    policy.zero_grad()
    frozen = copy.deepcopy(trainer.reference.module).double()
    latents, conditioning = trainer.pair_forward.encode(batch)
    clean = latents.double()
    text, pooled = (conditioning[name].double() for name in ("prompt_embeds", "pooled_prompt_embeds"))

    def velocity(model, x, now, rows):
        told = torch.tensor(now).reshape(-1) * torch.ones(len(x))  # float32, as the trainer has them
        return model(x, text[rows], pooled[rows], told, return_dict=False)[0]

    def shifted(level):
        return 1000 * 3 * level / (1 + 2 * level)

    draws = [float(torch.rand(1, generator=torch.Generator().manual_seed(seed))) for seed in batch["seeds"]] * 2
    timesteps, found = [shifted(draw) for draw in draws], []
    with torch.no_grad():
        for row, t in enumerate(timesteps):
            rows = slice(row, row + 1)
            found.append(
                by_hand(
                    lambda x, now, rows=rows: velocity(policy, x, now, rows),
                    *(clean[rows], t, (shifted(1 / 3), shifted(2 / 3)), 0.0),
                    lambda x, v, s, t: x + (t - s) / 1000 * v,
                )
            )
    sigmas = torch.tensor(timesteps, dtype=torch.float64).view(-1, 1, 1, 1) / 1000
    noisy, noise = torch.cat(found), (torch.cat(found) - (1 - sigmas) * clean) / sigmas
    every = slice(None)
    predictions = velocity(policy, noisy, timesteps, every), velocity(frozen, noisy, timesteps, every).detach()
    expected = diffusion_dpo(*predictions, noise - clean)
    expected.backward()

    assert float(loss) == pytest.approx(float(expected), rel=1e-3)
    theirs = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    assert (gradient(trainer) - theirs).norm() < 2e-3 * theirs.norm()


def test_a_pair_has_the_same_noise_in_every_batch_and_added_noise_from_its_seed(make_trainer):
    trainer = make_trainer(**with_inversion(eta=0.5))
    batch, rows = batch_of(trainer), [2, 3, 6, 7]
    forward = trainer.pair_forward
    whole = forward.noisy_batch(batch, trainer.model)
    half = {
        "pixel_values": batch["pixel_values"][rows],
        "prompts": batch["prompts"][2:],
        "seeds": batch["seeds"][2:],
        "original_sizes": batch["original_sizes"][rows],
        "crop_top_lefts": batch["crop_top_lefts"][rows],
    }
    part = forward.noisy_batch(half, trainer.model)
    torch.testing.assert_close(part.noisy, whole.noisy[rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(part.target, whole.target[rows], rtol=1e-4, atol=1e-4)
    other = make_trainer(**INVERSION)  # without the added noise
    assert not torch.allclose(other.pair_forward.noisy_batch(batch, other.model).target, whole.target, atol=0.05)


def test_passes_without_gradients_leave_those_of_the_step_as_they_are(make_trainer, policy, sd_folder):
    """The gradient of a step, against that of its noisy batch alone: casts of weights that autocast would keep from the
    passes before have no graph."""
    trainer = make_trainer(policy, sd_folder, bf16=True, activation_checkpointing=True, **INVERSION)
    batch, forward = batch_of(trainer), trainer.pair_forward
    trainer.model.activation_checkpointing_enable()
    trainer.model.train()
    predictions = forward.predict_pairs(trainer.model, batch)
    forward.loss(predictions).loss.backward()
    ours = gradient(trainer)
    trainer.denoiser.zero_grad()
    again = copy.copy(forward)
    again.noisy_batch = lambda *_: predictions.batch
    again.loss(again.predict_pairs(trainer.model, batch)).loss.backward()
    assert torch.equal(ours, gradient(trainer)) and ours.norm() > 0
    assert all(weight.grad is not None for weight in trainer.denoiser.parameters())


def test_an_evaluation_has_the_drawn_noise_of_any_other_run(make_trainer, policy, make_pairs):
    """Noise that the policy finds itself would measure how much it agrees with itself."""
    found = []
    for settings in ({}, INVERSION):
        trainer = make_trainer(copy.deepcopy(policy), eval_dataset=make_pairs(4), **settings)
        found.append({name: value for name, value in trainer.evaluate().items() if "errors/" in name})
    assert (
        found[0] == found[1]
        and "eval_errors/winner" in found[0]
        and any("winner_change@" in name for name in found[0])
    )

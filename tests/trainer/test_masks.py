"""Masks: regions follow their images, errors count within them, and a mask of ones changes nothing."""

import copy

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from step.walks import ALPHAS, SGD, assert_same_step, batches_of, moved, trained_step

from trl_diffusion_sdpo import DiffusionSDPOTrainer
from trl_diffusion_sdpo.data import PairMixture, PairOptions, PairTransform, prepare_dataset
from trl_diffusion_sdpo.engines.gradient_backends import GradientBackend
from trl_diffusion_sdpo.losses import mask_anchor, region_factors


def masked_rows(count=8, size=(16, 24), mask=None, **columns):
    """Pairs whose red channel is their mask, so that pixels show where the mask must be."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        marked = generator.integers(0, 2, size).astype(np.uint8) * 255
        pixels = generator.integers(0, 256, (2, *size, 3), dtype=np.uint8)
        pixels[..., 0] = marked
        chosen, rejected = (Image.fromarray(image) for image in pixels)
        own = Image.fromarray(marked) if mask is None else mask
        row = {"prompt": f"prompt {number}", "chosen": chosen, "rejected": rejected, "mask": own, **columns}
        rows.append({name: value for name, value in row.items() if value is not None})
    return rows


def options(**changes):
    transform = PairTransform(16, center_crop=False, random_flip=True)
    return PairOptions(transform, **{"verify_images": "none", **changes})


@pytest.mark.parametrize("streamed", [False, True])
def test_masks_are_mirrored_and_cropped_with_their_images(streamed):
    rows = prepare_dataset(masked_rows(), options(seed=3))
    if streamed:
        features = datasets.Features({"prompt": datasets.Value("string")})
        features |= dict.fromkeys(("chosen", "rejected", "mask"), datasets.Image())
        table = datasets.Dataset.from_list(masked_rows(), features=datasets.Features(features))
        rows = prepare_dataset(table.to_iterable_dataset(), options(seed=3))
    mirrored = 0
    for item in rows:
        assert torch.equal(item["masks"][:, 0], (item["pixel_values"][:, 0] > 127).to(torch.uint8))
        mirrored += item["is_mirrored"]
    assert 0 < mirrored < 8


def test_each_image_may_have_its_own_mask():
    left = np.zeros((16, 16), dtype=np.uint8)
    left[:, :8] = 255
    masks = {"mask": None, "chosen_mask": Image.fromarray(left), "rejected_mask": Image.fromarray(255 - left)}
    rows = [{**row, **masks} for row in masked_rows(2, (16, 16))]
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    item = prepare_dataset(rows, options()).for_evaluation()[0]
    assert item["masks"][0, 0].float().mean(0).tolist() == [1.0] * 8 + [0.0] * 8
    assert torch.equal(item["masks"][0], 1 - item["masks"][1])
    with pytest.raises(ValueError, match="rejected_mask"):
        prepare_dataset([{k: v for k, v in row.items() if k != "rejected_mask"} for row in rows], options())


@pytest.mark.parametrize(
    "mask, reason",
    [(Image.new("L", (24, 16)), "128"), (Image.new("L", (16, 16), 255), "16 x 16"), (b"no image", "mask")],
)
def test_a_bad_mask_is_counted_and_its_pair_replaced(mask, reason, caplog):
    rows = masked_rows(3)
    rows[1]["mask"] = mask
    prepared = prepare_dataset(rows, options())
    assert prepared[1]["row"] == 2
    assert reason in caplog.text
    stream = datasets.Dataset.from_list(masked_rows(3)).to_iterable_dataset()
    stream = stream.map(
        lambda row, number: {"mask": mask} if number == 1 else {"mask": row["mask"]}, with_indices=True
    )
    stream = prepare_dataset(stream, options())
    assert len(list(stream)) == 2 and stream.report.undecodable == 1


def test_settings_that_masks_do_not_allow(make_trainer, make_pairs):
    with pytest.raises(ValueError, match="permute"):
        prepare_dataset(masked_rows(), options(losers="permute"))
    without = make_pairs().remove_columns(["chosen_score", "rejected_score"])
    with pytest.raises(ValueError, match="mixture"):
        prepare_dataset(PairMixture([datasets.Dataset.from_list(masked_rows()), without]), options())
    with pytest.raises(ValueError, match="mask_anchor"):
        make_trainer(mask_anchor=1.0)
    with pytest.raises(ValueError, match="mask_anchor"):
        make_trainer(mask_anchor=1.0, precompute_ref_errors=True, train=masked_rows())


def test_factors_are_those_of_a_mean_within_the_dilated_mask():
    masks = torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    masks[0, 0, 4, 4] = 1  # one pixel: its latent at (2, 2) and the eight around it
    masks[1] = 1
    factors = region_factors(masks, torch.zeros(2, 4, 8, 8))
    inside = torch.zeros(8, 8)
    inside[1:4, 1:4] = 1
    assert torch.equal(factors[0, 0] > 0, inside > 0)
    assert torch.equal(factors[1], torch.ones(1, 8, 8))
    residual = torch.randn(2, 4, 8, 8)
    expected = (residual[0].double().square() * inside).sum() / (4 * inside.sum())
    assert float((residual * factors)[0].double().square().mean()) == pytest.approx(float(expected), rel=1e-6)
    assert not region_factors(torch.zeros_like(masks), residual).any()


def step_of(trainer, batch):
    """Losses, metrics and gradients of one micro-batch."""
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.denoiser.parameters()])
    return loss.detach(), outputs, gradient


def test_a_mask_of_ones_changes_nothing_to_the_bit(make_trainer):
    white = Image.new("L", (24, 16), 255)
    rows = masked_rows(mask=white)
    plain = [{name: value for name, value in row.items() if name != "mask"} for row in rows]
    found = []
    for train in (rows, plain):
        trainer = make_trainer(train=train, beta=50.0, safeguard="output")
        found.append(step_of(trainer, next(iter(trainer.get_train_dataloader()))))
    (masked_loss, masked, masked_gradient), (loss, outputs, gradient) = found
    assert torch.equal(masked_loss, loss) and torch.equal(masked_gradient, gradient)
    assert torch.equal(masked.scale, outputs.scale) and float(masked.metrics["mask/share"]) == 1


def test_losses_and_scale_count_the_region_only(make_trainer):
    corner = np.zeros((16, 24), dtype=np.uint8)
    corner[:8, :8] = 255
    trainer = make_trainer(
        train=masked_rows(mask=Image.fromarray(corner)), beta=50.0, safeguard="output", random_crop=False
    )
    batch = next(iter(trainer.get_train_dataloader()))
    predictions = trainer.pair_forward.predict_pairs(trainer.model, dict(batch))
    outputs = trainer.pair_forward.loss(predictions)
    inside = (predictions.batch.region > 0).double()
    residual = (predictions.policy.detach().double() - predictions.batch.target.double()) * inside
    errors = residual.square().sum((1, 2, 3)) / (4 * inside.sum((1, 2, 3)))
    winner, loser = errors.chunk(2)
    torch.testing.assert_close(outputs.pair_errors[:, 0].double(), winner, rtol=1e-5, atol=0)
    torch.testing.assert_close(outputs.pair_errors[:, 1].double(), loser, rtol=1e-5, atol=0)
    gradient = torch.autograd.grad(outputs.loss, predictions.policy)[0]
    assert not gradient[(inside == 0).expand_as(gradient)].any()
    assert gradient[(inside > 0).expand_as(gradient)].any()


# ---- The anchor: the pull to the reference outside of the masks -----------------------------------------------------


def test_the_anchor_is_the_mean_over_pairs_of_the_mean_distance_outside_of_each_mask():
    region = torch.zeros(4, 1, 2, 2)
    region[0, 0, 0, 0] = 2.0  # winner of pair 0: three positions outside
    region[1] = 1.0  # winner of pair 1: none outside
    region[2, 0, 0] = 2**0.5  # loser of pair 0: two outside; the loser of pair 1 has four
    reference = torch.zeros(4, 2, 2, 2)
    policy = torch.stack([torch.full((2, 2, 2), float(size)) for size in (1, 2, 3, 4)])
    policy[0, :, 0, 0] = 50.0  # within the mask
    policy[0, 0, 1, 1] = 7.0
    policy.requires_grad_()
    # Winner 0: (5 * 1 + 49) / 6 = 9; winner 1: 0; losers: 9 and 16. Pairs: (9 + 9) / 2 and (0 + 16) / 2.
    term, distance = mask_anchor(policy, reference, region)
    assert float(term.detach()) == (9 + 8) / 2 and float(distance) == (9 + 0 + 9 + 16) / 4
    term.backward()
    assert float(policy.grad[0, 0, 1, 1]) == pytest.approx(2 * 7 / 6 / 4)  # each image has a quarter of the mean
    assert not policy.grad[0, :, 0, 0].any() and not policy.grad[1].any()
    weights = {"pair_weights": torch.tensor([2.0, 0.5]), "timestep_weights": torch.tensor([0.5, 3.0])}
    weighted, distance = mask_anchor(policy, reference, region, **weights)
    assert float(weighted.detach()) == (9 * 1 + 8 * 1.5) / 2 and float(distance) == 34 / 4


def rows_with_masks_of_all_sizes():
    """Eight pairs whose masks cover between two of 24 columns and the whole image."""
    rows = masked_rows()
    for row, width in zip(rows, (24, 4, 2, 12, 6, 8, 10, 16), strict=True):
        row["mask"] = Image.new("L", (24, 16))
        row["mask"].paste(255, (0, 0, width, 16))
    return rows


def anchor_by_hand(trainer, pair_weights) -> torch.Tensor:
    """The gradient of the anchor in float64, over the micro-batches of a step. Only latents, noise and the positions
    within the masks come from the package."""
    unet = copy.deepcopy(trainer.denoiser).double().train()
    weights, total = list(unet.parameters()), 0.0
    for inputs in batches_of(trainer):
        batch = trainer.pair_forward.noisy_batch(inputs)
        at = batch.noisy.double(), batch.timesteps, batch.conditioning["prompt_embeds"].double()
        with torch.no_grad(), trainer.reference.active(trainer.model) as reference:
            expected = copy.deepcopy(reference).double()(*at).sample
        outside = (batch.region == 0).double()
        squares = ((unet(*at).sample - expected).square() * outside).sum((1, 2, 3))
        pairs = (squares / (4 * outside.sum((1, 2, 3))).clamp(min=1)).view(2, -1).mean(0)
        ratio = ALPHAS[batch.timesteps.chunk(2)[0]] / (1 - ALPHAS[batch.timesteps.chunk(2)[0]])
        pairs = pairs * ratio.clamp(max=5) / ratio  # min-SNR at gamma 5, https://huggingface.co/papers/2303.09556
        total = total + (pairs * pair_weights[inputs["rows"]]).mean() / trainer.args.gradient_accumulation_steps
    return torch.cat([part.flatten() for part in torch.autograd.grad(total, weights)])


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("safeguard", ["output", "parameter"])
def test_the_anchor_trains_whole_beside_the_safeguard(make_trainer, sd_folder, safeguard, batch_size):
    """Whatever its weight, lambda is the lambda without it, and its gradient arrives whole at winners and losers,
    however four pairs are divided into micro-batches."""
    pair_weights = torch.tensor([0.5, 2.0, 0.25, 1.5, 1.0, 0.75, 3.0, 1.0], dtype=torch.float64)

    def trainer_with(weight: float):
        trainer = make_trainer(
            moved(sd_folder),
            sd_folder,
            train=rows_with_masks_of_all_sizes(),
            mask_anchor=weight,
            safeguard=safeguard,
            safeguard_mu=0.9,
            beta=50.0,
            timestep_weighting="min_snr",
            random_crop=False,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            max_steps=1,
            **SGD,
        )
        collate = trainer.data_collator

        def weighted(items):
            batch = collate(items)
            return {**batch, "pair_weights": pair_weights[batch["rows"]].float()}

        trainer.data_collator = weighted
        return trainer

    log, plain = trained_step(trainer_with(0.0))
    assert 0 < log["safeguard/scale"] < 1  # otherwise the test would not see lambda
    gradient = anchor_by_hand(trainer_with(1.0), pair_weights)
    for weight in (3.0, 200.0):
        anchored, move = trained_step(trainer_with(weight))
        assert anchored["safeguard/scale"] == pytest.approx(log["safeguard/scale"], rel=1e-5)  # of half batches
        assert_same_step(move - plain, -1e-2 * weight * gradient)


class HalvedLoss(DiffusionSDPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs) / 2


@pytest.mark.parametrize("safeguard", ["output", "parameter"])
def test_half_of_an_overridden_loss_has_half_of_the_anchor(sd_folder, make_args, safeguard):
    moves = []
    for trainer_class in (DiffusionSDPOTrainer, HalvedLoss):
        settings = {"safeguard": safeguard, "beta": 50.0, "mask_anchor": 200.0, "max_steps": 1, **SGD}
        args, rows = make_args(**settings), rows_with_masks_of_all_sizes()
        moves.append(trained_step(trainer_class(moved(sd_folder), sd_folder, args, rows))[1])
    assert (moves[1] - moves[0] / 2).norm() <= 1e-5 * moves[0].norm()


def test_an_anchor_that_must_predict_twice_takes_no_dropout(make_trainer, sd_pipeline, monkeypatch):
    """As under ZeRO-3, which allows one backward pass after a prediction."""
    monkeypatch.setattr(GradientBackend, "retains_graph", False)
    next(layer for layer in sd_pipeline.unet.modules() if isinstance(layer, torch.nn.Dropout)).p = 0.1
    trainer = make_trainer(
        sd_pipeline, train=masked_rows(), mask_anchor=1.0, safeguard="parameter", disable_dropout=False
    )
    with pytest.raises(ValueError, match="`mask_anchor`.*`disable_dropout=True`"):
        trainer.train()


def test_encoded_pairs_have_the_masks_of_their_flips(make_trainer):
    trainers = [make_trainer(train=masked_rows(), random_flip=True, precompute_latents=flag) for flag in (False, True)]
    plain, encoded = (trainer.train_dataset for trainer in trainers)
    for row in range(len(plain)):
        assert torch.equal(plain[row]["masks"], encoded[row]["masks"])
    assert len({item["is_mirrored"] for item in plain}) == 2

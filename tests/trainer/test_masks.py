"""Masks: regions follow their images, errors count within them, and a mask of ones changes nothing."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from trl_diffusion_sdpo.data import PairMixture, PairOptions, PairTransform, prepare_dataset
from trl_diffusion_sdpo.step.pair_forward import region_of


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
    factors = region_of(masks, torch.zeros(2, 4, 8, 8))
    inside = torch.zeros(8, 8)
    inside[1:4, 1:4] = 1
    assert torch.equal(factors[0, 0] > 0, inside > 0)
    assert torch.equal(factors[1], torch.ones(1, 8, 8))
    residual = torch.randn(2, 4, 8, 8)
    expected = (residual[0].double().square() * inside).sum() / (4 * inside.sum())
    assert float((residual * factors)[0].double().square().mean()) == pytest.approx(float(expected), rel=1e-6)
    assert not region_of(torch.zeros_like(masks), residual).any()


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
        trainer = make_trainer(train=train, beta=50.0)
        found.append(step_of(trainer, next(iter(trainer.get_train_dataloader()))))
    (masked_loss, masked, masked_gradient), (loss, outputs, gradient) = found
    assert torch.equal(masked_loss, loss) and torch.equal(masked_gradient, gradient)
    assert torch.equal(masked.scale, outputs.scale) and float(masked.metrics["mask/share"]) == 1


def test_losses_and_scale_count_the_region_only(make_trainer):
    corner = np.zeros((16, 24), dtype=np.uint8)
    corner[:8, :8] = 255
    trainer = make_trainer(train=masked_rows(mask=Image.fromarray(corner)), beta=50.0, random_crop=False)
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


def test_the_anchor_pulls_to_the_reference_outside_only(make_trainer):
    corner = np.zeros((16, 24), dtype=np.uint8)
    corner[:8, :8] = 255
    trainer = make_trainer(train=masked_rows(mask=Image.fromarray(corner)), beta=50.0, mask_anchor=3.0)
    predictions = trainer.pair_forward.predict_pairs(trainer.model, next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        predictions.policy.add_(0.5)
    outputs = trainer.pair_forward.loss(predictions)
    outside = (predictions.batch.region == 0).expand_as(predictions.policy)
    plain = outputs.pair_losses.mean()
    distance = (predictions.policy - predictions.reference)[outside].square().mean()
    assert float(outputs.loss.detach()) == pytest.approx(float((plain + 3 * distance).detach()), rel=1e-5)


def test_encoded_pairs_have_the_masks_of_their_flips(make_trainer):
    trainers = [make_trainer(train=masked_rows(), random_flip=True, precompute_latents=flag) for flag in (False, True)]
    plain, encoded = (trainer.train_dataset for trainer in trainers)
    for row in range(len(plain)):
        assert torch.equal(plain[row]["masks"], encoded[row]["masks"])
    assert len({item["is_mirrored"] for item in plain}) == 2

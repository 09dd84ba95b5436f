"""Weights of pairs in the step: a weighted batch has the gradient of its pairs weighed by hand."""

import pytest
import torch

WEIGHTS = [1.0, 3.0, 0.0, 4.0]  # with the mean 2


@pytest.fixture
def pairs(make_pairs):
    rows = make_pairs(4)
    return rows.add_column("quality", WEIGHTS)


def gradient_of(trainer, batch):
    """Return the loss of a batch and its gradient over all weights, by the trainer's own step."""
    trainer.denoiser.zero_grad()
    loss = trainer.compute_loss(trainer.model.train(), trainer._prepare_inputs(batch))
    loss.backward()
    grads = [p.grad.flatten() for p in trainer.denoiser.parameters() if p.grad is not None]
    return loss.detach().double(), torch.cat(grads).double()


def single_batches(batch):
    """The pairs of a batch as batches of one, without weights."""
    size = len(batch["seeds"])
    for pair in range(size):
        rows = torch.tensor([pair, pair + size])
        yield {
            name: value[rows] if isinstance(value, torch.Tensor) and len(value) == 2 * size else value[pair : pair + 1]
            for name, value in batch.items()
            if name != "pair_weights"
        }


def test_the_gradient_of_a_weighted_batch_is_that_of_its_pairs_weighed_by_hand(make_trainer, pairs):
    """`1/4 sum (w_i / 2) g_i`, where each `g_i` is the gradient of one pair alone."""
    settings = {"safeguard": "output", "safeguard_kwargs": {"granularity": "pair"}, "safeguard_mu": 0.8, "beta": 100.0}
    trainer = make_trainer(train=pairs, pair_weights="quality", **settings)
    trainer.train()  # away from the reference, and into the engine
    (batch,) = trainer.get_train_dataloader()
    loss, gradient = gradient_of(trainer, batch)
    weights = [WEIGHTS[row] / 2 for row in batch["rows"].tolist()]
    singles = [gradient_of(trainer, single) for single in single_batches(batch)]
    expected = sum(weight * each for weight, (_, each) in zip(weights, singles, strict=True)) / 4
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    by_hand = sum(weight * value for weight, (value, _) in zip(weights, singles, strict=True)) / 4
    assert float(loss) == pytest.approx(float(by_hand), rel=1e-5)
    plain = sum(each for _, each in singles) / 4
    assert float((gradient - plain).norm() / plain.norm()) > 0.1  # or there is nothing to see


@pytest.mark.parametrize(("weights", "warns"), [([2.0] * 4, True), (WEIGHTS, False)])
def test_weights_that_are_all_the_same_are_said_to_have_no_effect(make_trainer, make_pairs, caplog, weights, warns):
    make_trainer(train=make_pairs(4).add_column("quality", weights), pair_weights="quality")
    assert any("`pair_weights='quality'`" in record.message for record in caplog.records) == warns


def test_weights_stay_with_their_pairs_when_rows_are_taken(make_trainer, make_pairs):
    trainer = make_trainer(train=make_pairs(4), per_device_train_batch_size=3)
    items = [trainer.train_dataset[row] for row in range(3)]
    inputs = trainer._prepare_inputs({**trainer.data_collator(items), "pair_weights": torch.tensor([1.0, 2.0, 4.0])})
    predictions = trainer.pair_forward.predict_pairs(trainer.model.train(), inputs)
    assert predictions.pair_weights.tolist() == [1.0, 2.0, 4.0]
    assert predictions.take(torch.tensor([2, 0, 5, 3])).pair_weights.tolist() == [4.0, 1.0]
    assert predictions.take(torch.tensor([5, 1, 2, 4])).pair_weights.tolist() == [4.0, 2.0]  # the first two swapped
    outputs = trainer.pair_forward.loss(predictions)
    expected = (outputs.pair_losses * predictions.pair_weights).mean()
    assert outputs.loss.item() == pytest.approx(expected.item())

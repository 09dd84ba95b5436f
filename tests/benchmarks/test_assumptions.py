"""The measurements of what the safeguard assumes: in their smallest form, and one batch computed again in float64."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import assumptions
import tables


@pytest.mark.matrix
def test_the_assumptions_are_measured_on_every_noise_level(tmp_path, monkeypatch):
    paths = ("--folder", str(tmp_path), "--results", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["assumptions.py", "--steps", "1", "--every", "1", "--rates", "1e-3", *paths])
    assumptions.main()
    rows = json.loads((tmp_path / "assumptions_unet.json").read_text())
    assert [row["part"] for row in rows] == ["arms"] * 2 + ["sgd"] * 5
    for row in rows[:2]:
        before, after = row["measured"]["probes"]
        assert [each["batch"] for each in after["rows"]] == [*(f"bin {number}" for number in range(8)), "fresh"]
        assert len(after["single_pairs"]) == 8 * assumptions.SINGLE_PAIRS
        # Before the first step, all pairs have the same weight, and the probe itself changes nothing.
        assert before["logits"] == [0, 0] != after["logits"]
        assert all(each["cosine_plain"] == pytest.approx(each["cosine_output"], abs=1e-4) for each in before["rows"])
        for probe in (before, after):
            assert {size: len(groups) for size, groups in probe["groups"].items()} == {
                "1": 64,
                "4": 16,
                "16": 4,
                "64": 1,
            }
            # One pair has no other pair to be weighed against.
            assert all(plain == pytest.approx(weighted, abs=1e-4) for plain, weighted in probe["groups"]["1"])
    # Both arms start from the same model, and are measured on the same batches.
    first, second = (row["measured"]["probes"][0]["rows"] for row in rows[:2])
    assert first == second
    assert all(row["measured"]["steps"] == 1 for row in rows[2:])
    assert "| U-Net | 0.001 | " in tables.rises(rows, rows)


def test_gradients_of_a_batch_are_those_of_an_independent_computation_in_float64(tmp_path):
    """The reference is the model before training, so the weights are changed at random first."""
    trainer = assumptions.make_trainer(
        "unet", 0, str(tmp_path), TrainerCallback(), **assumptions.ARMS["output, mu 0.6"]
    )
    forward = trainer.pair_forward
    batch = forward.noisy_batch(trainer._inputs_of(trainer.train_dataset.sample(3)))
    [reference] = forward.predict_reference(trainer.denoiser, [batch])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in assumptions.trained(trainer.denoiser):
            weight.add_(0.1 * weight.std(correction=0) * torch.randn(weight.shape, generator=generator))
    given = assumptions.PairPredictions(batch, batch.target, reference)
    compared = assumptions.compare(forward, trainer.denoiser, given)

    unet = trainer.pipeline.unet.double()
    states = batch.conditioning["prompt_embeds"].double()
    predicted = unet(batch.noisy.double(), batch.timesteps, encoder_hidden_states=states).sample
    residuals = predicted - batch.target.double()
    errors = residuals.square().mean((1, 2, 3))
    changes = errors - (reference.double() - batch.target.double()).square().mean((1, 2, 3))
    logits = -100 / 2 * (changes[:3] - changes[3:])
    weights = list(unet.parameters())

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(value, weights, retain_graph=True)])

    whole = gradient(-logsigmoid(logits).mean())
    anchor = gradient(errors[:3].mean())
    products = compared.products
    assert logits.std() > 0.1  # the weights of the pairs differ
    # The gradient of the loss is W - L.
    assert products[0, 0] + products[1, 1] - 2 * products[0, 1] == pytest.approx(float(whole @ whole), rel=1e-4)
    assert products[2, 0] - products[2, 1] == pytest.approx(float(anchor @ whole), rel=1e-4)
    assert products[2, 2] == pytest.approx(float(anchor @ anchor), rel=1e-4)
    winner, loser = residuals[:3].flatten(), residuals[3:].flatten()
    bound = 0.4 * float((winner @ winner / (winner @ loser)).detach())
    assert compared.scales["output, mu 0.6"] == pytest.approx(min(1.0, bound), rel=1e-4)

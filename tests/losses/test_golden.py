"""The losses against numbers recorded from the method authors' published code (see `tests/golden/README.md`)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_diffusion_sdpo.losses import diffusion_preference_loss

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "loss_cases.json").read_text())


def name_of(case: dict) -> str:
    """The authors name one DSPO and give it a flag; we have a row for each form."""
    if case["loss_type"] == "dspo" and case["sdxl"]:
        return "dspo_sdxl"
    return {"diffusion-dpo": "sigmoid"}.get(case["loss_type"], case["loss_type"])


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "loss_cases.safetensors")


@pytest.mark.parametrize("number", range(len(CASES)))
def test_loss_gradient_lambda_and_accuracy_are_the_authors(number: int, tensors: dict[str, torch.Tensor]):
    case, loss_type = CASES[number], name_of(CASES[number])
    prediction = tensors[f"{number}.model_pred"].clone().requires_grad_()
    out = diffusion_preference_loss(
        prediction,
        tensors[f"{number}.target"],
        tensors[f"{number}.ref_pred"],
        loss_type=loss_type,
        beta=case["beta"],
        safeguard="output" if case["safeguard"] else "none",
        safeguard_mu=case["mu"],
        safeguard_eps=1e-9,
        **({"dmpo_alpha": case["dmpo_alpha"]} if loss_type == "dmpo" else {}),
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(case["loss"], rel=1e-5)
    assert out.scale.item() == pytest.approx(case["loser_scale"], rel=1e-5)
    assert out.metrics["rewards/accuracies"].item() == pytest.approx(case["implicit_acc"], rel=1e-6)
    expected = tensors[f"{number}.grad"]
    for got, want in zip(prediction.grad.chunk(2), expected.chunk(2), strict=True):  # each branch on its own scale
        if want.any():
            assert (got - want).norm() <= 1e-5 * want.norm()
        else:
            assert got.abs().max() <= 1e-12

"""The example of a loss and a family of one's own, in its smallest form."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from trl_diffusion_sdpo import PairTerms, register_loss
from trl_diffusion_sdpo.families import registry
from trl_diffusion_sdpo.losses import LOSSES, diffusion_preference_loss

SCRIPT = Path(__file__).parents[2] / "examples" / "scripts" / "own_loss_and_family.py"


@pytest.fixture(autouse=True)
def nothing_stays_registered(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    known = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(known)


def test_the_example_trains_by_its_own_loss_and_family(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("own_loss_and_family", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "own_loss_and_family", example)
    spec.loader.exec_module(example)
    trainer = example.main(["--max_steps", "1", "--pairs_per_prompt", "1", "--output_dir", str(tmp_path / "run")])
    assert type(trainer.family).__name__ == "OwnFamily"
    assert trainer.state.log_history[0]["loss"] == 1.0  # relu(1 - 0)^2 before the first step
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


def test_a_registered_loss_is_the_function_that_was_given():
    """Its own setting has its default in training, and can be passed to the function; lambda is of its gradients."""

    def scaled(terms: PairTerms, *, beta: float, factor: float = 3.0) -> torch.Tensor:
        return factor * beta * (terms.winner_error - terms.loser_error)

    register_loss("scaled", scaled, needs_reference=False)
    pred, target = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    assert float(diffusion_preference_loss(pred, target, loss_type="scaled", beta=2.0).loss) == -18  # 3 * 2 * (1 - 4)
    halved = diffusion_preference_loss(pred, target, loss_type="scaled", beta=2.0, factor=0.5)
    assert float(halved.loss) == -3
    summed = diffusion_preference_loss(pred, target, loss_type=["scaled", "sft"], loss_weights=[1.0, 2.0], beta=2.0)
    assert float(summed.loss) == -16


def test_names_of_this_package_and_losses_without_keywords_are_refused():
    with pytest.raises(ValueError, match="'sigmoid'"):
        register_loss("sigmoid", lambda terms, *, beta: terms.logit(beta))
    with pytest.raises(ValueError, match="'plain'"):
        register_loss("plain", lambda terms, beta: terms.logit(beta))

"""A run with swapped labels is the run on data with exchanged columns."""

import json
from pathlib import Path

import pytest
import torch

from trl_diffusion_sdpo.data.data_report import SWAPPED


def exchanged(pairs):
    """Exchange the images of all pairs. Scores are exchanged too and change their signs."""
    names = {"chosen": "rejected", "rejected": "chosen"}
    images = pairs.select_columns(["prompt", *names]).rename_columns({"chosen": "x"})
    images = images.rename_columns({"rejected": "chosen"}).rename_columns({"x": "rejected"})
    scores = {
        "chosen_score": [-s for s in pairs["rejected_score"]],
        "rejected_score": [-s for s in pairs["chosen_score"]],
    }
    for name, values in scores.items():
        images = images.add_column(name, values)
    return images


@pytest.mark.matrix
def test_a_swapped_run_is_the_run_on_exchanged_columns(make_trainer, make_pairs):
    settings, runs = {"safeguard": "parameter", "winner_budget": 0.01, "winner_budget_kwargs": {"pairs": 4}}, []
    for pairs, swap in ((make_pairs(4), True), (exchanged(make_pairs(4)), False)):
        given = {"eval_dataset": pairs, "eval_strategy": "epoch", "per_device_train_batch_size": 2}
        trainer = make_trainer(train=pairs, swap_labels=swap, max_steps=2, **given, **settings)
        trainer.train()
        timed = ("runtime", "per_second", "time", "memory")
        logs = [
            {k: v for k, v in entry.items() if not any(t in k for t in timed)} for entry in trainer.state.log_history
        ]
        runs.append((torch.cat([weight.detach().flatten() for weight in trainer.denoiser.parameters()]), logs))
    swapped, by_hand = runs
    assert torch.equal(swapped[0], by_hand[0])
    assert swapped[1] == by_hand[1]


def test_the_card_the_set_up_and_the_report_say_it(make_trainer, make_pairs, tmp_path):
    trainer = make_trainer(swap_labels=True, max_steps=1, eval_dataset=make_pairs(4, seed=1), eval_strategy="epoch")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    folder = Path(trainer.args.output_dir)
    card = (folder / "README.md").read_text()
    assert "This is a negative model" in card and SWAPPED in card and "| `swap_labels` | `True` |" in card
    assert json.loads((folder / "diffusion_sdpo_setup.json").read_text())["swap_labels"] is True

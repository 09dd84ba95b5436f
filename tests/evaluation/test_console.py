"""What training tells on the console: a short line for each log, all of it elsewhere, and where results are."""

import json

import pytest
from peft import LoraConfig
from transformers import PrinterCallback, ProgressCallback

from trl_diffusion_sdpo.evaluation.console import ShortLogCallback, shown_metrics

TRAINING = {
    **{"loss": 0.693147, "grad_norm": 3.0, "learning_rate": 1e-5, "epoch": 0.5, "my_metric": 7},
    **{"errors/winner": 0.55, "errors/winner_change": 0.05, "errors/loser": 0.4, "errors/loser_change": -0.1},
    **{"rewards/chosen": 1.0, "rewards/accuracies": 0.625, "safeguard/scale": 0.25, "safeguard/active": 1.0},
}


def test_a_log_of_training_shows_few_metrics_and_those_of_users():
    assert list(shown_metrics(TRAINING)) == [
        (
            [],
            {
                **{"loss": "0.6931", "winner": "0.55 (+10.00%)", "loser": "0.4 (-20.00%)", "accuracy": "0.625"},
                **{"lambda": "0.25", "lr": "1e-05", "my_metric": "7"},
            },
        )
    ]


def test_an_evaluation_is_shown_by_set_and_by_average():
    logs = {
        **{"eval_loss": 0.5, "eval_errors/winner": 0.5, "eval_errors/winner_change@0": 0.1, "eval_runtime": 3.0},
        **{"eval_ema_loss": 0.25, "eval_ema_errors/winner": 0.5, "eval_steps_per_second": 2.0, "eval_clear_wins": 0.9},
    }
    assert list(shown_metrics(logs)) == [
        (["evaluation"], {"loss": "0.5", "winner": "0.5", "eval_clear_wins": "0.9"}),
        (["evaluation ema"], {"loss": "0.25", "winner": "0.5"}),
    ]


def test_what_is_not_a_number_is_shown_and_an_error_of_0_divides_nothing():
    ((_, shown),) = shown_metrics({"loss": float("nan"), "errors/winner": 0.5, "errors/winner_change": 0.5})
    assert shown == {"loss": "nan", "winner": "0.5"}
    ((_, shown),) = shown_metrics({"train_runtime": 2.0, "note": "x" * 200})
    assert shown["train_runtime"] == "2" and len(shown["note"]) == 100


@pytest.fixture
def trained(make_trainer, tmp_path):
    def run(**settings):
        trainer = make_trainer(
            peft_config=LoraConfig(r=2), sample_prompts=["a cube"], sample_inference_steps=1, **settings
        )
        trainer.train()
        return trainer

    return run


def test_a_run_shows_short_lines_and_ends_with_what_it_has_left(trained, capfd, tmp_path):
    trainer = trained(disable_tqdm=False)
    out, bar = capfd.readouterr()
    lines, run = out.splitlines(), tmp_path / "run"
    assert lines[0].startswith("step 1  loss 0.6931  winner ") and "  lambda " in lines[0] and "grad_norm" not in out
    assert "loss=" in bar and "accuracy=" in bar
    told = lines[lines.index("Training ended at step 2 of 2.") + 1 :]
    assert told == [
        f"  Samples: {run / 'samples' / 'step-000002.png'} (first: step-000000.png)",
        f"  Curves:  {run / 'curves.png'}",
        f"  State:   {run / 'trainer_state.json'}",
        f"  Card:    {run / 'README.md'}",
        f'  To load: pipeline.load_lora_weights("{run}")  # once saved',
    ]
    state = json.loads((run / "trainer_state.json").read_text())
    assert {"grad_norm", "rewards/margins", "safeguard/active"} <= state["log_history"][0].keys()
    trainer.save_model()
    trainer.pipeline.unet.delete_adapters(trainer.adapter)
    exec(told[-1].partition(": ")[2], {"pipeline": trainer.pipeline})
    assert trainer.pipeline.get_active_adapters() == ["default_0"]


def test_without_a_bar_every_metric_is_printed_as_by_transformers(make_trainer, capfd):
    trainer = make_trainer(max_steps=1)
    assert isinstance(trainer.callback_handler.callbacks[-1], PrinterCallback)
    trainer.train()
    assert "'grad_norm': " in capfd.readouterr().out
    with_bar = make_trainer(disable_tqdm=False)
    assert isinstance(with_bar.callback_handler.callbacks[-1], ShortLogCallback)
    with_bar.remove_callback(ProgressCallback)  # by the class that users know
    assert not any(isinstance(callback, ProgressCallback) for callback in with_bar.callback_handler.callbacks)

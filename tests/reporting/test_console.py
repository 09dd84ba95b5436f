"""Console output of training: a short line for each log, or all metrics if there is no progress bar."""

import transformers.trainer
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from trl_diffusion_sdpo.reporting.console import ShortLogCallback, shown_metrics

TRAINING = {
    "loss": 0.693147,
    "grad_norm": 3.0,
    "learning_rate": 1e-5,
    "epoch": 0.5,
    "my_metric": 7,
    "errors/winner": 0.55,
    "errors/winner_change": 0.05,
    "errors/loser": 0.4,
    "errors/loser_change": -0.1,
    "rewards/chosen": 1.0,
    "rewards/accuracies": 0.625,
    "safeguard/scale": 0.25,
    "safeguard/active": 1.0,
}


def test_a_log_of_training_shows_few_metrics_and_those_of_users():
    assert list(shown_metrics(TRAINING)) == [
        (
            [],
            {
                "loss": "0.6931",
                "winner": "0.55 (+10.00%)",
                "loser": "0.4 (-20.00%)",
                "accuracy": "0.625",
                "lambda": "0.25",
                "lr": "1e-05",
                "my_metric": "7",
            },
        )
    ]


def test_an_evaluation_is_shown_by_set_and_by_average():
    logs = {
        "eval_loss": 0.5,
        "eval_errors/winner": 0.5,
        "eval_errors/winner_change@0": 0.1,
        "eval_runtime": 3.0,
        "eval_ema_loss": 0.25,
        "eval_ema_errors/winner": 0.5,
        "eval_steps_per_second": 2.0,
        "eval_clear_wins": 0.9,
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


def test_without_a_bar_every_metric_is_printed_as_by_transformers(make_trainer):
    assert isinstance(make_trainer().callback_handler.callbacks[-1], PrinterCallback)
    with_bar = make_trainer(disable_tqdm=False)
    assert isinstance(with_bar.callback_handler.callbacks[-1], ShortLogCallback)
    with_bar.remove_callback(ProgressCallback)  # by the class that users know
    assert not any(isinstance(callback, ProgressCallback) for callback in with_bar.callback_handler.callbacks)


def test_a_notebook_shows_the_short_log_and_no_table_of_all_metrics(make_trainer, monkeypatch):
    """transformers takes a class of this name where IPython runs in a notebook."""
    in_notebook = type("NotebookProgressCallback", (TrainerCallback,), {})
    monkeypatch.setattr(transformers.trainer, "DEFAULT_PROGRESS_CALLBACK", in_notebook)
    callbacks = make_trainer(disable_tqdm=False).callback_handler.callbacks
    assert isinstance(callbacks[-1], ShortLogCallback)
    assert not any(isinstance(callback, in_notebook) for callback in callbacks)

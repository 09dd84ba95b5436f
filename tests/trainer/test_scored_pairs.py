"""The settings of scores in the trainer: batches, and what is refused."""

import pytest
import torch

SMALL = {"per_device_train_batch_size": 2, "dataloader_num_workers": 0}


@pytest.fixture
def scored(make_pairs):
    """Eight pairs with the gaps 0.5 to 4, and a column of weights."""
    pairs = make_pairs(8).remove_columns(["chosen_score", "rejected_score"])
    gaps = [1.0, 4.0, 0.5, 3.0, 2.0, 1.5, 2.5, 3.5]
    pairs = pairs.add_column("chosen_score", gaps).add_column("rejected_score", [0.0] * 8)
    return pairs.add_column("quality", [float(i) for i in range(8)])


def test_training_batches_have_weights_and_evaluations_none(make_trainer, scored):
    trainer = make_trainer(train=scored, eval_dataset=scored, pair_weights="quality", **SMALL)
    for batch in trainer.get_train_dataloader():
        assert batch["pair_weights"].dtype == torch.float32
        expected = [scored["quality"][row] / 3.5 for row in batch["rows"].tolist()]
        assert batch["pair_weights"].tolist() == pytest.approx(expected)
        assert "scores" not in batch
    assert all("pair_weights" not in batch for batch in trainer.get_eval_dataloader())
    assert all("pair_weights" not in batch for batch in trainer.get_eval_dataloader(trainer.train_dataset))


def test_the_mean_is_over_what_is_trained_on_and_held_out_pairs_need_no_numbers(make_trainer, scored):
    held_out = scored.select(range(6, 8)).remove_columns(["quality", "chosen_score", "rejected_score"])
    trainer = make_trainer(train=scored.select(range(1, 4)), eval_dataset=held_out, pair_weights="quality", **SMALL)
    batches = list(trainer.get_train_dataloader())
    rows, weights = (torch.cat([batch[name] for batch in batches]).tolist() for name in ("rows", "pair_weights"))
    assert dict(zip(rows, weights, strict=True)) == pytest.approx({0: 0.5, 1: 1.0, 2: 1.5})


def test_calibrated_scores_reach_the_batches_of_training_and_evaluation(make_trainer, scored):
    """One pair a prompt: sigma of the gap and its complement."""
    trainer = make_trainer(
        train=scored, eval_dataset=scored, loss_type="smpo", calibrated_scores=True, per_device_train_batch_size=8
    )
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        for batch in loader:
            gaps = torch.tensor([scored["chosen_score"][row] for row in batch["rows"].tolist()])
            expected = torch.cat([torch.sigmoid(gaps), torch.sigmoid(-gaps)])
            torch.testing.assert_close(batch["scores"], expected)


def test_resuming_with_other_weights_is_refused(make_trainer, scored, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path), "pair_weights": "quality"}
    make_trainer(train=scored, max_steps=1, **settings).train()
    other = scored.remove_columns("quality").add_column("quality", [1.0] * 7 + [3.0])
    with pytest.raises(ValueError, match="pair_weights was"):
        make_trainer(train=other, max_steps=2, **settings).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pair_weights": "gap"}, "`pair_weights` needs .*`chosen_score`.*train data"),
        ({"pair_weights": "agreement"}, r"reads the columns \['chosen_scores', 'rejected_scores'\]"),
    ],
)
def test_missing_columns_are_named(make_trainer, scored, settings, message):
    bare = scored.remove_columns(["chosen_score", "rejected_score"])
    with pytest.raises(ValueError, match=message):
        make_trainer(train=bare, **settings)


def test_streams_are_refused_by_the_trainer(make_trainer, scored):
    for settings in ({"pair_weights": "quality"}, {"pair_weights": "gain"}):
        with pytest.raises(ValueError, match="are a stream"):
            make_trainer(train=scored.to_iterable_dataset(), **settings)


@pytest.mark.parametrize("settings", [{"pair_weights": "gap"}, {"loss_type": "smpo"}])
def test_scores_that_contradict_the_labels_are_counted(settings, make_trainer, scored, caplog):
    """Two of eight pairs have a loser with the higher score, and one has equal scores."""
    scores = [9.0, 0.0, 0.0, 9.0, 2.0, 0.0, 0.0, 0.0]
    trainer = make_trainer(
        train=scored.remove_columns("rejected_score").add_column("rejected_score", scores), **settings
    )
    assert "2 of 8 pairs" in caplog.text and "2 of 8 pairs" in str(trainer.train_dataset.report)

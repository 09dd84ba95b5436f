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


SCALE = {"scorer": "taste", "low": 0.0, "high": 8.0, "lowest": 0.0, "highest": 10.0, "log_odds": 0.5}


def with_scale(pairs, **changes):
    return pairs.add_column("score_scales", [[{**SCALE, **changes}]] * len(pairs))


@pytest.mark.parametrize("style", ["table", "stream"])
def test_scores_that_say_their_scale_are_divided_by_their_range(make_trainer, scored, style):
    """Of a range of 8, a gap of 4 is a half."""
    data = with_scale(scored)
    data = data.to_iterable_dataset() if style == "stream" else data
    trainer = make_trainer(train=data, loss_type="smpo", **SMALL)
    gaps = {prompt: gap / 8 for prompt, gap in zip(scored["prompt"][:], scored["chosen_score"][:], strict=True)}
    for batch in trainer.get_train_dataloader():
        winner, loser = batch["scores"].chunk(2)
        assert (winner - loser).tolist() == pytest.approx([gaps[prompt] for prompt in batch["prompts"]])
        break


def test_calibrated_scores_use_the_scales_own_log_odds(make_trainer, scored):
    settings = {"loss_type": "capo", "calibrated_scores": True, "per_device_train_batch_size": 8}
    (batch,) = make_trainer(train=with_scale(scored), **settings).get_train_dataloader()
    gaps = torch.tensor([scored["chosen_score"][row] / 2 for row in batch["rows"].tolist()])
    torch.testing.assert_close(batch["scores"].chunk(2)[0], torch.sigmoid(gaps))


def test_two_data_sets_may_have_scores_of_two_scorers(make_trainer, scored):
    from trl_diffusion_sdpo import PairMixture

    other = with_scale(scored, scorer="other", high=4.0).map(lambda row: {"prompt": f"other {row['prompt']}"})
    trainer = make_trainer(
        train=PairMixture([with_scale(scored), other]), loss_type="smpo", per_device_train_batch_size=16
    )
    (batch,) = trainer.get_train_dataloader()
    gaps = dict(zip(scored["prompt"][:], scored["chosen_score"][:], strict=True))
    winner, loser = batch["scores"].chunk(2)
    expected = [gaps[p.removeprefix("other ")] / (4 if p.startswith("other ") else 8) for p in batch["prompts"]]
    assert (winner - loser).tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="score_scales"):
        make_trainer(train=PairMixture([with_scale(scored), scored]), loss_type="smpo", **SMALL)


@pytest.mark.parametrize(
    ("changes", "settings", "match"),
    [
        ({"highest": 0.4}, {"loss_type": "smpo"}, r"chosen_score.*0\.4.*taste"),
        ({}, {"loss_type": "smpo", "loss_kwargs": {"smpo_score_scale": 3.0}}, "score_scales.*smpo_score_scale: 3"),
        ({}, {"loss_type": "capo"}, "calibrated_scores"),
        ({"log_odds": None}, {"loss_type": "capo", "calibrated_scores": True}, "log-odds.*taste"),
        ({"high": None}, {"pair_weights": "gap"}, "range of taste"),
        ({"scorer": None}, {"loss_type": "smpo"}, "score_scales"),
    ],
)
def test_scores_that_do_not_fit_their_scale_or_the_loss_are_refused(make_trainer, scored, changes, settings, match):
    with pytest.raises(ValueError, match=match):
        make_trainer(train=with_scale(scored, **changes), **settings, **SMALL)


def test_scores_that_are_no_cosines_are_refused_where_the_setting_says_cosines(make_trainer, scored):
    """PickScore times 100, with the scale of its cosines: a weight of 9.95 where .30 is meant."""
    settings = {"loss_type": "smpo", "loss_kwargs": {"smpo_score_scale": "pickscore"}, **SMALL}
    with pytest.raises(ValueError, match="chosen_score.*cosines"):
        make_trainer(train=scored.map(lambda row: {"chosen_score": 20.0 + row["chosen_score"]}), **settings)
    make_trainer(train=scored.map(lambda row: {"chosen_score": row["chosen_score"] / 10}), **settings)
    with pytest.raises(ValueError, match="chosen_score.*shares"):
        make_trainer(train=scored.map(lambda row: {"chosen_score": 20.0}), loss_type="capo", **SMALL)


def test_smpo_asks_for_the_scale_of_scores_that_do_not_say_it(make_trainer, scored, caplog):
    make_trainer(train=scored, loss_type="smpo", **SMALL)
    assert any("pairs score" in record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    caplog.clear()
    make_trainer(train=with_scale(scored), loss_type="smpo", **SMALL)
    assert not any("pairs score" in record.getMessage() for record in caplog.records)

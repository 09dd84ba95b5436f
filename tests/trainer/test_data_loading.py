"""How data reach the trainer: batches in turn and in order, wrong batch sizes refused."""

import datasets
import datasets.distributed
import pytest
import torch

from trl_diffusion_sdpo.data import PreferenceCollator


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class FloatCollator(PreferenceCollator):
    """A user's collator that makes floats of the bytes."""

    def __call__(self, items):
        batch = super().__call__(items)
        return {**batch, "pixel_values": (batch["pixel_values"].float() / 255 - 0.5) / 0.5}


def test_floats_of_a_collator_of_ones_own_train_as_the_bytes_do(make_trainer):
    assert losses(make_trainer()) == losses(make_trainer(data_collator=FloatCollator()))


def test_a_stream_that_is_split_already_is_refused(make_trainer, make_pairs):
    stream = make_pairs(8).to_iterable_dataset(num_shards=4)
    with pytest.raises(ValueError, match="`split_dataset_by_node`"):
        make_trainer(train=datasets.distributed.split_dataset_by_node(stream, rank=1, world_size=2))


def test_an_epoch_without_a_batch_is_refused(make_trainer, make_pairs):
    with pytest.raises(ValueError, match="`dataloader_drop_last=True`.* 4 pairs, .* 3"):
        make_trainer(train=make_pairs(3), dataloader_drop_last=True)


def test_the_order_depends_on_seed_and_epoch_alone(make_trainer, make_pairs):
    """A run that is resumed by another script walks on, whatever seeds either of them has set."""
    trainer = make_trainer(train=make_pairs(9), per_device_train_batch_size=2, seed=5)
    torch.manual_seed(99)
    loader, torch_random = trainer.get_train_dataloader(), torch.Generator()
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        found = [int(row) for batch in loader for row in batch["rows"]]
        assert found == torch.randperm(9, generator=torch_random.manual_seed(5 + epoch)).tolist()


def test_rows_that_are_set_as_evaluation_data_later_are_evaluated(make_trainer, make_pairs):
    held_out = make_pairs(3, seed=1)
    trainer = make_trainer(eval_dataset=make_pairs(2), eval_strategy="steps", eval_steps=1, max_steps=1)
    trainer.eval_dataset = held_out
    trainer.train()
    expected = make_trainer(eval_dataset=held_out, eval_strategy="steps", eval_steps=1, max_steps=1)
    expected.train()
    ours, theirs = (
        [entry["eval_loss"] for entry in each.state.log_history if "eval_loss" in entry]
        for each in (trainer, expected)
    )
    assert ours == theirs and len(ours) == 1


class FewerPrompts(PreferenceCollator):
    """A user's collator that loses prompts."""

    count = 1

    def __call__(self, items):
        batch = super().__call__(items)
        return {**batch, "prompts": batch["prompts"][: self.count]}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_batch_without_a_prompt_for_each_pair_is_refused(count, make_trainer):
    collator = FewerPrompts()
    collator.count = count
    with pytest.raises(ValueError, match=f"4 pairs.* 8 images.* {count} prompts"):
        make_trainer(data_collator=collator, per_device_train_batch_size=4).train()


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"per_device_train_batch_size": 8}, None),
        ({"per_device_train_batch_size": 9}, 9),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, None),
        ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}, 15),
    ],
)
def test_a_step_of_more_pairs_than_there_are_is_a_warning(make_trainer, make_pairs, caplog, settings, size):
    make_trainer(train=make_pairs(8), **settings).get_train_dataloader()
    said = [record.message for record in caplog.records if "larger than" in record.message]
    assert bool(said) == (size is not None)
    assert size is None or (str(size) in said[0] and " 8 pairs" in said[0])


def with_same_images(pairs, count):
    """Pairs whose first `count` losers are their winners."""
    rows = [{**row, "rejected": row["chosen" if i < count else "rejected"]} for i, row in enumerate(pairs)]
    return datasets.Dataset.from_list(rows)


def test_pairs_of_one_image_twice_are_refused_if_losers_train(make_trainer, make_pairs):
    pairs = with_same_images(make_pairs(8), 8)
    with pytest.raises(ValueError, match="8 of 8 pairs of the train data"):
        make_trainer(train=pairs)
    make_trainer(train=pairs, loss_type="sft")
    make_trainer(train=pairs, losers="permute")


@pytest.mark.parametrize(("count", "warns"), [(5, True), (4, False)])
def test_a_majority_of_pairs_of_one_image_twice_is_a_warning(make_trainer, make_pairs, caplog, count, warns):
    make_trainer(train=with_same_images(make_pairs(8), count))
    assert (f"{count} of 8 pairs" in caplog.text) == warns


@pytest.mark.parametrize(("count", "warns"), [(9, True), (8, False)])
def test_a_stream_of_one_image_twice_says_so_once(make_trainer, make_pairs, caplog, count, warns):
    stream = with_same_images(make_pairs(16), count).to_iterable_dataset()
    make_trainer(train=stream, max_steps=12, dataloader_num_workers=0).train()
    assert caplog.text.count(f"{count} of the first 16 pairs") == warns

"""How data reach the trainer: batches are loaded in turn and in order, and wrong batch sizes are refused."""

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
    trainer = make_trainer(train=make_pairs(9), per_device_train_batch_size=2)
    loader, torch_random = trainer.get_train_dataloader(), torch.Generator()
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        seed = loader.get_sampler().initial_seed + epoch
        found = [int(row) for batch in loader for row in batch["rows"]]
        assert found == torch.randperm(9, generator=torch_random.manual_seed(seed)).tolist()


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

"""How data reach the trainer: batches are loaded in turn and in order, and wrong batch sizes are refused."""

import datasets
import datasets.distributed
import numpy as np
import pytest
import torch
from PIL import Image

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


def test_a_stream_that_is_split_already_is_taken_whole(make_trainer, make_pairs):
    stream = make_pairs(8).to_iterable_dataset(num_shards=4)
    split = datasets.distributed.split_dataset_by_node(stream, rank=1, world_size=2)
    trainers = {"whole": make_trainer(train=stream), "split": make_trainer(train=split)}
    assert not trainers["whole"].train_dataset.is_split and trainers["split"].train_dataset.is_split
    batch = next(iter(trainers["split"].get_train_dataloader()))
    assert batch["prompts"] == ["prompt 2", "prompt 3", "prompt 6", "prompt 7"]  # the second and the fourth shard


def test_the_order_depends_on_seed_and_epoch_alone(make_trainer, make_pairs):
    trainer = make_trainer(train=make_pairs(9), per_device_train_batch_size=2)
    loader, torch_random = trainer.get_train_dataloader(), torch.Generator()
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        seed = loader.get_sampler().initial_seed + epoch
        found = [int(row) for batch in loader for row in batch["rows"]]
        assert found == torch.randperm(9, generator=torch_random.manual_seed(seed)).tolist()


def test_alike_images_are_refused_unless_the_loss_reads_winners_only(make_trainer):
    picture = Image.fromarray(np.full((16, 16, 3), 9, dtype=np.uint8))
    rows = [{"prompt": "p", "chosen": picture, "rejected": picture}] * 4
    with pytest.raises(ValueError, match="In 4 of 4 pairs"):
        make_trainer(train=rows)
    make_trainer(train=rows, loss_type="sft")

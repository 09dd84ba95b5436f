"""How data reach the trainer: batches are loaded in turn and in order, and wrong batch sizes are refused."""

from functools import partial

import datasets
import datasets.distributed
import pytest
import torch
from transformers import Trainer

from trl_diffusion_sdpo.data import PreferenceCollator


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class FloatCollator(PreferenceCollator):
    """A user's collator that makes floats of the bytes."""

    def __call__(self, items):
        batch = super().__call__(items)
        return {**batch, "pixel_values": (batch["pixel_values"].float() / 255 - 0.5) / 0.5}


class CountingCollator(PreferenceCollator):
    """Counts the batches that are loaded."""

    loaded = 0

    def __call__(self, items):
        self.loaded += 1
        return super().__call__(items)


def test_micro_batches_are_loaded_in_their_turn_and_train_as_if_loaded_at_once(make_trainer, make_pairs, monkeypatch):
    def build():
        trainer = make_trainer(
            train=make_pairs(5),
            data_collator=CountingCollator(),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            max_steps=-1,
            num_train_epochs=2,
        )
        step, loaded = trainer.training_step, []
        monkeypatch.setattr(
            trainer, "training_step", lambda *inputs: loaded.append(trainer.data_collator.loaded) or step(*inputs)
        )
        return trainer, loaded

    lazy, in_turn = build()
    logged = losses(lazy)
    # accelerate loads one batch ahead; an epoch ends with a step of one micro-batch
    assert in_turn == [2, 3, 4, 5, 5, 7, 8, 9, 10, 10] and len(logged) == 4
    eager, at_once = build()
    monkeypatch.setattr(eager, "get_batch_samples", partial(Trainer.get_batch_samples, eager))
    assert losses(eager) == logged and at_once == [5] * 5 + [10] * 5
    assert all(map(torch.equal, lazy.denoiser.parameters(), eager.denoiser.parameters()))


def test_floats_of_a_collator_of_ones_own_train_as_the_bytes_do(make_trainer):
    assert losses(make_trainer()) == losses(make_trainer(data_collator=FloatCollator()))


def test_a_stream_that_is_split_already_is_refused(make_trainer, make_pairs):
    stream = make_pairs(8).to_iterable_dataset(num_shards=4)
    with pytest.raises(ValueError, match="`split_dataset_by_node`"):
        make_trainer(train=datasets.distributed.split_dataset_by_node(stream, rank=1, world_size=2))


def test_a_batch_larger_than_the_data_is_said_or_refused_with_the_numbers(make_trainer, make_pairs, caplog):
    make_trainer(train=make_pairs(3))  # in batches of 4
    assert "takes 4 pairs" in caplog.text and "only 3" in caplog.text
    with pytest.raises(ValueError, match="`dataloader_drop_last=True`.* 4 pairs, .* 3"):
        make_trainer(train=make_pairs(3), dataloader_drop_last=True)
    caplog.clear()
    make_trainer(train=make_pairs(8), gradient_accumulation_steps=8)
    assert "takes 32 pairs" in caplog.text and "only 8" in caplog.text
    caplog.clear()
    make_trainer(train=make_pairs(8), gradient_accumulation_steps=2)
    assert "An optimizer step takes" not in caplog.text


def test_the_order_depends_on_seed_and_epoch_alone(make_trainer, make_pairs):
    trainer = make_trainer(train=make_pairs(9), per_device_train_batch_size=2)
    loader, torch_random = trainer.get_train_dataloader(), torch.Generator()
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        seed = loader.get_sampler().initial_seed + epoch
        found = [int(row) for batch in loader for row in batch["rows"]]
        assert found == torch.randperm(9, generator=torch_random.manual_seed(seed)).tolist()

"""How data reach the trainer: batches are loaded in turn, workers are chosen, and wrong batch sizes are refused."""

from functools import partial

import datasets
import datasets.distributed
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Trainer

from trl_diffusion_sdpo.data import PairOptions, PairTransform, PreferenceCollator, prepare_dataset
from trl_diffusion_sdpo.engines import batch_loaders as loaders
from trl_diffusion_sdpo.engines.batch_loaders import choose_workers
from trl_diffusion_sdpo.trainer.data_preparation import check_batches


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class FloatCollator(PreferenceCollator):
    """As somebody may have written it for pixels that were floats."""

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


class Args:
    """What `choose_workers` reads, without the seconds that a configuration takes."""

    def __init__(self, **changes):
        self.dataloader_num_workers = self.dataloader_prefetch_factor = self.dataloader_multiprocessing_context = None
        self.dataloader_persistent_workers, self.world_size = False, 1
        self.train_batch_size, self.eval_batch_size = 4, 8
        vars(self).update(changes)


@pytest.fixture(scope="module")
def many():
    """600 pairs of one image each way."""
    picture, other = (Image.fromarray(np.full((16, 16, 3), level, dtype=np.uint8)) for level in (1, 2))
    rows = [{"prompt": "p", "chosen": picture, "rejected": other}] * 600
    return datasets.Dataset.from_list(rows)


def chosen(data, *, evaluates=False, **changes):
    args = Args(**changes)
    return choose_workers(args, data, resolution=(512, 512), evaluates=evaluates), args.dataloader_num_workers


def test_workers_are_chosen_by_data_cores_and_memory(many, monkeypatch):
    arrow, few, stream = (
        prepare_dataset(data, PairOptions(PairTransform(16), verify_images="none"))
        for data in (many, many.select(range(500)), many.to_iterable_dataset())
    )
    cores, room = 16, 10**12
    monkeypatch.setattr(loaders, "usable_cores", lambda processes: cores // processes)
    monkeypatch.setattr(loaders.shutil, "disk_usage", lambda _: type("Usage", (), {"free": room}))
    assert chosen(arrow)[1] == 4
    assert chosen(arrow, world_size=8)[1] == 1  # two cores each, one of which trains
    assert chosen(stream)[1] == 1
    assert chosen(few) == ("", 0) and chosen(None) == ("", 0)
    assert chosen(arrow, dataloader_num_workers=7) == ("", 7)
    assert chosen(few, dataloader_persistent_workers=True)[1] == 1
    # A batch is 2 * 4 * 3 * 512 * 512 bytes, 6 MiB; of 64 MiB half is for batches, three of which a worker takes.
    room = 64 * 2**20
    assert chosen(arrow)[1] == 1
    cores = 1
    reason, workers = chosen(arrow)
    assert workers == 0 and "0 cores" in reason


def test_a_stream_that_is_split_already_is_taken_whole(make_trainer, make_pairs):
    stream = make_pairs(8).to_iterable_dataset(num_shards=4)
    split = datasets.distributed.split_dataset_by_node(stream, rank=1, world_size=2)
    trainers = {"whole": make_trainer(train=stream), "split": make_trainer(train=split)}
    assert not trainers["whole"].train_dataset.is_split and trainers["split"].train_dataset.is_split
    batch = next(iter(trainers["split"].get_train_dataloader()))
    assert batch["prompts"] == ["prompt 2", "prompt 3", "prompt 6", "prompt 7"]  # the second and the fourth shard


def batch_args(**changes):
    return Args(
        **{
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "dataloader_drop_last": False,
            **changes,
        }
    )


def test_a_batch_larger_than_the_data_is_said_or_refused_with_the_numbers(many, caplog):
    three = prepare_dataset(many.select(range(3)), PairOptions(PairTransform(16)))
    caplog.clear()
    check_batches(three, batch_args())
    assert "takes 4 pairs" in caplog.text and "only 3" in caplog.text
    with pytest.raises(ValueError, match="`dataloader_drop_last=True`.* 4 pairs, .* 3"):
        check_batches(three, batch_args(dataloader_drop_last=True))
    caplog.clear()
    check_batches(three, batch_args(world_size=2))
    assert "takes 8 pairs" in caplog.text
    caplog.clear()
    eight = prepare_dataset(many.select(range(8)), PairOptions(PairTransform(16)))
    check_batches(eight, batch_args(gradient_accumulation_steps=8))
    assert "takes 32 pairs" in caplog.text and "only 8" in caplog.text
    caplog.clear()
    check_batches(eight, batch_args(gradient_accumulation_steps=2))
    check_batches(None, batch_args())
    assert not caplog.records


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

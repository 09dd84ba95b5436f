"""Several processes read one stream: each decodes its own pairs only, and together they have those of one process."""

import io
from itertools import islice

import datasets
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from PIL import Image
from torch.utils.data import DataLoader

from trl_diffusion_sdpo.data import PairTransform, PreferenceCollator, prepare_dataset
from trl_diffusion_sdpo.data.images import ImageReader
from trl_diffusion_sdpo.data.stream_progress import Share

JUNK = b"this is no image"


def png(level):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (level,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def stream(count, *, bad=(), shards=1, training=True):
    rows = [
        {"prompt": f"p{i}", "chosen": JUNK if i in bad else png(2 * i), "rejected": png(2 * i + 1)}
        for i in range(count)
    ]
    source = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=shards)
    return prepare_dataset(source, transform=PairTransform(16), training=training, repeat=training)


def told(items):
    return [(item["prompt"], item["row"], item["seed"]) for item in items]


def prompts(items):
    return [int(item["prompt"][1:]) for item in items]


@pytest.fixture
def decoded(monkeypatch):
    values, decode = [], ImageReader.decode

    def spy(self, value):
        values.append(value)
        return decode(self, value)

    monkeypatch.setattr(ImageReader, "decode", spy)
    return values


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize(("count", "processes", "batch"), [(11, 2, 2), (12, 3, 2), (5, 2, 4), (1, 2, 1), (7, 4, 1)])
def test_training_processes_have_the_pairs_and_draws_of_accelerates_sharding(count, processes, batch, shards):
    """Equal to accelerate's `IterableDatasetShard`, which decodes everything everywhere, also past the stream's end."""
    shards = min(shards, count)
    for index in range(processes):
        dealt = IterableDatasetShard(stream(count, shards=shards), batch, False, processes, index)
        own = stream(count, shards=shards).for_process(Share(index, processes, batch))
        assert told(islice(own, 6 * batch)) == told(islice(dealt, 6 * batch))


def test_a_process_decodes_its_own_pairs_only(decoded):
    own = stream(12).for_process(Share(1, 3, 2))
    assert prompts(islice(own, 8)) == [2, 3, 8, 9, 2, 3, 8, 9]
    assert len(decoded) == 2 * 8


def test_one_process_reads_all_pairs(decoded):
    assert prompts(islice(stream(5), 7)) == [0, 1, 2, 3, 4, 0, 1]
    assert len(decoded) == 14


@pytest.mark.parametrize(
    ("count", "first", "second"),
    [
        (8, [0, 1, 4, 5], [2, 3, 6, 7]),
        (11, [0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 2]),
        (5, [0, 1, 4, 0], [2, 3, 2, 3]),
        (1, [0, 0], [0, 0]),
        (3, [0, 1], [2, 2]),
    ],
)
def test_in_evaluation_all_processes_have_equally_many_pairs_and_none_is_missing(count, first, second):
    data = stream(count, training=False)
    shares = [data.for_process(Share(index, 2, 2)) for index in (0, 1)]
    assert [prompts(share) for share in shares] == [first, second]
    assert told(shares[0]) == told(shares[0])


@pytest.mark.parametrize(
    ("count", "bad", "first", "second"),
    [
        (8, (), [2, 2], [2, 2]),
        (5, (), [2, 1], [2, 0]),
        (1, (), [1], [0]),
        (3, (), [2], [1]),
        (6, (4,), [2, 1], [2, 0]),
        (8, (0, 1, 5), [1, 0], [2, 2]),
    ],
)
def test_batches_of_an_evaluation_tell_how_many_pairs_count(count, bad, first, second):
    data = stream(count, bad=bad, training=False)
    for index, expected in enumerate((first, second)):
        loader = DataLoader(data.for_process(Share(index, 2, 2)), batch_size=2, collate_fn=PreferenceCollator())
        assert [batch["counted"] for batch in loader] == expected


def test_drop_last_drops_the_incomplete_last_batches():
    data = stream(11, training=False)
    shares = [data.for_process(Share(index, 2, 2, drop_last=True)) for index in (0, 1)]
    assert [prompts(share) for share in shares] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert prompts(stream(3, training=False).for_process(Share(0, 2, 2, drop_last=True))) == []


@pytest.mark.parametrize("bad", [{2}, {0, 1, 4, 5, 8}, {9}])
def test_bad_images_do_not_change_the_number_of_pairs_of_a_process(bad):
    data = stream(10, bad=bad, training=False)
    found = [prompts(data.for_process(Share(index, 2, 2))) for index in (0, 1)]
    assert [len(share) for share in found] == [6, 6]
    assert {*found[0], *found[1]} == set(range(10)) - bad
    training = [prompts(islice(stream(10, bad=bad).for_process(Share(index, 2, 2)), 12)) for index in (0, 1)]
    assert not bad & {*training[0], *training[1]}


def test_a_share_without_a_good_image_is_an_error_and_not_an_endless_loop():
    with pytest.raises(ValueError, match="ended without a single pair"):
        next(iter(stream(8, bad={0, 1, 4, 5}).for_process(Share(0, 2, 2))))


def test_workers_divide_the_share_of_a_process():
    loader = DataLoader(
        stream(12, shards=2, training=False).for_process(Share(0, 2, 1)), batch_size=None, num_workers=2
    )
    assert sorted(prompts(loader)) == [0, 2, 4, 6, 8, 10]


def test_one_worker_reads_a_stream_like_the_main_process():
    data = stream(9, shards=3)
    one = DataLoader(data, batch_size=None, num_workers=1)
    assert told(islice(one, 20)) == told(islice(data, 20))


def test_processes_with_split_streams_take_all_their_pairs_with_different_draws():
    found = [told(islice(stream(3).for_process(Share(index, 2, 2, is_split=True)), 6)) for index in (0, 1)]
    assert [[prompt for prompt, *_ in share] for share in found] == [["p0", "p1", "p2"] * 2] * 2
    assert [[row for _, row, _ in share] for share in found] == [[0, 2, 4] * 2, [1, 3, 5] * 2]
    assert not {seed for *_, seed in found[0]} & {seed for *_, seed in found[1]}


def test_the_evaluation_of_a_shuffled_stream_has_a_fixed_order():
    rows = [{"prompt": f"p{i}", "chosen": png(2 * i), "rejected": png(2 * i + 1)} for i in range(12)]
    source = datasets.Dataset.from_list(rows).to_iterable_dataset().shuffle(seed=1, buffer_size=12)
    view = prepare_dataset(source, transform=PairTransform(16), repeat=True).for_evaluation()
    before = told(view)
    view.set_epoch(3)
    assert told(view) == before
    assert torch.equal(next(iter(view))["pixel_values"], next(iter(view))["pixel_values"])

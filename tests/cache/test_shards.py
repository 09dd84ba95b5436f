"""Shards of a cache are read to the bit. A shard that is cut off is named and written again."""

import pickle

import pytest
import torch

from trl_diffusion_sdpo.cache.shards import ShardStore

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8)
ROWS = 10


def row_of(row):
    """Return tensors of every dtype, whose shape depends on the row, and one without dimensions."""
    generator = torch.Generator().manual_seed(row)
    made = {str(dtype): (10 * torch.randn(2, row % 3, 4, generator=generator)).to(dtype) for dtype in DTYPES}
    return made | {"scalar": torch.tensor(row), "a.name": torch.tensor([1.0, -0.0, 0.0])}


def write(store, number, rows):
    with store.locked():
        store.write(number, {row: row_of(row) for row in rows})


@pytest.fixture
def store(tmp_path):
    store = ShardStore(tmp_path, {"vae": "a"}, ROWS)
    for number in range(3):
        write(store, number, range(4 * number, min(4 * number + 4, ROWS)))
    store.missing()
    return store


def missing(store):
    return store.missing().tolist()


def assert_whole(store):
    assert missing(store) == []
    for row in range(ROWS):
        expected, read = row_of(row), store.read(row)
        assert read.keys() == expected.keys()
        for name, value in expected.items():
            assert read[name].dtype == value.dtype and torch.equal(read[name], value)
            assert torch.equal(read[name].signbit(), value.signbit())


def test_rows_of_any_dtype_and_shape_are_read_to_the_bit(store):
    assert_whole(store)
    assert_whole(ShardStore(store.path.parent, {"vae": "a"}, ROWS))  # another process
    assert_whole(pickle.loads(pickle.dumps(store)))  # a worker


def test_another_key_is_another_folder(tmp_path, store):
    other = ShardStore(tmp_path, {"vae": "b"}, ROWS)
    assert other.path != store.path and len(missing(other)) == ROWS
    with pytest.raises(KeyError):
        other.read(3)


def test_a_new_store_names_what_differs_from_the_most_similar_one(tmp_path, caplog):
    caplog.set_level("INFO", "trl_diffusion_sdpo")
    keys = [{"vae": {"shift": shift}, "data": data} for shift, data in ((1, "a"), (2, "b"), (2, "c"))]
    first, second, third = (ShardStore(tmp_path, key, ROWS) for key in keys)
    for store in (first, second):
        write(store, 0, [0])
    caplog.clear()
    write(third, 0, [0])
    (message,) = caplog.messages
    assert second.path.name in message and '"b"' in message and '"c"' in message and "shift" not in message
    caplog.clear()
    write(third, 1, [1])
    assert not caplog.messages


def test_what_a_kill_left_unfinished_is_deleted(store):
    left = store.path / "000002.safetensors.partial"
    left.write_bytes(b"half of it")
    (store.path / "000002.safetensors").unlink()
    assert missing(store) == [8, 9]
    write(store, 2, [8, 9])
    assert_whole(store)
    assert not left.exists()


def test_a_shard_that_is_cut_off_is_named_and_replaced(store, caplog):
    file = store.path / "000001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    assert missing(store) == [4, 5, 6, 7] and str(file) in caplog.text
    write(store, 1, range(4, 8))
    assert file.read_bytes() == whole
    assert_whole(store)

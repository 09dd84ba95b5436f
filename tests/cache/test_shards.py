"""Shards of a cache: what was written is read to the bit, and what was damaged is found, named and written again."""

import errno
import json
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch

from trl_diffusion_sdpo.cache import shards
from trl_diffusion_sdpo.cache.shards import DamagedShardError, ShardStore

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8)


def row_of(row):
    """Tensors of a row, of every dtype, with a shape that depends on the row, and one without dimensions."""
    generator = torch.Generator().manual_seed(row)
    made = {str(dtype): (10 * torch.randn(2, row % 3, 4, generator=generator)).to(dtype) for dtype in DTYPES}
    padded = torch.nn.functional.pad(torch.randn(1 + row, 4, generator=generator), (0, 0, 0, 100))
    return made | {"scalar": torch.tensor(row), "padded": padded, "minus zero": torch.tensor([1.0, -0.0, 0.0])}


def write(store, numbers):
    for number in numbers:
        rows = [row_of(row) for row in store.rows_of(number)]
        store.write(number, {name: [row[name] for row in rows] for name in rows[0]})


@pytest.fixture
def store(tmp_path):
    store = ShardStore(tmp_path, {"vae": "a"}, 10, 4)
    write(store, store.missing())
    return store


def assert_whole(store):
    assert store.missing() == store.verify() == []
    for row in range(store.rows):
        expected, read = row_of(row), store.read(row)
        assert read.keys() == expected.keys()
        for name, value in expected.items():
            assert read[name].dtype == value.dtype and torch.equal(read[name], value)
            assert torch.equal(read[name].signbit(), value.signbit())


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def flip(path, place=None, keep_time=False):
    """Change one bit of a file, by default in the middle."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 4
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def place_of(store, row):
    """Where the first tensor of a row is in the bytes of its file."""
    data = store.file(row // store.shard_rows).read_bytes()
    return data.index(row_of(row)["torch.float32"].numpy().tobytes())


def test_rows_of_any_dtype_and_shape_are_read_to_the_bit(store):
    assert [list(store.rows_of(number)) for number in range(len(store))] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert_whole(store)
    assert_whole(ShardStore(store.path.parent, {"vae": "a"}, 10, 4))  # another process
    assert store.nbytes == sum(store.file(number).stat().st_size for number in range(3))
    with pytest.raises(IndexError, match="rows 0 to 9"):
        store.read(10)


def test_padding_takes_no_space(tmp_path):
    long, short = torch.zeros(100_000), torch.zeros(10)
    for name, tensor in (("long", long), ("short", short)):
        tensor[:5] = 1.0
        store = ShardStore(tmp_path / name, {}, 1, 1)
        store.write(0, {"a": [tensor]})
        assert torch.equal(store.read(0)["a"], tensor) and store.nbytes < 2000


def test_what_is_read_may_be_changed_without_changing_the_cache(store):
    store.read(2)["torch.float32"].zero_()
    assert_whole(store)


def test_a_shard_opens_in_datasets(store):
    assert datasets.Dataset.from_file(str(store.file(0))).num_rows == 4


def test_a_pickled_store_carries_no_rows(store):
    store.read(0)
    assert len(pickle.dumps(store)) < 2000
    assert_whole(pickle.loads(pickle.dumps(store)))


def test_each_key_has_a_folder_of_its_own_which_states_it(tmp_path):
    stores = [ShardStore(tmp_path, *facts) for facts in (({"a": 1}, 10, 4), ({"a": 2}, 10, 4), ({"a": 1}, 11, 4))]
    stores += [ShardStore(tmp_path, {"a": 1}, 10, 5)]
    assert len({store.path for store in stores}) == 4
    assert ShardStore(tmp_path, {"b": 1, "a": 2}, 1, 1).path == ShardStore(tmp_path, {"a": 2, "b": 1}, 1, 1).path
    write(stores[0], stores[0].missing())
    assert json.loads((stores[0].path / "manifest.json").read_text())["key"] == {"a": 1}


def write_share(store, rank):
    write(store, store.missing(range(len(store))[rank::2]))


def test_two_processes_write_the_same_files_as_one(store, tmp_path):
    two, context = ShardStore(tmp_path / "two", {"vae": "a"}, 10, 4), multiprocessing.get_context("fork")
    children = [context.Process(target=write_share, args=(two, rank)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert_whole(two)
    assert contents(two.path) == contents(store.path)


def test_a_kill_leaves_finished_shards_and_no_others(store):
    """The states that a kill leaves: a temporary file, and a shard without its checksum."""
    before = contents(store.path)
    finished = store.file(0).stat().st_mtime_ns
    (store.path / "000001.sha256.json").unlink()
    store.file(2).unlink()
    (store.path / "000002.sha256.json").unlink()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (store.path / f"000002.arrow.{socket.gethostname()}-{ended.pid}.tmp").write_bytes(b"half of it")
    elsewhere = store.path / "000002.arrow.another-machine-1.tmp"
    elsewhere.write_bytes(b"half of it")
    os.utime(elsewhere, (0, 0))
    again = ShardStore(store.path.parent, {"vae": "a"}, 10, 4)
    assert again.missing() == [1, 2]
    write(again, again.missing())
    assert contents(store.path) == before and store.file(0).stat().st_mtime_ns == finished


@pytest.mark.parametrize("name", [f"000001.arrow.{socket.gethostname()}-1.tmp", "000001.arrow.another-machine-7.tmp"])
def test_what_another_process_is_writing_is_left_alone(store, name):
    (store.path / name).write_bytes(b"half of it")
    assert ShardStore(store.path.parent, {"vae": "a"}, 10, 4).missing() == []
    assert (store.path / name).exists()


def test_an_error_of_the_system_does_not_count_as_damage(store, monkeypatch):
    def fail(path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("trl_diffusion_sdpo.cache.shards._open_batch", fail)
    with pytest.raises(OSError, match="Too many open files"):
        store.read(0)
    assert store.is_finished


def test_few_shards_are_open_at_a_time(store, monkeypatch):
    opened = []
    open_batch = shards._open_batch
    monkeypatch.setattr(shards, "_open_batch", lambda path: opened.append(path.name) or open_batch(path))
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    again = ShardStore(store.path.parent, {"vae": "a"}, 10, 4)
    expected = [store.read(row) for row in (0, 4, 8, 5, 1)]
    opened.clear()
    found = [again.read(row) for row in (0, 4, 8, 5, 1)]
    assert all(torch.equal(one[name], other[name]) for one, other in zip(found, expected, strict=True) for name in one)
    assert [opened.count(f"{number:06d}.arrow") > 2 for number in range(3)] == [True, False, False]  # checks open too


DAMAGE = {
    "does not have its checksum": lambda store: flip(store.file(1)),
    "bytes instead of": lambda store: store.file(1).write_bytes(store.file(1).read_bytes()[:-9]),
    "is missing": lambda store: store.file(1).unlink(),
    "has a damaged checksum": lambda store: (store.path / "000001.sha256.json").write_text('{"sha256": 1'),
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_a_damaged_shard_is_named_and_written_again(store, problem, caplog):
    before = contents(store.path)
    DAMAGE[problem](store)
    assert store.missing() == [1]
    assert f"The shard {store.file(1)} " in caplog.text and problem in caplog.text
    with pytest.raises(DamagedShardError, match=r"000001.arrow cannot be used: it is not finished"):
        ShardStore(store.path.parent, {"vae": "a"}, 10, 4).read(5)
    write(store, [1])
    assert contents(store.path) == before
    assert_whole(store)


def test_a_shard_of_another_key_is_stale(store, tmp_path, caplog):
    other = ShardStore(tmp_path, {"vae": "b"}, 10, 4)
    write(other, other.missing())
    for name in ("000002.arrow", "000002.sha256.json"):
        (store.path / name).write_bytes((other.path / name).read_bytes())
    assert store.missing() == [2] and "is stale" in caplog.text
    write(store, [2])
    assert_whole(store)


def test_a_bit_that_changed_unnoticed_is_never_read(store):
    """As on a failing disk, which changes neither size nor time: whoever reads the row finds it, and so does `verify`;
    the next start writes the shard again."""
    flip(store.file(1), place_of(store, 5), keep_time=True)
    assert store.missing() == []
    store.read(4)
    with pytest.raises(DamagedShardError, match=r"000001.arrow cannot be used: row 5 does not have its checksum"):
        store.read(5)
    assert store.missing() == [1]
    write(store, [1])
    flip(store.file(0), place_of(store, 2), keep_time=True)
    assert store.missing() == [] and store.verify() == [0]


def test_any_flipped_bit_is_found_before_it_is_read(store):
    """Wherever it is in the file: in a tensor, in a shape, in Arrow's own data."""
    whole = store.file(1).read_bytes()
    unseen = []
    for place in range(0, len(whole), 61):
        flip(store.file(1), place, keep_time=True)
        try:
            for row in store.rows_of(1):
                read = ShardStore(store.path.parent, {"vae": "a"}, 10, 4).read(row)
                if not all(torch.equal(read[name], value) for name, value in row_of(row).items()):
                    unseen.append(place)
        except DamagedShardError:
            pass
        write(store, [1])
    assert not unseen


def test_a_copied_cache_is_checked_once(store, monkeypatch):
    os.utime(store.file(0))
    hashed, hash_file = [], shards._sha256
    monkeypatch.setattr(shards, "_sha256", lambda path: hashed.append(path.name) or hash_file(path))
    os.utime(store.path / "000000.sha256.json", ns=(0, 0))
    assert store.missing() == [] and hashed == ["000000.arrow"]
    assert store.missing() == [] and hashed == ["000000.arrow"]


def test_columns_that_do_not_fit_the_shard_are_refused(store):
    with pytest.raises(ValueError, match="must have 4 tensors of one dtype; 'a' has 3"):
        store.write(0, {"a": torch.zeros(3, 1)})
    with pytest.raises(ValueError, match=r"'a' has 2 of torch.float16, torch.float32"):
        store.write(2, {"a": [torch.zeros(1), torch.zeros(1).half()]})
    with pytest.raises(ValueError, match="at least 1"):
        ShardStore(store.path, {}, 1, 0)
    assert_whole(store)


def test_a_full_disk_leaves_what_was_finished(store, monkeypatch):
    before = contents(store.path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(store, [1])
    monkeypatch.undo()
    assert contents(store.path) == before


def test_a_store_without_rows_has_no_shards(tmp_path):
    store = ShardStore(tmp_path, {}, 0, 4)
    assert len(store) == 0 and store.missing() == [] and store.nbytes == 0

"""Shards are read to the bit, with few open at a time. A truncated one is named and written again."""

import contextlib
import gc
import os
import pickle
import subprocess
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from trl_diffusion_sdpo.cache import shards
from trl_diffusion_sdpo.cache.shards import OPEN_SHARDS, ShardStore, complete
from trl_diffusion_sdpo.utils.processes import ALONE, Peers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8)
ROWS = 10


def row_of(row):
    """Return tensors of every dtype, whose shape depends on the row, and one without dimensions."""
    generator = torch.Generator().manual_seed(row)
    made = {str(dtype): (10 * torch.randn(2, row % 3, 4, generator=generator)).to(dtype) for dtype in DTYPES}
    return made | {"scalar": torch.tensor(row), "a.name": torch.tensor([1.0, -0.0, 0.0])}


def write(store, number, rows):
    with contextlib.ExitStack() as stack:
        assert store.lock(stack)
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
    with pytest.raises(ValueError, match=f"Row 3 .*{other.path}"):
        other.read(3)


def test_a_new_store_names_what_differs_from_the_most_similar_one_of_its_data(tmp_path, caplog):
    caplog.set_level("INFO", "trl_diffusion_sdpo")
    values = (
        (1, 8, "a"),
        (2, 8, "a"),
        (2, 9, "b"),
        (2, 9, "a"),
    )  # the third has the least differences, but other data
    keys = [{"vae": {"shift": shift, "size": size}, "data": data} for shift, size, data in values]
    first, second, third, fourth = (ShardStore(tmp_path, key, ROWS) for key in keys)
    for store in (first, second, third):
        caplog.clear()
        write(store, 0, [0])
    assert not caplog.messages  # of evaluation data, for example
    write(fourth, 0, [0])
    (message,) = caplog.messages
    assert second.path.name in message and "size was 8, is 9" in message and "shift" not in message
    caplog.clear()
    write(fourth, 1, [1])
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


def test_a_shard_of_another_cache_is_named_and_replaced(tmp_path, store, caplog):
    """Somebody has merged the folders of two caches, whose shards have the same names and rows."""
    other = ShardStore(tmp_path, {"vae": "b"}, ROWS)
    write(other, 0, range(4))
    theirs = other.path / "000000.safetensors"
    theirs.write_bytes((store.path / "000000.safetensors").read_bytes())
    assert missing(other) == list(range(ROWS)) and str(theirs) in caplog.text


def maps():
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_the_number_of_open_shards_does_not_grow_with_the_number_of_shards(tmp_path):
    """Linux allows 65,530 memory maps, and 10 million pairs of 1024 px have 312,500 shards. Rows that a caller keeps
    hold no map open either."""
    count = 4 * OPEN_SHARDS
    store = ShardStore(tmp_path, {"vae": "a"}, count)
    store.path.mkdir()
    for row in range(count):
        store.write(row, {row: {"moments": torch.tensor([float(row)])}})
    assert missing(store) == []
    before = maps()
    kept = [store.read(row)["moments"] for row in range(count)]
    assert torch.cat(kept).tolist() == list(range(count))
    assert maps() - before <= OPEN_SHARDS + 20, "maps grow with the number of shards"


def test_a_reader_keeps_four_bytes_a_row(tmp_path):
    """100 shards of 64 rows with two tensors each. Names of rows as text took 571 bytes a row. Beyond four, 64 open
    shards may keep some."""
    count = 100 * 64
    store = ShardStore(tmp_path, {"vae": "a"}, count)
    store.path.mkdir()
    for number in range(100):
        rows = range(64 * number, 64 * number + 64)
        store.write(number, {row: {"moments": torch.zeros(2), "sizes": torch.zeros(3, 2)} for row in rows})
    assert missing(store) == [] and store.read(0)  # what the first call imports is not of the store
    tracemalloc.start()
    assert missing(store) == []
    for row in range(0, count, 16):
        store.read(row)
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 24 * count, f"{kept / count:.0f} bytes a row"
    assert len(pickle.dumps(store)) < 4 * count + 10_000  # what a spawned worker gets


@pytest.fixture
def listed(store, monkeypatch):
    """A store whose shards were listed into a file, and a list of the shards that are opened from now on."""
    monkeypatch.setattr(shards, "LISTED_ROWS", 0)
    assert missing(store) == []
    opened = []
    rows_in = ShardStore._rows_in
    monkeypatch.setattr(ShardStore, "_rows_in", lambda self, file: opened.append(file) or rows_in(self, file))
    return opened


def test_a_finished_store_is_checked_by_one_file_which_its_readers_share(store, listed, tmp_path):
    again = ShardStore(tmp_path, {"vae": "a"}, ROWS)
    assert missing(again) == [] and listed == []
    assert_whole(again)
    spawned = pickle.loads(pickle.dumps(again))
    assert spawned.read(5).keys() == row_of(5).keys() and len(pickle.dumps(again)) < 4000
    assert len(list(tmp_path.glob("*.npy"))) == 1


def test_a_worker_that_starts_after_another_run_has_added_rows_reads_on(store, listed, tmp_path):
    """The table of rows that it maps stays until no run can read it any more."""
    (store.path / "000002.safetensors").rename(tmp_path / "later")
    short = ShardStore(tmp_path, {"vae": "a"}, ROWS)
    assert missing(short) == [8, 9]
    spawned = pickle.dumps(short)
    (tmp_path / "later").rename(store.path / "000002.safetensors")
    (tmp_path / f"{store.path.name}.5.npy").write_bytes(b"a table that no run has read for a month")
    os.utime(tmp_path / f"{store.path.name}.5.npy", (0, 0))
    assert missing(ShardStore(tmp_path, {"vae": "a"}, ROWS)) == [] and len(listed) == 2 + 3
    worker = pickle.loads(spawned)
    assert worker.read(5).keys() == row_of(5).keys() and not worker.has(8)
    assert not (tmp_path / f"{store.path.name}.5.npy").exists()


def test_a_store_that_has_changed_is_listed_anew(store, listed, tmp_path):
    (store.path / "000001.safetensors").unlink()
    assert missing(store) == [4, 5, 6, 7] and len(listed) == 2
    write(store, 1, range(4, 8))
    assert missing(store) == [] and len(listed) == 2 + 3


def test_a_shard_that_cannot_be_read_is_found_by_the_next_start(store, listed, tmp_path):
    """Its size is no entry of the folder, so the list of shards still has it."""
    file = store.path / "000001.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="Row 5"):
        store.read(5)
    assert missing(ShardStore(tmp_path, {"vae": "a"}, ROWS)) == [4, 5, 6, 7]


def test_rows_that_a_run_does_not_read_are_not_missing(store, tmp_path):
    (store.path / "000001.safetensors").unlink()
    odd = ShardStore(tmp_path, {"vae": "a"}, ROWS, lambda _: np.arange(ROWS) % 2 == 1)
    assert missing(odd) == [5, 7] and odd.wanted == 5 and not odd.has(5)


def test_rows_are_added_beside_those_that_other_runs_read_and_in_place_of_damaged_ones(store):
    """A network disk takes a file that is replaced away from readers on other machines."""
    (store.path / "000001.safetensors").unlink()
    rows = {row: row_of(row) for row in range(4, 8)}
    inodes = {file: file.stat().st_ino for file in store.path.glob("*.safetensors")}
    store.add(1, {row: rows[row] for row in (4, 5)}, step=3)
    store.add(1, {row: rows[row] for row in (6, 7)}, step=3)
    assert (store.path / "000001.safetensors").exists() and (store.path / "000004.safetensors").exists()
    assert_whole(store)
    assert inodes == {file: file.stat().st_ino for file in inodes}
    damaged = store.path / "000004.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert missing(store) == [6, 7]
    store.add(1, {row: rows[row] for row in (6, 7)}, step=3)
    assert_whole(store)
    assert len(list(store.path.glob("*.safetensors"))) == 4


@pytest.mark.parametrize("harm", ["deleted", "cut off"])
def test_a_shard_that_is_lost_while_a_run_reads_it_is_named(store, harm):
    file = store.path / "000001.safetensors"
    file.unlink() if harm == "deleted" else file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"Row 5 .*{store.path}"):
        store.read(5)


def test_a_folder_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    store = ShardStore(tmp_path / "file" / "latents", {}, ROWS)
    assert len(missing(store)) == ROWS
    with pytest.raises(ValueError, match=f"{store.path}.*`precompute_dir`"):
        complete([store], ALONE, lambda rows: None)


@pytest.fixture
def read_only_disk(tmp_path):
    """`read_only_disk()`: make the folder `disk` read-only. Permissions do not hold root back, so it is a mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system")
    yield lambda: subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_read_only_cache_is_read_if_it_is_complete_and_named_if_rows_are_missing(tmp_path, read_only_disk):
    store = ShardStore(tmp_path / "disk", {"vae": "a"}, ROWS)
    write(store, 0, range(4))
    read_only_disk()
    with pytest.raises(ValueError, match=f"{store.path}.*`precompute_dir`"):
        complete([store], ALONE, lambda rows: None)
    whole = ShardStore(tmp_path / "disk", {"vae": "a"}, 4)
    complete([whole], ALONE, lambda rows: pytest.fail("nothing is missing"))
    assert torch.equal(whole.read(3)["scalar"], torch.tensor(3))


# ---- Several processes ----------------------------------------------------------------------------------------------


def in_two_threads(act):
    """Return what `act(peers)` returned, or its error, in each of two peers, which exchange values as processes do."""
    values, results, barrier = [None, None], [None, None], threading.Barrier(2, timeout=20)

    def gather(index):
        def call(value):
            values[index] = value
            barrier.wait()
            gathered = list(values)
            barrier.wait()
            return gathered

        return call

    def run(index):
        try:
            results[index] = act(Peers(index, 2, gather(index)))
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def write_share(store, peers):
    def compute(missing):
        for row in missing[0][peers.index :: peers.count].tolist():
            store.write(row, {row: row_of(row)})

    return lambda missing: peers.gather_results(lambda: compute(missing))


def test_two_processes_complete_a_store(tmp_path):
    def act(peers):
        store = ShardStore(tmp_path, {"vae": "a"}, ROWS)
        complete([store], peers, write_share(store, peers))
        assert_whole(store)
        return "done"

    assert in_two_threads(act) == ["done", "done"]


@pytest.mark.parametrize("second_has_the_key", [False, True])
def test_processes_with_disks_of_their_own_are_refused_in_both(tmp_path, second_has_the_key):
    """Before anything is computed, unless the second disk has a part of the cache from an earlier run."""
    if second_has_the_key:
        write(ShardStore(tmp_path / "1", {"vae": "a"}, ROWS), 0, range(4))
    computed = []

    def act(peers):
        store = ShardStore(tmp_path / str(peers.index), {"vae": "a"}, ROWS)
        write_rows = write_share(store, peers)
        complete([store], peers, lambda missing: (computed.append(peers.index), write_rows(missing)))

    for error in in_two_threads(act):
        assert isinstance(error, ValueError) and "`precompute_dir`" in str(error) and str(tmp_path) in str(error)
    assert sorted(computed) == ([0, 1] if second_has_the_key else [])


def test_no_process_waits_long_for_one_that_waits_for_another_run(tmp_path, monkeypatch):
    """The processes exchange a value at each attempt to get the lock, so `ddp_timeout` begins anew."""
    monkeypatch.setattr(shards, "POLL_SECONDS", 0.05)
    store = ShardStore(tmp_path, {"vae": "a"}, ROWS)
    store.path.mkdir()
    other_run = FileLock(store.path / ".lock", thread_local=False)
    other_run.acquire()
    exchanged = []

    def act(peers):
        def gather(value):
            exchanged.append(peers.index)
            if exchanged.count(0) == 10:
                other_run.release(force=True)
            return peers.gather(value)

        mine = ShardStore(tmp_path, {"vae": "a"}, ROWS)
        patient = Peers(peers.index, peers.count, gather)
        complete([mine], patient, write_share(mine, patient))
        return len(mine.missing())

    assert in_two_threads(act) == [0, 0]
    assert exchanged.count(0) >= 10 and exchanged.count(0) == exchanged.count(1)

"""Checksums of all images and prompts: one that changes anywhere is noticed, and where data lie does not matter."""

import contextlib
import errno
import hashlib
import logging
import mmap
import os
import shutil
import sqlite3

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import ExifTags, Image
from torch.utils.data import Dataset

from trl_diffusion_sdpo.data import contents, file_contents
from trl_diffusion_sdpo.data.formats import FORMATS
from trl_diffusion_sdpo.data.kept_index import KEPT, KEPT_FOLDER
from trl_diffusion_sdpo.data.pairs import PairMixture, prepare_dataset
from trl_diffusion_sdpo.data.tables import THOROUGHLY
from trl_diffusion_sdpo.data.transforms import PairTransform

COUNT = 2 * THOROUGHLY  # a sample has every second pair
ONE, OTHER = COUNT - 3, COUNT - 1  # not in it


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Where checksums are kept."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def fingerprint(data) -> dict:
    return prepare_dataset(data, transform=PairTransform(16), verify_images="none").fingerprint(thorough=True)


def changed(one, other) -> set[str]:
    return {name for name in one if one[name] != other[name]}


def picture(value) -> Image.Image:
    return Image.new("RGB", (16, 16), (value, value, 7))


def rows_of(store, folder, count=COUNT) -> list[dict]:
    """Pairs of different images, each made by `store` from a picture and a path."""
    folder.mkdir(exist_ok=True)
    sides = ("chosen", "rejected")
    return [
        {"prompt": f"prompt {row}"}
        | {side: store(picture((2 * row + at) % 251), folder / f"{row}-{side}.bmp") for at, side in enumerate(sides)}
        for row in range(count)
    ]


def as_file(image, path):
    if not path.exists():
        image.save(path)
    return str(path)


def as_bytes(image, path):
    return {"bytes": image.tobytes(), "path": None}


def as_table(rows) -> datasets.Dataset:
    features = {name: datasets.Image(decode=False) for name in ("chosen", "rejected")}
    return datasets.Dataset.from_list(rows, datasets.Features({"prompt": datasets.Value("string"), **features}))


def on_disk(rows, folder) -> datasets.Dataset:
    as_table(rows).save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder))


KINDS = {
    "list of pictures": (lambda image, path: image, list),
    "list of files": (as_file, list),
    "list of bytes": (as_bytes, list),
    "table of files": (as_file, as_table),
    "table of bytes": (as_bytes, as_table),
    "shuffled table": (as_bytes, lambda rows: as_table(rows).shuffle(seed=3)),
    "mixture": (as_bytes, lambda rows: PairMixture([as_table(rows[:100]), as_table(rows[100:])])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_or_prompt_that_no_sample_has_is_noticed(kind, tmp_path):
    store, make = KINDS[kind]
    rows = rows_of(store, tmp_path / "images")
    start = fingerprint(make(rows))
    assert fingerprint(make(rows_of(store, tmp_path / "images"))) == start
    for column, noticed in {"chosen": "images", "prompt": "prompts"}.items():
        exchanged = [dict(row) for row in rows]
        exchanged[ONE][column], exchanged[OTHER][column] = rows[OTHER][column], rows[ONE][column]
        assert changed(start, fingerprint(make(exchanged))) == {noticed}
    file = tmp_path / "images" / f"{OTHER}-rejected.bmp"  # replaced in place by one of its size
    file.unlink(missing_ok=True)
    rows[OTHER]["rejected"] = store(picture(250), file)
    assert changed(start, fingerprint(make(rows))) == {"images"}


def test_where_images_lie_and_in_how_many_files_does_not_matter(tmp_path):
    rows = rows_of(as_bytes, tmp_path / "images")
    start = fingerprint(as_table(rows))
    on_disk(rows, tmp_path / "saved")
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    assert fingerprint(datasets.load_from_disk(str(tmp_path / "moved"))) == start
    as_table(rows).save_to_disk(str(tmp_path / "parts"), num_shards=5)
    assert fingerprint(datasets.load_from_disk(str(tmp_path / "parts"))) == start
    backwards = list(range(COUNT))[::-1]
    assert fingerprint(as_table(rows).select(backwards).select(backwards)) == start
    files = rows_of(as_file, tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copyfile)  # with other times
    moved = [
        {name: value.replace("/here/", "/there/") if name != "prompt" else value for name, value in row.items()}
        for row in files
    ]
    assert fingerprint(as_table(moved)) == fingerprint(as_table(files)) and fingerprint(moved) == fingerprint(files)


def test_images_are_read_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    read = []
    for module, name in ((file_contents, "_digest_of_file"), (contents, "_hash_block")):
        counted = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, as_before=counted: read.append(1) or as_before(*args))
    saved = on_disk(rows_of(as_bytes, tmp_path / "images"), tmp_path / "saved")
    start = fingerprint(saved)
    assert read and not read.clear() and fingerprint(saved) == start and not read
    files = rows_of(as_file, tmp_path / "images")
    start = fingerprint(files)
    assert len(read) == 2 * COUNT and not read.clear() and fingerprint(files) == start and not read
    os.utime(files[5]["chosen"], ns=(1, 1))
    assert fingerprint(files) == start and len(read) == 1  # the others are not read again
    picture(249).save(files[6]["chosen"])
    assert fingerprint(files) != start


def test_of_files_that_did_not_change_none_is_looked_up(tmp_path, monkeypatch):
    files = rows_of(as_file, tmp_path / "images", count=4)
    start = fingerprint(files)
    kept = list((tmp_path / "datasets" / file_contents.CHECKSUMS_FOLDER).glob("files-*"))
    assert len(kept) == 1
    with monkeypatch.context() as patch:
        patch.setattr(file_contents, "_known_files", None)
        assert fingerprint(files) == start
        patch.setattr(datasets, "is_caching_enabled", lambda: False)
        with pytest.raises(TypeError):
            fingerprint(files)
    assert fingerprint(files[::-1]) != start  # the same files in another order
    kept[0].write_bytes(b"{")
    assert fingerprint(files) == start


def test_of_files_that_are_added_or_left_out_only_new_ones_are_read(tmp_path, monkeypatch):
    read, as_before = [], file_contents._digest_of_file
    monkeypatch.setattr(file_contents, "_digest_of_file", lambda name: read.append(name) or as_before(name))
    files = rows_of(as_file, tmp_path / "images", count=40)
    start = fingerprint(files[:-1])
    assert len(read) == 78 and not read.clear()
    assert fingerprint(files) != start and sorted(read) == sorted(files[-1][side] for side in ("chosen", "rejected"))
    read.clear()
    assert fingerprint(files[1:]) not in (start, fingerprint(files)) and fingerprint(files[:-1]) == start and not read
    monkeypatch.chdir(tmp_path)  # the same files by other names
    relative = [{**row, **{side: os.path.relpath(row[side]) for side in ("chosen", "rejected")}} for row in files]
    assert fingerprint(relative) == fingerprint(files) and not read


def test_a_damaged_or_locked_store_of_checksums_costs_reading_only(tmp_path, monkeypatch, caplog):
    files, store = rows_of(as_file, tmp_path / "images", count=4), tmp_path / "datasets" / file_contents.FILES
    start = fingerprint(files)
    monkeypatch.setattr(file_contents, "_read_kept", lambda file: b"")  # that of all files together
    store.write_bytes(b"no database" * 1000)
    assert fingerprint(files) == start and "are not kept" in caplog.text  # removed
    caplog.clear()
    assert fingerprint(files) == start == fingerprint(files)  # and made again
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    monkeypatch.setattr(file_contents, "LOCKED", 0.01)
    with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert fingerprint(files) == start and "database is locked" in caplog.text


def test_files_that_were_read_the_longest_time_ago_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(file_contents, "KEPT_FILES", 10)
    files = rows_of(as_file, tmp_path / "images", count=8)
    start = fingerprint(files)
    with contextlib.closing(sqlite3.connect(tmp_path / "datasets" / file_contents.FILES)) as store:
        assert store.execute("SELECT count(*) FROM files").fetchone() == (10,)
    assert fingerprint(files) == start


@pytest.mark.parametrize("call", ["stat", "read"])
def test_a_file_that_cannot_be_read_now_is_no_other_file(call, tmp_path, monkeypatch):
    files, read = rows_of(as_file, tmp_path / "images", count=4), []
    right = fingerprint(files)
    shutil.rmtree(tmp_path / "datasets")
    module, name = {"stat": (os, "stat"), "read": (file_contents.hashlib, "file_digest")}[call]
    as_before, bad = getattr(module, name), files[1]["rejected"]

    def failing(file, *args, **options):
        if bad in (file, getattr(file, "name", "")):
            raise OSError(errno.ESTALE, "Stale file handle")
        read.append(file)
        return as_before(file, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing)
        with pytest.raises(OSError, match=f"Stale file handle.*drop its row.*{bad}"):
            fingerprint(files)
    if call == "read":  # what was read before is kept
        read.clear()
        bad = "no file"
        monkeypatch.setattr(module, name, failing)
    assert fingerprint(files) == right
    assert call == "stat" or len(read) == 5  # of eight files, three came before the error


def virtual_images(size, rows=2):
    """A table of images in chunks of one row, whose bytes are one buffer that takes no memory unless it is copied."""
    data, offsets = pa.py_buffer(mmap.mmap(-1, size)), pa.py_buffer(np.array([0, size], dtype=np.int32))
    image = pa.StructArray.from_arrays(
        [pa.BinaryArray.from_buffers(pa.binary(), 1, [None, offsets, data]), pa.array([None], pa.string())],
        ["bytes", "path"],
    )
    file = pa.array([{"bytes": None, "path": "a.png"}], image.type)
    return pa.table({"chosen": pa.chunked_array([image] * rows), "rejected": pa.chunked_array([file] * rows)})


def test_chunks_may_together_have_more_bytes_than_offsets_reach(monkeypatch):
    size, updates = 2**30 + 1, []

    class Lengths:
        def update(self, data):
            updates.append(memoryview(data).nbytes)

        def digest(self):
            return b""

    table = virtual_images(size)
    with monkeypatch.context() as patch:
        patch.setattr(contents.hashlib, "sha256", Lengths)
        assert contents._hash_block(table) == (b"", True)
    assert [length for length in updates if length >= 2**20] == [size, size]


def test_bytes_of_images_are_not_copied_for_the_names_of_files():
    pool = pa.proxy_memory_pool(before := pa.default_memory_pool())
    images = datasets.Dataset(datasets.table.InMemoryTable(virtual_images(2**30 + 1)), fingerprint="virtual")
    pa.set_memory_pool(pool)
    try:
        assert contents._names_in(images) == ["a.png", "a.png"]
    finally:
        pa.set_memory_pool(before)
    assert 0 < pool.max_memory() < 2**20


IMAGES = [
    {"bytes": b"one", "path": "unused.png"},
    {"bytes": None, "path": "a.png"},
    {"bytes": b"", "path": "b.png"},
    None,
    {"bytes": None, "path": "zip://c.png::d.zip"},
    {"bytes": b"two", "path": None},
    {"bytes": None, "path": "e.png"},
]
KIND = pa.struct({"bytes": pa.binary(), "path": pa.string()})
PATHS = ["a.png", None, "https://b/c.png", "a.png", "d.png", "", "e.png"]
LISTS = [IMAGES[:2], None, [], IMAGES[2:5], None, IMAGES[5:], IMAGES[1:2]]
COLUMNS = {
    "images": (pa.array(IMAGES, KIND), ["a.png", "b.png", "e.png"]),
    "lists": (pa.array(LISTS, pa.list_(KIND)), ["a.png", "b.png", "e.png", "a.png"]),
    "pairs": (pa.array([IMAGES[:2], None, IMAGES[5:]], pa.list_(KIND, 2)), ["a.png", "e.png"]),
    "paths": (pa.array(PATHS), ["a.png", "a.png", "d.png", "", "e.png"]),
    "views": (pa.array(PATHS, pa.string_view()), ["a.png", "a.png", "d.png", "", "e.png"]),
    "dictionary": (pa.array(PATHS).dictionary_encode(), ["a.png", "a.png", "d.png", "", "e.png"]),
    "numbers": (pa.array([1, 2, None]), []),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_chunks_and_slices_give_equal_hashes_and_names(name):
    column, names = COLUMNS[name]
    whole = contents._hash_block(pa.table({"chosen": column}))
    assert whole[1] == bool(names)
    hidden = pa.concat_arrays([column, column])[len(column) :]
    for size in (1, 2, 3):
        chunks = [hidden[start : start + size] for start in range(0, len(column), size)]
        assert contents._hash_block(pa.table({"chosen": pa.chunked_array(chunks)})) == whole
        parts = [contents.local_names(chunk) for chunk in chunks]
        assert [found for part, _ in parts for found in part.to_pylist()] == names
        assert [len(counts) for _, counts in parts] == [len(chunk) for chunk in chunks]
        assert sum(counts.sum() for _, counts in parts) == len(names)
    assert contents._hash_block(pa.table({"chosen": column[1:]})) != whole


def test_rows_of_a_selection_are_not_looked_up_one_by_one(monkeypatch):
    table = pa.table({"chosen": COLUMNS["lists"][0], "prompt": [f"prompt {row % 5}" for row in range(7)]})
    order = [6, 0, 3, 5, 3, 1]
    data = datasets.Dataset(datasets.table.InMemoryTable(table)).select(order)
    whole = datasets.Dataset(datasets.table.InMemoryTable(table.take(order)))
    right = contents.checksum_of_prompts(whole, FORMATS["canonical"])
    monkeypatch.setattr(datasets.formatting.formatting, "_query_table_with_indices_mapping", None)
    assert contents._names_in(data.select_columns(["chosen"])) == ["a.png", "a.png", "b.png", "e.png", "b.png"]
    assert contents.checksum_of_prompts(data, FORMATS["canonical"]) == right


def test_a_prepared_data_set_looks_at_its_files_once(tmp_path, monkeypatch):
    for make in (list, as_table):
        rows = rows_of(as_file, tmp_path / "images", count=4)
        prepared = prepare_dataset(make(rows), transform=PairTransform(16), verify_images="none")
        first = prepared.fingerprint(thorough=True)
        with monkeypatch.context() as patch:
            patch.setattr(file_contents, "_status", None)
            assert prepared.fingerprint(thorough=True) == first


def test_checksums_are_kept_apart_from_indices_and_of_limited_number(tmp_path, monkeypatch):
    monkeypatch.setattr(file_contents, "KEPT_CHECKSUMS", 3)
    cache = tmp_path / "datasets"
    for number in range(5):
        assert file_contents.kept(f"name{number}", lambda n=number: {"sha256": n}) == {"sha256": number}
        os.utime(cache / "image_checksums" / f"name{number}-1.json", (number, number))
        file_contents.kept("name0", dict)  # is used, with the time of now
    left = sorted(file.name for file in (cache / "image_checksums").iterdir())
    assert left == ["name0-1.json", "name3-1.json", "name4-1.json"] and not (cache / KEPT_FOLDER).exists()
    (cache / KEPT_FOLDER).mkdir()
    files = [cache / KEPT_FOLDER / f"{number}.json" for number in range(KEPT + 1)]
    for file in files:
        file.touch()
    table = on_disk(rows_of(as_bytes, tmp_path / "images", count=4), tmp_path / "saved")
    os.utime(table.cache_files[0]["filename"], (1, 1))
    fingerprint(table)
    fingerprint(on_disk(rows_of(as_bytes, tmp_path / "images", count=5), tmp_path / "other"))
    assert len([path for path in (cache / KEPT_FOLDER).iterdir() if path.is_dir()]) == 2
    assert all(file.exists() for file in files)  # only folders of indices count


def jpeg(path, value=9):
    Image.effect_noise((32, 32), value).convert("RGB").save(path)
    return path


def test_pictures_count_as_they_are_decoded_and_are_not_kept_decoded(tmp_path):
    def checksum(*pictures):
        return contents.checksum_of_values([[picture] for picture in pictures])

    one, other = Image.new("P", (16, 16)), Image.new("P", (16, 16))
    one.putpalette([0, 0, 0])
    other.putpalette([200, 0, 0])
    assert checksum(one) != checksum(other)
    upright, turned = picture(5), picture(5)
    upright.putpixel((0, 0), (1, 2, 3))
    turned.putpixel((0, 0), (1, 2, 3))
    turned.getexif()[ExifTags.Base.Orientation] = 6
    assert checksum(upright) != checksum(turned)
    for ending in ("jpg", "png", "webp"):
        opened = Image.open(jpeg(tmp_path / f"a.{ending}"))
        before = checksum(opened)
        assert opened.fp is not None  # which a decoded one has not
        opened.load()
        assert checksum(opened) == before
    damaged = (tmp_path / "a.jpg").read_bytes()[:-20]
    (tmp_path / "b.jpg").write_bytes(damaged)
    rows = rows_of(lambda image, path: image, tmp_path, count=6)
    start = fingerprint(rows)
    rows[3]["rejected"] = Image.open(tmp_path / "b.jpg")
    assert changed(start, fingerprint(rows)) == {"images"}
    assert fingerprint(rows) == fingerprint(rows)


def test_one_row_that_cannot_be_read_leaves_the_others_compared(tmp_path):
    class Own:
        """A data set of a user's class, of which a sample is read."""

        def __init__(self, rows, unreadable=()):
            self.rows, self.unreadable = rows, unreadable

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, number):
            if number in self.unreadable and number:
                raise OSError("gone")
            return self.rows[number]

    class Torch(Own, Dataset):
        pass

    rows = rows_of(as_file, tmp_path / "images", count=8)
    os.remove(rows[4]["chosen"])
    for make in (list, as_table):
        start = fingerprint(make(rows))
        assert None not in start.values()
        other = [*rows[:7], {**rows[7], "chosen": rows[0]["chosen"]}]
        assert changed(start, fingerprint(make(other))) == {"images"}
    indexed = prepare_dataset(data := Torch(rows), transform=PairTransform(16), verify_images="none")
    data.unreadable = (4,)  # since the index was built
    start = indexed.fingerprint(thorough=True)
    assert None not in start.values()
    picture(248).save(rows[7]["chosen"])
    assert changed(start, indexed.fingerprint(thorough=True)) == {"images"}


def test_urls_count_as_they_are_written(tmp_path):
    rows = rows_of(as_bytes, tmp_path / "images", count=4)
    rows[1]["chosen"] = {"bytes": None, "path": "zip://a.png::/data/images.zip"}
    start = fingerprint(as_table(rows))
    rows[1]["chosen"] = {"bytes": None, "path": "zip://b.png::/data/images.zip"}
    assert changed(start, fingerprint(as_table(rows))) == {"images"}


def test_a_file_that_may_be_read_again_is_not_kept_as_missing(tmp_path, monkeypatch):
    """Its size and time stay as they are when its permissions change."""
    file, other = tmp_path / "a.bmp", tmp_path / "none.bmp"
    picture(1).save(file)
    read = file_contents.checksum_of_files
    good = read([str(file)])
    shutil.rmtree(tmp_path / "datasets")
    with monkeypatch.context() as locked:
        refused = PermissionError(errno.EACCES, "Permission denied")
        locked.setattr(hashlib, "file_digest", lambda *_: (_ for _ in ()).throw(refused))
        assert read([str(file)]) == read([str(other)]) != good
    assert read([str(file)]) == good

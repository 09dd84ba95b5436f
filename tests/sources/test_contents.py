"""Checksums of all images and prompts: one that changes anywhere is noticed, and where data lie does not matter."""

import os
import shutil

import datasets
import pytest
from PIL import Image
from torch.utils.data import Dataset

from trl_diffusion_sdpo.data.pairs import PairMixture, prepare_dataset
from trl_diffusion_sdpo.data.transforms import PairTransform
from trl_diffusion_sdpo.sources import contents
from trl_diffusion_sdpo.sources.tables import THOROUGHLY

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
    for name in ("_digest_of_file", "_hash_block"):
        counted = getattr(contents, name)
        monkeypatch.setattr(contents, name, lambda *args, as_before=counted: read.append(1) or as_before(*args))
    saved = on_disk(rows_of(as_bytes, tmp_path / "images"), tmp_path / "saved")
    start = fingerprint(saved)
    assert read and not read.clear() and fingerprint(saved) == start and not read
    files = rows_of(as_file, tmp_path / "images")
    start = fingerprint(files)
    assert len(read) == 2 * COUNT and not read.clear() and fingerprint(files) == start and not read
    os.utime(files[5]["chosen"], ns=(1, 1))
    assert fingerprint(files) == start and len(read) == 2 * COUNT
    picture(249).save(files[6]["chosen"])
    assert fingerprint(files) != start


def test_a_file_that_cannot_be_read_now_is_no_other_file(tmp_path, monkeypatch):
    files, digest_of = rows_of(as_file, tmp_path / "images", count=4), contents.hashlib.file_digest
    right = fingerprint(files)
    shutil.rmtree(tmp_path / "datasets")

    def failing(file, kind):
        if file.name == files[2]["chosen"]:
            raise OSError(5, "Input/output error")
        return digest_of(file, kind)

    with monkeypatch.context() as patch:
        patch.setattr(contents.hashlib, "file_digest", failing)
        with pytest.raises(OSError, match="Input/output error"):
            fingerprint(files)
    assert fingerprint(files) == right


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

"""A fingerprint changes with the data, but not with the machine or how they are stored."""

import os
import shutil

import datasets
import pytest
from PIL import Image
from tiny_pairs import prepare

from trl_diffusion_sdpo.data import AspectRatioBuckets, PairOptions, PairTransform, prepare_dataset

BUCKETS = AspectRatioBuckets((16, 16), step=4)  # 12 x 20, 16 x 16, 20 x 12


def fingerprint(data, **settings) -> dict:
    return prepare_dataset(data, PairOptions(PairTransform(16), **settings)).fingerprint()


def changed(first, second) -> set[str]:
    return {name for name in first if first[name] != second[name]}


@pytest.fixture
def labelled(make_pairs):
    """Rows as Pick-a-Pic has them, with a label that says which image is preferred."""
    pairs = make_pairs(20)
    label = [float(row % 3 > 0) for row in range(20)]
    named = pairs.rename_columns({"chosen": "jpg_0", "rejected": "jpg_1", "prompt": "caption"})
    return named.remove_columns(["chosen_score", "rejected_score"]).add_column("label_0", label)


def test_the_fingerprint_does_not_depend_on_how_the_data_are_stored(make_pairs, tmp_path):
    pairs = make_pairs()
    pairs.save_to_disk(str(tmp_path / "saved"))
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    again = datasets.load_from_disk(str(tmp_path / "moved"))
    assert fingerprint(again) == fingerprint(pairs)
    assert fingerprint(pairs, seed=7, verify_images="none") == fingerprint(pairs)


def test_size_order_labels_scores_and_prompts_change_the_fingerprint(labelled, make_pairs):
    start = fingerprint(labelled)
    assert "pairs" in changed(start, fingerprint(labelled.select(range(19))))
    assert "prompts" in changed(start, fingerprint(labelled.select(range(19, -1, -1))))
    one_label = labelled["label_0"][:]
    one_label[11] = 1.0 - one_label[11]
    flipped = labelled.remove_columns("label_0").add_column("label_0", one_label)
    assert changed(start, fingerprint(flipped)) == {"index"}
    scored = make_pairs()
    other = scored.map(lambda row, number: {"chosen_score": row["chosen_score"] + (number == 5)}, with_indices=True)
    assert changed(fingerprint(scored), fingerprint(other)) == {"index"}


def picture(value):
    return Image.new("RGB", (16, 16), (value, value, value))


def test_a_cache_is_found_again_by_a_new_start_and_not_after_a_file_was_replaced(tmp_path):
    """Also by one of the same size and time: the change time of a file cannot be set back."""
    for level, name in enumerate(("w", "l")):
        picture(level).save(tmp_path / f"{name}.bmp")
    path = tmp_path / "w.bmp"
    row = {"prompt": "a", "chosen": str(path), "rejected": str(tmp_path / "l.bmp")}
    datasets.Dataset.from_list([row] * 3).save_to_disk(tmp_path / "set")

    def key():
        made = prepare_dataset(datasets.load_from_disk(tmp_path / "set"), PairOptions(PairTransform(16)))
        return made.fingerprint(thorough=True)

    before, times = key(), path.stat()
    assert key() == before
    picture(7).save(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert changed(before, key()) == {"images"}


def test_bytes_changed_in_place_in_a_saved_data_set_are_noticed(make_pairs, tmp_path):
    """The header of an Arrow file, which `datasets` knows it by, stays as it was."""
    make_pairs(6).save_to_disk(str(tmp_path / "set"))

    def key():
        made = prepare_dataset(datasets.load_from_disk(str(tmp_path / "set")), PairOptions(PairTransform(16)))
        return made.fingerprint(thorough=True), made.fingerprint()

    before = key()
    assert key() == before
    (file,) = (tmp_path / "set").glob("*.arrow")
    status, content = file.stat(), file.read_bytes()
    place = content.index(b"\x89PNG") + 60
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    for earlier, now in zip(before, key(), strict=True):
        assert changed(earlier, now) == {"images"}


def test_rows_that_each_run_maps_anew_find_their_cache_again(make_pairs, tmp_path):
    make_pairs(4).save_to_disk(str(tmp_path / "set"))

    def key():
        rows = datasets.load_from_disk(str(tmp_path / "set")).map(_with_a_dot, load_from_cache_file=False)
        assert rows.cache_files
        return prepare_dataset(rows, PairOptions(PairTransform(16))).fingerprint(thorough=True)

    assert key() == key()


def _with_a_dot(row):
    return {"prompt": row["prompt"] + "."}


def test_sizes_are_read_again_after_bytes_of_a_saved_data_set_have_changed(make_pairs, tmp_path):
    """Images of 16 x 24 and of 24 x 16 pixels; the second data set has the bytes of the first with sides exchanged."""
    sizes = []
    for number, size in enumerate(((16, 24), (24, 16))):
        make_pairs(2, size=size).save_to_disk(str(tmp_path / f"set {number}"))
    for number in (0, 1):
        arrow = next((tmp_path / f"set {number}").glob("*.arrow"))
        (tmp_path / "set 0" / arrow.name).write_bytes(arrow.read_bytes())
        rows = datasets.load_from_disk(str(tmp_path / "set 0"))
        made = prepare(rows, buckets=BUCKETS)
        sizes.append({made.target_size(pair) for pair in range(2)})
    assert sizes[0] and sizes[0] == {size[::-1] for size in sizes[1]}


def test_other_images_of_files_change_the_fingerprint_and_other_folders_do_not(tmp_path):
    facts = []
    for folder, level in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / folder).mkdir()
        for name, value in (("w", level), ("l", 9)):
            picture(value).save(tmp_path / folder / f"{name}.bmp")
        row = {"prompt": "a", "chosen": str(tmp_path / folder / "w.bmp"), "rejected": str(tmp_path / folder / "l.bmp")}
        facts.append(fingerprint(datasets.Dataset.from_list([row] * 3)))
    assert facts[0] == facts[1] and changed(facts[0], facts[2]) == {"images"}


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_a_stream_of_other_files_is_another_and_a_moved_file_is_not(kind, make_pairs, tmp_path):
    facts = []
    for folder, count in (("a", 4), ("b", 4), ("c", 5)):
        (tmp_path / folder).mkdir()
        texts = make_pairs(count)["prompt"]
        images = {"chosen": "w.png", "rejected": "l.png"}
        rows = datasets.Dataset.from_list([{"prompt": text, **images} for text in texts])
        name = str(tmp_path / folder / f"rows.{kind}")
        rows.to_parquet(name) if kind == "parquet" else rows.to_json(name)
        stream = datasets.load_dataset(kind, data_files=name, split="train", streaming=True)
        facts.append(fingerprint(stream.shuffle(seed=1, buffer_size=8)))
    assert facts[0] == facts[1] and changed(facts[0], facts[2]) == {"files"}


def test_the_commit_of_a_stream_is_told_from_its_files(make_pairs):
    """Another commit may be a new card of the data set, other files are other data."""
    rows = {"prompt": ["a"], "chosen": ["w"], "rejected": ["l"]}
    features = datasets.Features(dict.fromkeys(rows, datasets.Value("string")))
    facts = []
    for commit, name in (("a" * 40, "0"), ("b" * 40, "0"), ("b" * 40, "1")):
        names = [f"hf://datasets/owner/name@{commit}/data/{name}.parquet?X-Amz-Signature={commit}"]
        stream = datasets.IterableDataset.from_generator(lambda names: iter([rows]), features, {"names": names})
        facts.append(fingerprint(stream))
    assert changed(facts[0], facts[1]) == {"commits"} and changed(facts[1], facts[2]) == {"files"}


def test_a_stream_is_identified_by_its_metadata_without_reading_it(make_pairs):
    stream = make_pairs().to_iterable_dataset(num_shards=2)
    read = []
    watched = stream.map(lambda row: read.append(1) or row, features=stream.features)
    facts = fingerprint(watched.shuffle(seed=1, buffer_size=8))
    assert facts["shards"] == [2] and not read
    assert changed(facts, fingerprint(make_pairs().to_iterable_dataset(num_shards=3))) == {"shards"}

"""The fingerprint of a data set: it changes with the data, and not with the machine or the way they are stored."""

import os
import shutil

import datasets
import pytest
from PIL import Image

from trl_diffusion_sdpo.data import PairOptions, PairTransform, prepare_dataset


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


def test_a_stream_is_identified_by_its_metadata_without_reading_it(make_pairs):
    stream = make_pairs().to_iterable_dataset(num_shards=2)
    read = []
    watched = stream.map(lambda row: read.append(1) or row, features=stream.features)
    facts = fingerprint(watched.shuffle(seed=1, buffer_size=8))
    assert facts["shards"] == [2] and not read
    assert changed(facts, fingerprint(make_pairs().to_iterable_dataset(num_shards=3))) == {"shards"}

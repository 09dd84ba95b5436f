"""Folders of images without a data file: which images are pairs, what is left out, and how both are counted."""

import json
import os
from collections import Counter

import datasets
import numpy as np
import pytest
from PIL import Image

from trl_diffusion_sdpo import load_pairs
from trl_diffusion_sdpo.data import PairOptions, PairTransform, prepare_dataset


@pytest.fixture
def write(tmp_path):
    """`write("chosen/a.png", "chosen/a.txt: a cat", size=)`: images, which all differ, and texts in a folder."""
    generator = np.random.default_rng(0)

    def call(*files, folder="pairs", size=(16, 16)):
        (tmp_path / folder).mkdir(exist_ok=True)
        for entry in files:
            name, has_text, text = entry.partition(": ")
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if has_text:
                path.write_text(text, encoding="utf-8")
            elif path.suffix.lower() in (".png", ".jpg", ".webp"):
                Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
            else:
                path.write_bytes(b"\0")
        return tmp_path / folder

    return call


def both(*names, suffix="png"):
    return [f"{side}/{name}.{suffix}" for name in names for side in ("chosen", "rejected")]


def rows(loaded, folder):
    """With names relative to the folder."""
    return [
        {
            column: [os.path.relpath(name, folder) for name in value] if column == "image_path" else value
            if column in ("prompt", "rank") else os.path.relpath(value, folder)
            for column, value in row.items()
        }
        for row in loaded
    ]  # fmt: skip


# ---- chosen and rejected ---------------------------------------------------------------------------------------------


def test_equal_names_in_two_folders_are_pairs_with_the_caption_of_either_folder_or_of_both(write):
    folder = write(
        *both("b", "a", "deep/c", "d"),
        *("rejected/a.txt: a cat\n", "chosen/b.txt: a\n  dog ", "b.txt: a dog"),
        *("deep/c.txt: \ufeffa bird", "chosen/d.txt: ", "rejected/d.txt:  \n"),
    )
    assert rows(load_pairs(folder), folder) == [
        {"prompt": prompt, "chosen": f"chosen/{name}.png", "rejected": f"rejected/{name}.png"}
        for name, prompt in (("a", "a cat"), ("b", "a dog"), ("d", ""), ("deep/c", "a bird"))
    ]


def test_skipped_images_are_counted_by_their_reason(write, caplog):
    folder = write(
        *both("good", "uncaptioned", "differing", "twice"),
        *("chosen/twice.jpg", "chosen/lonely.png", "preview.png", "chosen/notes.heic"),
        *("good.txt: g", "differing.txt: one", "chosen/differing.txt: other", "twice.txt: t", "lonely.txt: l"),
        *("chosen/.DS_Store", "rejected/Thumbs.db", ".cache/x.png"),
    )
    assert load_pairs(folder)["prompt"][:] == ["g"]
    lines = caplog.text.partition("skipped:\n")[2].splitlines()
    assert {(int(line.split()[0]), line.rpartition(": ")[2]) for line in lines if line.startswith("  ")} == {
        (1, "preview.png"),
        (1, "chosen/notes.heic"),
        (1, "chosen/lonely.png"),
        (2, "chosen/differing.png, rejected/differing.png"),
        (3, "chosen/twice.jpg, chosen/twice.png, rejected/twice.png"),
        (2, "chosen/uncaptioned.png, rejected/uncaptioned.png"),
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["chosen/a.png", "chosen/a.txt: x"], "only chosen"),
        (["chosen/a.png", "rejected/b.png"], "2 without a second image"),
        (both("a"), "2 without a caption"),
        (["a.png", "b.png"], "folders chosen and rejected"),
        (["IMG_1.png", "IMG_2.png", "IMG_1.txt: one", "IMG_2.txt: two"], "2 with captions that differ"),
    ],
)
def test_a_folder_without_pairs_is_an_error_that_says_what_is_missing(write, files, message):
    with pytest.raises(ValueError, match=message):
        load_pairs(write(*files))


def test_splits_are_folders_and_streams_are_read(write):
    folder = write(
        *(f"{split}/{name}" for split in ("train", "test") for name in [*both("a", "b"), "a.txt: a", "b.txt: b"])
    )
    write("test/chosen/c.png", "test/rejected/c.png", "test/c.txt: c")
    assert load_pairs(folder)["prompt"][:] == ["a", "b"] and load_pairs(folder, "test")["prompt"][:] == ["a", "b", "c"]
    assert [row["prompt"] for row in load_pairs(folder, "test", streaming=True)] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="must have the split 'validation'; it has test, train"):
        load_pairs(folder, "validation")


# ---- Ranks at the end of names ---------------------------------------------------------------------------------------


def test_images_of_one_name_are_ranked_by_their_numbers(write):
    folder = write(
        "cat_2.png", "cat_10.png", "cat_0.jpg", "cat.txt: a cat", "sub/dog_1.png", "sub/dog_01.jpg", "sub/dog_2.png"
    )
    write("sub/dog_1.txt: a dog", "sub/dog_2.txt: a dog", "a_1_0.png", "a_1_1.png", "a_1.txt: of a_1")
    assert rows(load_pairs(folder), folder) == [
        {"prompt": "of a_1", "image_path": ["a_1_0.png", "a_1_1.png"], "rank": [0, 1]},
        {"prompt": "a cat", "image_path": ["cat_0.jpg", "cat_2.png", "cat_10.png"], "rank": [0, 2, 10]},
        {"prompt": "a dog", "image_path": ["sub/dog_01.jpg", "sub/dog_1.png", "sub/dog_2.png"], "rank": [1, 1, 2]},
    ]  # fmt: skip
    pairs = prepare_dataset(load_pairs(folder), PairOptions(PairTransform(16)))
    assert Counter(pairs[row]["prompt"] for row in range(len(pairs))) == {"of a_1": 1, "a cat": 3, "a dog": 2}
    assert pairs.report.ties == 1, "the two images of rank 1"


def test_more_than_eight_numbered_images_of_one_name_are_no_ranking(write, caplog):
    photos = [f"trip_{number:02}.jpg" for number in range(1, 21)]
    with pytest.raises(ValueError, match="20 .*trip_01.jpg"):
        load_pairs(write(*photos, "trip.txt: my trip", folder="photos"))
    folder = write(*photos, "trip.txt: my trip", *(f"a_{rank}.png" for rank in range(8)), "a.txt: a")
    assert load_pairs(folder)["prompt"][:] == ["a"] and "20 " in caplog.text


CAMERA = [f"IMG_{number}.jpg" for number in range(4010, 4016)]


def test_numbers_that_count_photos_are_not_read_as_ranks(write, caplog):
    names, stem = CAMERA, "IMG"
    with pytest.raises(ValueError, match="images but no pairs"):
        load_pairs(write(*names, f"{stem}.txt: my dog", folder="alone"))
    folder = write(*names, f"{stem}.txt: my dog", "a_0.png", "a_1.png", "a.txt: a")
    assert load_pairs(folder)["prompt"][:] == ["a"]
    assert f"{len(names)} " in caplog.text and names[0] in caplog.text


# ---- Files that are no images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [both("a"), ["a_0.png", "a_1.png"]])
def test_a_stray_file_does_not_hide_the_pairs_and_is_named(write, files, caplog):
    strays = ["workflow.json: {}", "all.zip", "a_0.json: {}", "a.caption: x", "a.png.txt: x", "b.heic"]
    folder = write(*files, "a.txt: a fox", *strays)
    assert load_pairs(folder)["prompt"][:] == ["a fox"]
    assert all(entry.partition(":")[0] in caplog.text for entry in strays)


def test_a_table_beside_the_two_folders_is_named_and_beside_ranked_images_an_error(write, caplog):
    folder = write(*both("a"), "a.txt: a fox", "notes.csv: a,b")
    assert load_pairs(folder)["prompt"][:] == ["a fox"] and "notes.csv" in caplog.text
    with pytest.raises(ValueError, match="own.csv"):
        load_pairs(write("a_0.png", "a_1.png", "a.txt: a fox", "own.csv: a,b", folder="ranked"))


def test_names_are_equal_in_either_unicode_form(write):
    folder = write("chosen/caf\u00e9.png", f"rejected/cafe{chr(0x301)}.png", f"cafe{chr(0x301)}.txt: coffee")
    assert load_pairs(folder)["prompt"][:] == ["coffee"]


@pytest.mark.parametrize("text", ["x" * 100_000, "\udcff"])
def test_a_caption_that_is_too_large_or_no_text_is_an_error_that_names_it(write, text):
    folder = write(*both("a"))
    (folder / "a.txt").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match="a.txt"):
        load_pairs(folder)


# ---- Data files, which other images belong to ------------------------------------------------------------------------


@pytest.mark.parametrize(("column", "kind"), [("prompt", "jsonl"), ("text", "csv")])
def test_metadata_files_take_precedence_and_may_call_the_prompt_text(write, column, kind):
    folder = write(*both("a_0", "a_1"), "a.txt: not this")
    named = [
        {column: f"p {n}", **{f"{side}_file_name": f"{side}/a_{n}.png" for side in ("chosen", "rejected")}}
        for n in (0, 1)
    ]
    path = folder / f"metadata.{kind}"
    if kind == "csv":
        datasets.Dataset.from_list(named).to_csv(path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in named))
    for streaming in (False, True):
        loaded = load_pairs(folder, streaming=streaming)
        prepared = prepare_dataset(loaded, PairOptions(PairTransform(16)))
        assert [item["prompt"] for item in prepared] == ["p 0", "p 1"]

"""Image names in data files: relative to the file, otherwise to the working directory."""

import json
import os
import re

import datasets
import pytest
from PIL import Image

from trl_diffusion_sdpo import load_pairs
from trl_diffusion_sdpo.data import PairOptions, PairTransform, prepare_dataset

ROW = {"prompt": "x", "chosen": "images/w.png", "rejected": "images/l.png"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of a data set, beside the working directory; images say by their grey level where they are."""
    for level, name in enumerate(("set/images/w.png", "set/images/l.png", "cwd/images/w.png", "cwd/only_here.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (level, level, level)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "set"


def levels(loaded) -> list[tuple[int, int]]:
    pairs = prepare_dataset(loaded, PairOptions(PairTransform(16, random_flip=False)))
    return [tuple(item["pixel_values"][:, 0, 0, 0].tolist()) for item in pairs]


def write(folder, kind, *rows):
    path = folder / f"own.{kind}"
    table = datasets.Dataset.from_list(list(rows))
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(list(rows)))
    elif kind in ("csv", "tsv"):
        table.to_csv(path, sep="," if kind == "csv" else "\t")
    else:
        table.to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("kind", "streaming"), [("jsonl", False), ("json", True), ("csv", True), ("tsv", False), ("parquet", True)]
)
def test_relative_names_are_found_in_the_folder_of_the_file_and_then_in_the_working_directory(place, kind, streaming):
    """The first image is in both folders."""
    path = write(place, kind, ROW, {**ROW, "chosen": "only_here.png"}, {**ROW, "chosen": str(place / "images/l.png")})
    assert levels(load_pairs(path, streaming=streaming))[:2] == [(0, 1), (3, 1)]
    if not streaming:
        assert load_pairs(os.path.relpath(path))["chosen"][:] == [
            str(place / "images/w.png"),
            str(place.parent / "cwd/only_here.png"),
            str(place / "images/l.png"),
        ]


@pytest.mark.parametrize("streaming", [False, True])
def test_brackets_in_the_path_of_a_file_are_read_as_they_are(place, streaming):
    folder = place.rename(place.parent / "set [best] *")
    assert levels(load_pairs(write(folder, "jsonl", ROW), streaming=streaming)) == [(0, 1)]


@pytest.mark.parametrize("name", ["set [best]", "a::b", "$HOME"])
def test_a_path_that_the_library_reads_otherwise_is_an_error_that_names_it(place, name):
    folder = place.rename(place.parent / name)
    (folder / "metadata.jsonl").write_text(json.dumps({"prompt": "x", "file_name": "images/w.png"}))
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        load_pairs(folder)
    if "[" not in name:
        with pytest.raises(ValueError, match=re.escape(str(folder))):
            load_pairs(write(folder, "jsonl", ROW))


def test_names_of_images_are_found_in_either_unicode_form(place):
    (place / "images/w.png").rename(place / "images" / f"e{chr(0x301)}.png")
    assert levels(load_pairs(write(place, "jsonl", {**ROW, "chosen": "images/\u00e9.png"}))) == [(0, 1)]


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_file_is_an_error_that_names_it(place, content):
    (place / "pairs.jsonl").write_text(content)
    with pytest.raises(ValueError, match="pairs.jsonl"):
        load_pairs(place / "pairs.jsonl")


def test_a_table_with_semicolons_is_read(place):
    (place / "own.csv").write_text("\ufeffprompt;chosen;rejected\na, b;images/w.png;images/l.png\n")
    loaded = load_pairs(place / "own.csv")
    assert loaded["prompt"][:] == ["a, b"] and levels(loaded) == [(0, 1)]


def test_what_is_absolute_or_a_url_is_left_alone(place):
    addresses = ["hf://datasets/a/b/c.png", "/w.png"]
    path = write(place, "jsonl", *({"prompt": "x", "chosen": name, "rejected": name} for name in addresses))
    assert load_pairs(path)["chosen"][:] == addresses


@pytest.mark.parametrize("streaming", [False, True])
def test_an_image_that_is_nowhere_is_a_bad_row_that_names_its_file(place, caplog, streaming):
    path = write(place, "jsonl", {**ROW, "chosen": "images/lost.png"}, ROW)
    assert levels(load_pairs(path, streaming=streaming))[0] == (0, 1)
    if not streaming:
        assert "row 0: image 0 cannot be decoded (FileNotFoundError" in caplog.text
        assert str(place / "images" / "lost.png") in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_jsonl_of_flow_factory_is_read(place, streaming):
    def task(kind="preference", media=()):
        images = {side: {"media": [{"type": "image", "path": ROW[side]}]} for side in ("chosen", "rejected")}
        return {
            "schema_version": 2,
            "input": {"prompt": "a red bicycle", "media": list(media)},
            "supervision": {"type": kind, **images},
            "metadata": {"number": 1},
        }

    path = place / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, [task(), task("other")])))
    loaded = load_pairs(path, streaming=streaming)
    assert levels(loaded) == [(0, 1)]
    assert next(iter(loaded))["prompt"] == "a red bicycle"
    if not streaming:
        assert prepare_dataset(loaded, PairOptions(PairTransform(16))).report.bad_prompts == 1
        path.write_text(json.dumps(task(media=[{"type": "image", "path": "images/w.png"}])))
        loaded = load_pairs(path)
        assert loaded[0]["source_image"] == [str(place / "images" / "w.png")]
        assert prepare_dataset(loaded, PairOptions(PairTransform(16)))[0]["sources"][0].size == (16, 16)
        path.write_text(json.dumps(task(media=2 * [{"type": "image", "path": "images/w.png"}])))
        assert len(prepare_dataset(load_pairs(path), PairOptions(PairTransform(16)))[0]["sources"]) == 2


def test_a_saved_set_of_one_split_takes_no_slice(place):
    datasets.Dataset.from_list([ROW] * 4).save_to_disk(place / "saved")
    with pytest.raises(ValueError, match="split"):
        load_pairs(place / "saved", "train[:2]")


def test_prompts_of_several_types_are_refused(place):
    rows = [{**ROW, "prompt": prompt} for prompt in ("a cat", 5)]
    (place / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="prompt"):
        load_pairs(place / "mixed.jsonl")


@pytest.mark.parametrize("mode", ["turned", "CMYK"])
def test_images_in_memory_are_read_as_image_files_are(mode):
    image = Image.new("CMYK" if mode == "CMYK" else "RGB", (64, 32))
    if mode == "turned":
        image.getexif()[274] = 6
    rows = [{"prompt": "x", "chosen": image, "rejected": Image.new("RGB", (32, 64), "red")}]
    (item,) = prepare_dataset(rows, PairOptions(PairTransform(16), verify_images="none"))
    assert item["pixel_values"].shape[-2:] == (16, 16)
    assert tuple(item["original_sizes"][0]) == ((64, 32) if mode == "turned" else (32, 64))


CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.parquet\n---\n"


def test_a_folder_with_a_card_is_read_as_it_is_now(tmp_path):
    """`datasets` would return the rows of the first folder of this name."""

    def saved(folder, prompt):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(CARD)
        datasets.Dataset.from_list([{**ROW, "prompt": prompt}]).to_parquet(folder / "train.parquet")
        return load_pairs(folder)["prompt"][0]

    for folder in ("one", "other"):
        assert saved(tmp_path / folder / "preferences", f"of {folder}") == f"of {folder}"
    assert saved(tmp_path / "one" / "preferences", "replaced") == "replaced"

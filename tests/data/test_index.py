"""The index of a table equals the one that is read row by row, is kept on disk, and is found again."""

import gc
import multiprocessing
import os
import random
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from trl_diffusion_sdpo.data import index, kept_index, tables
from trl_diffusion_sdpo.data.checking import DataReport, reject
from trl_diffusion_sdpo.data.columns import NotVectorizedError
from trl_diffusion_sdpo.data.formats import FORMATS
from trl_diffusion_sdpo.data.holdout import hold_out
from trl_diffusion_sdpo.data.kept_index import KEPT_FOLDER
from trl_diffusion_sdpo.data.tables import ArrowSource, RowSource, build_index

NUMBERS = [0.0, 1.0, 0.5, 0.5, -2.0, float("nan"), float("inf"), None, 2.0**60 + 1]
TEXTS = ["0", "1", " 0.5\n", "1_0", "word", "", "nan", "-inf", None, "1e-3"]
WORDS = ["true", "False", " yes\n", "0", "1.0", "maybe", "", None, "no"]
# A column's values and its type; every kind of good and bad value that the type can hold.
LABELS = {
    "float": (NUMBERS, pa.float64()),
    "half": ([0.5, 1.0, None, float("nan")], pa.float16()),
    "int": ([0, 1, 2, -3, None, 2**60, 2**60 + 1], pa.int64()),
    "bool": ([True, False, None], pa.bool_()),
    "text": (TEXTS, pa.string()),
    "bytes": ([None if text is None else text.encode() for text in TEXTS], pa.binary()),
    "empty": ([None], pa.null()),
    "view": (TEXTS, pa.string_view()),
    "decimal": ([None, 1, 2, 3], pa.decimal128(5, 2)),
    "date": ([None, 1, 2], pa.date32()),  # read row by row
}
PROMPTS = {
    "text": (["a", "b", "", None], pa.string()),
    "large": (["a", None], pa.large_string()),
    "view": (["a", None, ""], pa.string_view()),
    "view of bytes": ([b"a\n", None], pa.binary_view()),
    "bytes": ([b"a\n", b"\xff", None], pa.binary()),
    "int": ([1, None], pa.int32()),
}
VALID = {
    "bool": ([True, False, None], pa.bool_()),
    "text": (WORDS, pa.string()),
    "float": ([0.0, 1.0, 2.0, None, float("nan")], pa.float32()),
    "int": ([0, 1, 7], pa.int8()),
}
LISTS = {
    "numbers": ([None, [], [1.0], [0.0, 1.0], [1, 1], [0, 0, 1, 0], [2, 1, 2, 3], [None, 1], [float("nan")]], None),
    "text": ([["1", "2"], ["x", "1"], None, [None], ["3", "3"]], pa.list_(pa.string())),
    "large": ([[1, 2], None, [], [3, 3, 1]], pa.large_list(pa.int32())),
    "single": ([1.0, None], pa.float64()),  # no list: read row by row
}
GROUPS = {
    "text": (["x", "y", "z", None, "w"], pa.string()),
    "int": ([4, 2, 9, None], pa.int64()),
    "float": ([1.0, 2.0, float("nan"), None], pa.float64()),  # read row by row
    "unique": (None, pa.string()),
}
WEIGHTED = ("weighted_results_image1_preference", "weighted_results_image2_preference")
COLUMNS = {
    "canonical": {"chosen_score": LABELS, "rejected_score": LABELS},
    "pickapic": {"label_0": LABELS, "label_1": LABELS, "has_label": VALID},
    "pickapic_webdataset": {"label_0.txt": LABELS, "label_1.txt": LABELS},
    "hpdv2": {"human_preference": LISTS, "rank": LISTS},
    "hpdv3": {},
    "imagerewarddb": {"rank": LABELS, "prompt_id": GROUPS},
    "rapidata": dict.fromkeys((*WEIGHTED, "votes_image1", "votes_image2"), LABELS),
    "branch_prompts": {"rejected_prompt": PROMPTS, "chosen_score": LABELS, "rejected_score": LABELS},
    "captioned": {},
}
OPTIONAL = {"chosen_score", "has_label", "label_1", "label_1.txt", "human_preference", WEIGHTED[0]}


def random_table(name: str, rows: int, draw: random.Random) -> datasets.Dataset:
    known = FORMATS[name]
    columns = {known.prompt_columns[0]: PROMPTS, **COLUMNS[name]}
    for column in [name for name in columns if name in OPTIONAL and draw.random() < 0.25]:
        del columns[column]
        if column == "chosen_score":
            del columns["rejected_score"]
    arrays = {}
    for column, kinds in columns.items():
        usual = draw.random() < 0.6  # the first kind, so that not every table has a column of no use
        values, kind = next(iter(kinds.values())) if usual else draw.choice(list(kinds.values()))
        values = [str(row) for row in range(rows)] if values is None else values
        good = [value for value in values if value is not None and value == value] or values
        drawn = [draw.choice(values if draw.random() < 0.3 else good) for _ in range(rows)]
        arrays[column] = pa.array(drawn, type=kind)
    for column in known.image_columns:
        arrays[column] = pa.nulls(rows, pa.list_(pa.string()) if known.images_in_list else pa.string())
    return datasets.Dataset(pa.table(arrays))


def outcome(source, strict: bool = False):
    report = DataReport("train", source.format.name)
    try:
        found = build_index(source, lambda *drop: reject(report, strict, *drop))
    except ValueError as error:
        return str(error)
    scores = None if found.scores is None else found.scores.tolist()
    return found.pairs.tolist(), scores, str(report), report.examples, found.pairs.dtype


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_the_index_of_a_table_is_that_of_its_rows(name, monkeypatch):
    monkeypatch.setattr(index, "ROUND_ROWS", 7)
    draw, vectorized = random.Random(name), 0
    for trial in range(40):
        table = random_table(name, draw.choice([1, 2, 30]), draw)
        if trial % 3 == 0:
            table = table.select([draw.randrange(len(table)) for _ in range(len(table))])
        of_rows = RowSource(table.to_list(), name, True)
        of_table = ArrowSource(table, name, True)
        assert outcome(of_table) == outcome(of_rows)
        assert outcome(of_table, strict=True) == outcome(of_rows, strict=True)
        try:
            index.find_pairs(of_table.labels, of_table.format)
            vectorized += 1
        except NotVectorizedError:
            pass
    assert vectorized > 10


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """Makes a data set on disk; the index is kept under `tmp_path / "cache"`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(table: datasets.Dataset, name: str = "saved") -> datasets.Dataset:
        table.save_to_disk(str(tmp_path / name))
        return datasets.load_from_disk(str(tmp_path / name))

    return make


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_prompts_of_every_type_of_text_are_found_and_held_out(kind):
    prompts = pa.array(["a", "b" * 20, "a", None], kind)
    table = datasets.Dataset(pa.table({"prompt": prompts, "chosen": ["x"] * 4, "rejected": ["y"] * 4}))
    assert ArrowSource(table, None, True).prompts(np.arange(3)) == {"a", "b" * 20}
    _, held = hold_out(table, 2, seed=0)
    assert set(held["prompt"]) <= {"b" * 20, None} or held["prompt"][:] == ["a", "a"]


def picks(labels=(1.0, 0.0, 0.5, None, 1.0)) -> datasets.Dataset:
    columns = {"caption": ["a"] * len(labels), "jpg_0": ["x"] * len(labels), "jpg_1": ["y"] * len(labels)}
    return datasets.Dataset.from_dict({**columns, "label_0": list(labels)})


def kept(tmp_path) -> list:
    return sorted((tmp_path / "cache" / KEPT_FOLDER).glob("*"))


def test_the_index_is_built_once_and_read_by_memory_map(on_disk, tmp_path, monkeypatch):
    table = on_disk(picks())
    built = outcome(ArrowSource(table, None, True))
    (folder,) = kept(tmp_path)
    monkeypatch.setattr("trl_diffusion_sdpo.data.tables.find_pairs", None)  # would fail
    loaded = ArrowSource(datasets.load_from_disk(str(tmp_path / "saved")), None, True)
    assert outcome(loaded) == built
    assert outcome(loaded, strict=True).startswith("train data, row 3: no label")
    pairs = build_index(loaded, lambda *_: None).pairs
    assert isinstance(pairs.base, np.memmap) and not pairs.flags.writeable
    assert kept(tmp_path) == [folder]


def test_other_data_and_other_settings_have_an_index_of_their_own(on_disk, tmp_path):
    table = on_disk(picks())
    outcome(ArrowSource(table, None, True))
    outcome(ArrowSource(table.select([0, 1]), None, True))
    outcome(ArrowSource(on_disk(picks((0.0, 1.0, 0.5, None, 1.0)), "other"), None, True))
    assert len(kept(tmp_path)) == 3
    scored = datasets.Dataset.from_dict(
        {"prompt": ["a"], "chosen": ["x"], "rejected": ["y"], "chosen_score": [None], "rejected_score": [1.0]}
    )
    scored = on_disk(scored.cast_column("chosen_score", datasets.Value("float32")), "scored")
    counts = [len(build_index(ArrowSource(scored, None, used), lambda *_: None).pairs) for used in (True, False, True)]
    assert counts == [0, 1, 0]


@pytest.mark.parametrize("file", ["pairs.bin", "facts.json"])
@pytest.mark.parametrize("damage", ["flip", "edit", "cut", "empty", "delete"])
def test_a_damaged_index_is_named_and_built_again(on_disk, tmp_path, caplog, file, damage):
    table = on_disk(picks())
    built = outcome(ArrowSource(table, None, True))
    (folder,) = kept(tmp_path)
    content = (folder / file).read_bytes()
    flipped = bytes([content[0] ^ 1]) + content[1:]
    edited = content[:-1] + b"\x01" if file == "pairs.bin" else content.replace(b'["ties", 2', b'["ties", 1')
    assert edited != content
    damages = {"flip": flipped, "edit": edited, "cut": content[:-9], "empty": b"", "delete": b""}
    (folder / file).write_bytes(damages[damage])
    if damage == "delete":
        (folder / file).unlink()
    assert outcome(ArrowSource(table, None, True)) == built
    assert f"The index of the pairs in {folder} is damaged" in caplog.text
    assert (folder / file).read_bytes() == content
    assert kept(tmp_path) == [folder]


def test_indices_that_were_not_used_for_long_are_removed(on_disk, tmp_path, monkeypatch):
    """Of six data sets, the index of the first one is read again before the last is kept."""
    monkeypatch.setattr(kept_index, "KEPT", 3)
    tables = [on_disk(picks([float(i)] * 2), f"saved {i}") for i in range(6)]
    folders = [kept_index.kept_folder(ArrowSource(table, None, True).labels, FORMATS["pickapic"]) for table in tables]
    (tmp_path / "cache" / KEPT_FOLDER).mkdir(parents=True)
    (tmp_path / "cache" / KEPT_FOLDER / "tmp-of-a-killed-process").mkdir()
    for second, number in enumerate((0, 1, 2, 3, 0, 4, 5)):
        monkeypatch.setattr("os.utime", lambda folder, now=second, set_time=os.utime: set_time(folder, (now, now)))
        outcome(ArrowSource(tables[number], None, True))
    assert kept(tmp_path) == sorted(folders[number] for number in (0, 4, 5))


def in_another_process(function, *, user: int | None = None) -> multiprocessing.Process:
    """A forked process, started; of another user where this one is the superuser."""

    def run():
        if user is not None and os.geteuid() == 0:
            os.seteuid(user)
        function()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of memory maps")
def test_processes_that_build_one_index_at_the_same_time_keep_one(on_disk, tmp_path, caplog):
    """Three find none and build it; all read the one that stays."""
    table, context = on_disk(picks([1.0, 0.0, 0.5] * 2000)), multiprocessing.get_context("fork")
    expected = build_index(ArrowSource(picks([1.0, 0.0, 0.5] * 2000), None, True), lambda *_: None).pairs
    built, kept_all, find = context.Barrier(3, timeout=60), context.Barrier(3, timeout=60), tables.find_pairs

    def build():
        tables.find_pairs = lambda *given: (find(*given), built.wait())[0]  # all begin to write together
        found = build_index(ArrowSource(table, None, True), lambda *_: None).pairs
        kept_all.wait()
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if KEPT_FOLDER in line]
        assert len(maps) == 1 and "(deleted)" not in maps[0] and not caplog.records
        assert np.array_equal(found, expected)

    for process in [in_another_process(build) for _ in range(3)]:
        process.join(60)
        assert process.exitcode == 0
    (folder,) = kept(tmp_path)
    assert sorted(file.name for file in folder.iterdir()) == ["facts.json", "pairs.bin"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("is_there", [True, False])
def test_a_user_who_may_not_write_reads_the_index_of_another_or_builds_it(is_there, monkeypatch, caplog):
    nobody = 65534
    with tempfile.TemporaryDirectory() as name:  # which other users may enter, unlike `tmp_path`
        folder = Path(name)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        picks().save_to_disk(str(folder / "saved"))
        expected = outcome(ArrowSource(picks(), None, True))
        if is_there:
            outcome(ArrowSource(datasets.load_from_disk(str(folder / "saved")), None, True))
        (folder / "cache" / KEPT_FOLDER).mkdir(parents=True, exist_ok=True)
        # The index itself has the permissions that it was written with.
        places = [folder, *(folder / name for name in ("saved", "cache", f"cache/{KEPT_FOLDER}"))]
        for place in places:
            place.chmod(0o555)

        def read():
            if is_there:
                tables.find_pairs = None  # would fail
            caplog.clear()
            assert outcome(ArrowSource(datasets.load_from_disk(str(folder / "saved")), None, True)) == expected
            assert ("was not kept in" in caplog.text) != is_there

        process = in_another_process(read, user=nobody)
        process.join(60)
        for place in places:
            place.chmod(0o755)
        assert process.exitcode == 0
        assert len(list((folder / "cache" / KEPT_FOLDER).iterdir())) == is_there


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of memory maps")
def test_labels_are_read_through_a_map_that_does_not_stay(on_disk, tmp_path, monkeypatch):
    """Of all of a table and of a selection; a file that was deleted is read through the map that is there."""
    table, rows_of, during = on_disk(picks()), index._rows, []

    def maps():
        gc.collect()
        return Path("/proc/self/maps").read_text().count(str(tmp_path / "saved"))

    monkeypatch.setattr(index, "_rows", lambda *given: during.append(maps()) or rows_of(*given))
    before = maps()
    for data in (table, table.select([4, 0, 2])):
        index.find_pairs(ArrowSource(data, None, True).labels, FORMATS["pickapic"])
    assert during == [2 * before] * 2 and maps() == before > 0
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.unlink()
    assert outcome(ArrowSource(table, None, True)) == outcome(ArrowSource(picks(), None, True))


def test_data_in_memory_keep_no_index(on_disk, tmp_path):
    outcome(ArrowSource(picks(), None, True))
    assert not kept(tmp_path)


def test_without_a_folder_to_write_the_index_is_built_at_every_start(on_disk, tmp_path, caplog):
    table = on_disk(picks())
    (tmp_path / "cache").write_text("a file where the folder would be")
    expected = outcome(ArrowSource(picks(), None, True))
    assert outcome(ArrowSource(table, None, True)) == expected
    assert "was not kept in" in caplog.text

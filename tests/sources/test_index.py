"""The index of a table equals the one that is read row by row, is kept on disk, and is found again."""

import random

import datasets
import numpy as np
import pyarrow as pa
import pytest

from trl_diffusion_sdpo.sources import index
from trl_diffusion_sdpo.sources.checking import DataReport, reject
from trl_diffusion_sdpo.sources.formats import FORMATS
from trl_diffusion_sdpo.sources.kept_index import KEPT_FOLDER
from trl_diffusion_sdpo.sources.tables import ArrowSource, RowSource, build_index

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
    "decimal": ([None, 1, 2, 3], pa.decimal128(5, 2)),
    "date": ([None, 1, 2], pa.date32()),  # read row by row
}
PROMPTS = {
    "text": (["a", "b", "", None], pa.string()),
    "large": (["a", None], pa.large_string()),
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
        except index.NotVectorizedError:
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


def picks(labels=(1.0, 0.0, 0.5, None, 1.0)) -> datasets.Dataset:
    columns = {"caption": ["a"] * len(labels), "jpg_0": ["x"] * len(labels), "jpg_1": ["y"] * len(labels)}
    return datasets.Dataset.from_dict({**columns, "label_0": list(labels)})


def kept(tmp_path) -> list:
    return sorted((tmp_path / "cache" / KEPT_FOLDER).glob("*"))


def test_the_index_is_built_once_and_read_by_memory_map(on_disk, tmp_path, monkeypatch):
    table = on_disk(picks())
    built = outcome(ArrowSource(table, None, True))
    (folder,) = kept(tmp_path)
    monkeypatch.setattr("trl_diffusion_sdpo.sources.tables.find_pairs", None)  # would fail
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
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "delete"])
def test_a_damaged_index_is_named_and_built_again(on_disk, tmp_path, caplog, file, damage):
    table = on_disk(picks())
    built = outcome(ArrowSource(table, None, True))
    (folder,) = kept(tmp_path)
    content = (folder / file).read_bytes()
    flipped = bytes([content[0] ^ 1]) + content[1:]
    (folder / file).write_bytes({"flip": flipped, "cut": content[:-9], "empty": b"", "delete": b""}[damage])
    if damage == "delete":
        (folder / file).unlink()
    assert outcome(ArrowSource(table, None, True)) == built
    assert f"The index of the pairs in {folder} is damaged" in caplog.text
    assert (folder / file).read_bytes() == content
    assert kept(tmp_path) == [folder]


def test_data_in_memory_keep_no_index(on_disk, tmp_path):
    outcome(ArrowSource(picks(), None, True))
    assert not kept(tmp_path)


def test_without_a_folder_to_write_the_index_is_built_at_every_start(on_disk, tmp_path, caplog):
    table = on_disk(picks())
    (tmp_path / "cache").write_text("a file where the folder would be")
    expected = outcome(ArrowSource(picks(), None, True))
    assert outcome(ArrowSource(table, None, True)) == expected
    assert "was not kept in" in caplog.text

"""The index of pairs: rows and groups of any order, kept by `datasets` and found again."""

import datasets
import pytest

from trl_diffusion_sdpo.data import sources
from trl_diffusion_sdpo.data.formats import FORMATS

ROWS = [
    {"caption": "a", "label_0": 1.0, "label_1": 0.0},
    {"caption": "b", "label_0": 0.5, "label_1": 0.5},
    {"caption": None, "label_0": 1.0, "label_1": 0.0},
    {"caption": "c", "label_0": 0.0, "label_1": 1.0},
    {"caption": "d", "label_0": None, "label_1": None},
]
PLACES = [[0, 0, 0, 1], [3, 1, 3, 0]]


@pytest.fixture
def indexed(monkeypatch):
    """Numbers of rows that were read, a list for each batch."""
    batches, read = [], sources.index_pairs

    def spy(rows, known):
        batches.append([number for number, _ in rows])
        return read(rows, known)

    monkeypatch.setattr(sources, "index_pairs", spy)
    return batches


def test_pairs_and_drops_are_found_in_the_labels():
    pairs, drops = sources.find_pairs(datasets.Dataset.from_list(ROWS), FORMATS["pickapic"])
    assert pairs.places.tolist() == PLACES and not pairs.columns
    assert [(kind, row, amount) for kind, row, _, amount in drops] == [
        ("ties", 1, 1),
        ("bad_prompts", 2, 1),
        ("bad_labels", 4, 1),
    ]


def test_rows_of_a_group_are_compared_wherever_they_are(monkeypatch):
    monkeypatch.setattr(sources, "ROWS_AT_ONCE", 2)
    rows = [
        {"prompt": "p", "prompt_id": name, "rank": rank} for name, rank in zip("xyxyx", (2, 1, 1, 2, 3), strict=True)
    ]
    pairs, drops = sources.find_pairs(datasets.Dataset.from_list(rows), FORMATS["imagerewarddb"])
    assert pairs.places[:, [0, 2]].tolist() == [[2, 0], [0, 4], [2, 4], [1, 3]] and not drops


def test_the_index_of_data_on_a_disk_is_found_again(tmp_path, indexed):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    for _ in range(2):
        pairs, drops = sources.find_pairs(datasets.load_from_disk(tmp_path), FORMATS["pickapic"])
        assert pairs.places.tolist() == PLACES and len(drops) == 3
    assert indexed == [[0, 1, 2, 3, 4]]
    swapped = datasets.load_from_disk(tmp_path).select([3, 0])
    assert sources.find_pairs(swapped, FORMATS["pickapic"])[0].places.tolist() == [[0, 1, 0, 0], [1, 0, 1, 1]]


def test_a_cache_that_cannot_be_written_is_said_and_does_without(tmp_path, monkeypatch, caplog):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    write = datasets.Dataset.map

    def refuse(self, *args, keep_in_memory, **options):
        if not keep_in_memory:
            raise PermissionError(13, "Permission denied", str(tmp_path))
        return write(self, *args, keep_in_memory=True, **options)

    monkeypatch.setattr(datasets.Dataset, "map", refuse)
    pairs, _ = sources.find_pairs(datasets.load_from_disk(tmp_path), FORMATS["pickapic"])
    assert pairs.places.tolist() == PLACES and "built at every start" in caplog.text

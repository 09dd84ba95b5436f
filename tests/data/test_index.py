"""The index of pairs: rows, drops, and groups whose rows are in any order."""

import datasets

from trl_diffusion_sdpo.data import sources

ROWS = [
    {"caption": "a", "jpg_0": "0", "jpg_1": "1", "label_0": 1.0, "label_1": 0.0},
    {"caption": "b", "jpg_0": "0", "jpg_1": "1", "label_0": 0.5, "label_1": 0.5},
    {"caption": None, "jpg_0": "0", "jpg_1": "1", "label_0": 1.0, "label_1": 0.0},
    {"caption": "c", "jpg_0": "0", "jpg_1": "1", "label_0": 0.0, "label_1": 1.0},
    {"caption": "d", "jpg_0": "0", "jpg_1": "1", "label_0": None, "label_1": None},
]


def index(rows):
    drops = []
    source = sources.make_source(datasets.Dataset.from_list(rows), None, "train")
    return source.index_pairs(lambda *drop: drops.append(drop)), drops


def test_pairs_and_drops_are_read_from_the_labels():
    pairs, drops = index(ROWS)
    assert pairs.places.tolist() == [[0, 0, 0, 1], [3, 1, 3, 0]] and not pairs.columns
    assert [(kind, row, amount) for kind, row, _, amount in drops] == [
        ("ties", 1, 1),
        ("bad_prompts", 2, 1),
        ("bad_labels", 4, 1),
    ]


def test_rows_of_a_group_are_compared_wherever_they_are(monkeypatch):
    monkeypatch.setattr(sources, "ROWS_AT_ONCE", 2)
    ranks = zip("xyxyx", (2, 1, 1, 2, 3), strict=True)
    pairs, drops = index([{"prompt": "p", "image": "a", "prompt_id": name, "rank": rank} for name, rank in ranks])
    assert pairs.places[:, [0, 2]].tolist() == [[2, 0], [0, 4], [2, 4], [1, 3]] and not drops

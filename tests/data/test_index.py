"""The index of pairs compares rows of a group in any order."""

import datasets

from trl_diffusion_sdpo.data import sources


def index(rows):
    drops = []
    source = sources.make_source(datasets.Dataset.from_list(rows), None, "train")
    return source.index_pairs(lambda *drop: drops.append(drop)), drops


def test_rows_of_a_group_are_compared_wherever_they_are(monkeypatch):
    monkeypatch.setattr(sources, "ROWS_AT_ONCE", 2)
    ranks = zip("xyxyx", (2, 1, 1, 2, 3), strict=True)
    pairs, drops = index([{"prompt": "p", "image": "a", "prompt_id": name, "rank": rank} for name, rank in ranks])
    assert pairs.positions[:, [0, 2]].tolist() == [[2, 0], [0, 4], [2, 4], [1, 3]] and not drops

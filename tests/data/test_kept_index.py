"""The index of a large data set is kept between starts: equal to a new one, and never one of other data."""

import pickle
import threading
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler

from tests.tiny_pairs import png
from trl_diffusion_sdpo.cache.encoded_pairs import ImageRows, rows_and_digests
from trl_diffusion_sdpo.data import PairMixture, PairOptions, PairTransform, kept_index, prepare_dataset
from trl_diffusion_sdpo.data import sources as sources_module
from trl_diffusion_sdpo.data.batch_loaders import SeededSampler
from trl_diffusion_sdpo.data.dataset import PreferenceDataset
from trl_diffusion_sdpo.data.fingerprints import digest_of
from trl_diffusion_sdpo.data.pair_table import PairTable

OPTIONS = PairOptions(PairTransform(8), verify_images="none")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_index, "KEPT_ROWS", 0)
    return tmp_path / "cache" / "trl-diffusion-sdpo" / "indexes"


def pickapic(labels, **columns):
    image = {"bytes": png(), "path": None}
    rows = {"caption": ["x"] * len(labels), "jpg_0": [image] * len(labels), "jpg_1": [image] * len(labels)}
    others = [1 - label for label in labels]
    return datasets.Dataset.from_dict({**rows, "label_0": labels, "label_1": others, **columns})


def prepared(data, options=OPTIONS):
    pairs = prepare_dataset(data, options)
    return pairs.positions.tolist(), str(pairs.report), None if pairs.scores is None else pairs.scores.tolist()


@pytest.fixture
def made(monkeypatch):
    """How often the labels of a data set were read."""
    calls = []
    original = sources_module.TableSource.index_pairs
    monkeypatch.setattr(
        sources_module.TableSource, "index_pairs", lambda self, reject: calls.append(1) or original(self, reject)
    )
    return calls


def test_a_second_start_reads_no_labels_and_has_the_same_pairs_and_report(made):
    labels = [1.0, 0.0, 0.5, 1.0, *[0.5] * 20, 0.0, float("nan")]  # more ties than the report lists
    first = prepared(pickapic(labels))
    assert prepared(pickapic(labels)) == first and len(made) == 1
    assert "21 ties" in first[1] and "1 bad labels" in first[1]


def test_a_spawned_worker_maps_a_kept_index_too():
    labels = [1.0, 0.0] * 2000
    prepare_dataset(pickapic(labels), OPTIONS)
    pairs = prepare_dataset(pickapic(labels), OPTIONS)
    sent = pickle.dumps(pairs._pairs)
    assert len(sent) < 1000 and np.array_equal(pickle.loads(sent).positions, pairs.positions)


def test_a_second_start_with_a_cache_reads_no_prompts(monkeypatch):
    data = pickapic([1.0, 0.0, 1.0], caption=["b", "a", "b"])
    pairs = prepare_dataset(data, OPTIONS)
    rows, digests = rows_and_digests(pairs, 1, pairs.fingerprint(thorough=True))
    assert digests.tolist() == sorted(map(digest_of, ("", "a", "b")))
    assert rows.images.tolist() == ImageRows.of(pairs, 1).images.tolist() and rows.count == 6

    def unread(self):
        raise AssertionError("the prompts were read")

    monkeypatch.setattr(PreferenceDataset, "prompts", unread)
    again = prepare_dataset(data, OPTIONS)
    kept_rows, kept_digests = rows_and_digests(again, 1, again.fingerprint(thorough=True))
    assert kept_digests.tolist() == digests.tolist()
    assert kept_rows.images.tolist() == rows.images.tolist() and kept_rows.count == rows.count
    with pytest.raises(AssertionError):  # another prompt
        other = prepare_dataset(pickapic([1.0, 0.0, 1.0], caption=["b", "c", "b"]), OPTIONS)
        rows_and_digests(other, 1, other.fingerprint(thorough=True))


def test_scores_are_kept(made):
    image = {"bytes": png(), "path": None}
    columns = {"prompt": ["a", "b"], "chosen": [image] * 2, "rejected": [image] * 2}
    data = datasets.Dataset.from_dict({**columns, "chosen_score": [0.7, 0.2], "rejected_score": [0.1, 0.4]})
    first = prepared(data)
    assert prepared(data) == first and first[2] == [[0.7, 0.1], [0.2, 0.4]] and len(made) == 1
    assert prepared(data, PairOptions(PairTransform(8), verify_images="none", swap_labels=True)) != first


def test_another_threshold_of_scores_has_another_index(made):
    image = {"bytes": png(), "path": None}
    data = datasets.Dataset.from_dict({"prompt": ["a", "b", "c"], "image": [image] * 3, "score": [1.0, 2.0, 3.0]})

    def disliked(threshold):
        positions, _, _ = prepared(data, replace(OPTIONS, score_threshold=threshold))
        return {row for _, _, row, _ in positions}

    assert [disliked(threshold) for threshold in (None, 3.0, 2.0, None)] == [{0}, {0, 1}, {0}, {0}]
    assert len(made) == 2  # the median is 2


def test_a_mixture_is_kept_with_its_weights(made):
    one, other = pickapic([1.0, 0.0, 1.0]), pickapic([0.0, 0.0])
    even = prepared(PairMixture({"one": one, "other": other}, (0.5, 0.5)))
    assert prepared(PairMixture({"one": one, "other": other}, (0.5, 0.5))) == even
    assert len(made) == 2
    assert prepared(PairMixture({"one": one, "other": other}, (0.1, 0.9))) != even


def test_other_labels_have_another_index(made):
    assert prepared(pickapic([1.0, 0.0])) != prepared(pickapic([0.0, 1.0]))
    assert len(made) == 2


def test_a_file_that_was_written_anew_has_another_index(tmp_path, made):
    """`datasets` maps the file into memory, and its fingerprint does not change."""
    found = []
    for number, labels in enumerate(([1.0, 0.0], [0.0, 1.0])):
        pickapic(labels).save_to_disk(tmp_path / f"new{number}")
        (file,) = (tmp_path / f"new{number}").glob("*.arrow")
        file.rename(tmp_path / "data.arrow")
        found.append(prepared(datasets.Dataset.from_file(str(tmp_path / "data.arrow"))))
    assert found[0] != found[1] and len(made) == 2


def test_labels_that_a_function_draws_anew_have_another_index(made):
    """The fingerprint of both data sets is the same: `datasets` hashes the function, not what it returns."""
    found = []
    for labels in ([1.0, 0.0], [0.0, 1.0]):
        drawn = iter(labels)
        data = pickapic([0.5, 0.5]).map(
            lambda row, drawn=drawn: {"label_0": next(drawn), "label_1": 0.5},
            load_from_cache_file=False,
            new_fingerprint="the same",
        )
        found.append(prepared(data))
    assert found[0] != found[1] and len(made) == 2


def test_prompts_that_a_function_draws_anew_have_other_tables_of_a_cache():
    """Otherwise, no start would ever find the new prompts."""
    for caption in ("a", "b"):
        data = pickapic([1.0]).map(
            lambda row, caption=caption: {"caption": caption}, load_from_cache_file=False, new_fingerprint="the same"
        )
        pairs = prepare_dataset(data, OPTIONS)
        _, digests = rows_and_digests(pairs, 1, pairs.fingerprint(thorough=True))
        assert digests.tolist() == sorted(map(digest_of, ("", caption)))


@pytest.mark.parametrize("damage", ["no facts", "cut positions", "cut facts"])
def test_an_index_that_is_not_whole_is_made_anew(cache, damage, made):
    first = prepared(pickapic([1.0, 0.0]))
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    if damage == "no facts":  # as after a kill
        (folder / kept_index.FACTS).unlink()
    else:
        file = folder / (kept_index.FACTS if damage == "cut facts" else "positions.npy")
        file.write_bytes(file.read_bytes()[:-8])
    assert prepared(pickapic([1.0, 0.0])) == first and len(made) == 2
    assert prepared(pickapic([1.0, 0.0])) == first and len(made) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(prepared(pickapic([1.0, 0.0]))[0]) == 2
    assert "made anew at each start" in caplog.text


def test_a_user_without_a_home_pays_only_time(monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(kept_index.os.path, "expanduser", lambda path: path)
    assert len(prepared(pickapic([1.0, 0.0]))[0]) == 2
    assert "`XDG_CACHE_HOME`" in caplog.text


def test_a_full_disk_costs_only_time(monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_index, "write_atomically", full)
    assert len(prepared(pickapic([1.0, 0.0]))[0]) == 2
    assert "could not be kept" in caplog.text


def test_of_several_starts_at_once_one_makes_the_index():
    calls, found = [], []
    barrier = threading.Barrier(4)

    def make(reject):
        calls.append(1)
        reject("ties", 3, "images judged equal", 2)
        return PairTable(np.arange(8).reshape(2, 4), {})

    def start():
        barrier.wait()
        rejected = []
        index = kept_index.kept_index(lambda: "key", 1, make, lambda *call: rejected.append(call))
        found.append((index.positions.tolist(), rejected))

    threads = [threading.Thread(target=start) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(calls) == 1
    assert found == [([[0, 1, 2, 3], [4, 5, 6, 7]], [("ties", 3, "images judged equal", 2)])] * 4


def test_indexes_that_nobody_uses_are_deleted(cache, monkeypatch):
    monkeypatch.setattr(kept_index, "KEPT_SECONDS", 0)
    for number in range(kept_index.KEPT_INDEXES + 3):
        kept_index.kept_index(
            lambda number=number: number, 1, lambda reject: PairTable(np.zeros((1, 4), int), {}), print
        )
    assert len([path for path in cache.iterdir() if path.is_dir()]) == kept_index.KEPT_INDEXES


@pytest.mark.parametrize("pairs", [1, 10, 70_000])
def test_the_order_of_an_epoch_is_that_of_accelerate(pairs):
    theirs, ours = SeedableRandomSampler(range(pairs), data_seed=3), SeededSampler(pairs, 3)
    for _ in range(2):  # the second epoch has another order
        assert list(ours) == list(theirs)
    for sampler in (ours, theirs):
        sampler.set_epoch(7)
    assert list(ours) == list(theirs) and len(ours) == pairs
    assert torch.initial_seed() == torch.random.initial_seed()

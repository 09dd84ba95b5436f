"""A stream that resumes in the middle repeats no pair, skips none, and decodes nothing that was trained on."""

from itertools import islice

import datasets
import pytest
from tiny_pairs import png
from torch.utils.data import DataLoader

from trl_diffusion_sdpo.data import PairTransform, PreferenceCollator, prepare_dataset
from trl_diffusion_sdpo.data.images import ImageReader
from trl_diffusion_sdpo.data.streaming import PreferenceIterableDataset, Share
from trl_diffusion_sdpo.engines.batch_loaders import CollateAfterResuming

BATCHES = 10


def stream(count=17, *, bad=(3, 4, 11), shards=1, shuffled=False, groups=False):
    """Pairs of which some cannot be decoded, and ties, or rankings of three images."""
    if groups:
        rows = [
            {"prompt": f"p{i // 3}", "image": b"junk" if i in bad else png(i), "rank": i % 3, "prompt_id": str(i // 3)}
            for i in range(3 * count)
        ]
    else:
        rows = [
            {"caption": f"p{i}", "jpg_0": b"junk" if i in bad else png(2 * i), "jpg_1": png(2 * i + 1)}
            | {"label_0": 0.5 if i % 5 == 2 else float(i % 2)}
            for i in range(count)
        ]
    source = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=shards)
    source = source.shuffle(seed=3, buffer_size=5) if shuffled else source
    return prepare_dataset(source, transform=PairTransform(16, random_flip=True), repeat=True)


def loader(data, workers, share):
    collate = CollateAfterResuming(PreferenceCollator())
    return iter(DataLoader(data.for_process(share), batch_size=share.batch, num_workers=workers, collate_fn=collate))


def told(batch):
    return batch and (batch["prompts"], batch["rows"].tolist(), batch["seeds"], batch["pixel_values"].sum().item())


CASES = {
    "one process": {},
    "a worker": {"workers": 1},
    "a worker of two processes": {"workers": 1, "share": Share(1, 2, 2), "shuffled": True},
    "two workers": {"workers": 2, "shards": 3},
    "more workers than shards": {"workers": 3, "shards": 2},
    "shuffled": {"shuffled": True, "shards": 2},
    "the first of two processes": {"share": Share(0, 2, 2), "shuffled": True},
    "the second of two processes": {"share": Share(1, 2, 2)},
    "rankings": {"groups": True, "count": 5},
    "rankings in two processes": {"groups": True, "count": 5, "share": Share(1, 2, 2)},
    "batches of one": {"share": Share(0, 1, 1)},
}


IN_DEFAULT_RUN = ("one process", "a worker of two processes", "two workers", "rankings in two processes")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in IN_DEFAULT_RUN else pytest.mark.matrix) for case in CASES]
)
def test_a_resumed_stream_has_the_batches_of_an_undisturbed_one(case):
    settings = {"workers": 0, "share": Share(0, 1, 2), **CASES[case]}
    workers, share = settings.pop("workers"), settings.pop("share")
    undisturbed = [told(batch) for batch in islice(loader(stream(**settings), workers, share), BATCHES)]
    assert len({str(batch) for batch in undisturbed}) == BATCHES
    for trained in (1, 6) if workers else (0, 1, 5, 8):
        first = stream(**settings)
        batches = loader(first, workers, share)
        assert [told(batch) for batch in islice(batches, trained)] == undisturbed[:trained]
        for _ in range(min(2, BATCHES - trained)):
            next(batches)  # prefetched, and not trained on
        resumed = stream(**settings)
        resumed.resume_at(first.position(trained, workers, share.count))
        after = [told(batch) for batch in islice(loader(resumed, workers, share), BATCHES)]
        assert after == [{}] * trained + undisturbed[trained:]


def test_a_worker_in_another_pass_does_not_change_which_shards_are_read(monkeypatch):
    undisturbed = [told(batch) for batch in islice(loader(stream(shards=3), 0, Share(0, 1, 2)), BATCHES)]
    data = stream(shards=3)
    shared, items = data._streams[0].source, PreferenceIterableDataset._items

    def in_another_pass(self, *args):
        shared.set_epoch(7)  # a worker ahead of this one, before the rows of this one's pass are read
        return items(self, *args)

    monkeypatch.setattr(PreferenceIterableDataset, "_items", in_another_pass)
    assert [told(batch) for batch in islice(loader(data, 0, Share(0, 1, 2)), BATCHES)] == undisturbed


def test_what_was_trained_on_is_not_decoded(monkeypatch):
    first, share = stream(), Share(0, 1, 2)
    batches = loader(first, 0, share)
    for _ in range(10):
        next(batches)
    decoded, decode = [], ImageReader.decode
    monkeypatch.setattr(ImageReader, "decode", lambda self, value: decoded.append(value) or decode(self, value))
    resumed = stream()
    resumed.resume_at(first.position(10, 0))
    list(islice(loader(resumed, 0, share), 10))
    assert not decoded
    next(loader(resumed, 0, share))  # empty
    assert not decoded


def test_an_evaluation_begins_at_the_beginning():
    data = stream()
    data.resume_at([[3, 0, 9]])
    assert next(iter(data.for_evaluation()))["row"] == 0


def test_a_position_that_is_no_longer_known_is_none():
    data = stream()
    list(islice(data.for_process(Share(0, 1, 1)), 200))
    assert data.position(200, 1)[0][0] == 200
    assert data.position(100, 1) is None  # the reader is too far ahead
    assert data.position(201, 1) is None  # this batch was never read
    assert data.position(0, 2) == [[0] * 3]

"""A stream that resumes at a position yields the batches after it and decodes none before."""

from itertools import islice

import datasets
import pytest
from tiny_pairs import png
from torch.utils.data import DataLoader

from trl_diffusion_sdpo.data import PairMixture, PairOptions, PairTransform, PreferenceCollator, prepare_dataset
from trl_diffusion_sdpo.data.batch_loaders import CollateStream
from trl_diffusion_sdpo.data.images import ImageReader
from trl_diffusion_sdpo.data.stream_position import StreamPosition
from trl_diffusion_sdpo.utils.processes import Peers

BATCHES = 12
OPTIONS = PairOptions(PairTransform(16, random_flip=True), repeat=True)


def pick_a_pic(shards):
    """Thirteen shuffled pairs; some cannot be decoded or are ties."""
    rows = [
        {"caption": f"p{i}", "jpg_0": b"junk" if i in (3, 4) else png(2 * i), "jpg_1": png(2 * i + 1)}
        | {"label_0": 0.5 if i % 5 == 2 else float(i % 2)}
        for i in range(13)
    ]
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=shards).shuffle(seed=3, buffer_size=5)


def stream(shards):
    return prepare_dataset(pick_a_pic(shards), OPTIONS)


def mixture(shards):
    """The pairs of `stream`, and groups of three images that are ranked, with another weight."""
    rows = [{"prompt_id": str(i // 3), "prompt": f"r{i // 3}", "image": png(i), "rank": i % 3} for i in range(9)]
    ranked = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=shards)
    return prepare_dataset(PairMixture([pick_a_pic(shards), ranked], (3, 1)), OPTIONS)


def single_images(shards):
    """Thirteen shuffled images, of which every third one is liked; two cannot be decoded and one has no label."""
    rows = [
        {"prompt": f"s{i}", "image": b"junk" if i in (3, 4) else png(i), "label": None if i == 8 else i % 3 == 0}
        for i in range(13)
    ]
    source = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=shards)
    return prepare_dataset(source.shuffle(seed=3, buffer_size=5), OPTIONS)


def batches(data, workers, share):
    collate = CollateStream(PreferenceCollator())
    loader = DataLoader(data.for_process(share), batch_size=2, num_workers=workers, collate_fn=collate)
    return list(islice(loader, BATCHES))


def outline(batch):
    return batch and (
        batch["prompts"],
        batch["rows"].tolist(),
        batch["seeds"],
        batch["pixel_values"].flatten(1).sum(1).tolist(),
    )


CASES = {
    "one process": (0, 1, Peers()),
    "two workers": (2, 3, Peers()),
    "more workers than shards": (3, 2, Peers()),
    "processes that share rows": (0, 1, Peers(1, 2)),
    "processes with shards of their own": (1, 2, Peers(1, 2)),
}


@pytest.mark.parametrize("stream", [stream, mixture, single_images])
@pytest.mark.parametrize("case", CASES)
def test_a_stream_goes_on_at_a_position(case, stream):
    workers, shards, share = CASES[case]
    undisturbed = batches(stream(shards), workers, share)
    for trained in (1, 8):
        position = StreamPosition.beginning(2, workers)
        for batch in undisturbed[:trained]:
            position.add(batch["read"])
        resumed = stream(shards)
        resumed.start_at(position)
        expected = [{}] * trained + [outline(batch) for batch in undisturbed[trained:]]
        assert [outline(batch) for batch in batches(resumed, workers, share)] == expected
        assert position.batches == trained


def test_nothing_before_the_position_is_decoded_and_no_earlier_pass_is_read(monkeypatch):
    position = StreamPosition.beginning(2, 0)
    for batch in batches(stream(1), 0, Peers()):
        position.add(batch["read"])
    assert position.readers[0][1] > 1
    decoded = []
    monkeypatch.setattr(ImageReader, "decode", lambda *_, **__: decoded.append(1))
    resumed = stream(1)
    resumed.start_at(position)
    assert batches(resumed, 0, Peers()) == [{}] * BATCHES and not decoded
    assert resumed.report.rows == 0

"""Processes share a stream: each decodes only its own pairs, and together they have all."""

from itertools import islice

import datasets
import pytest
from tiny_pairs import JUNK, png
from torch.utils.data import DataLoader

from trl_diffusion_sdpo.data import PairOptions, PairTransform, PreferenceCollator, prepare_dataset
from trl_diffusion_sdpo.data.images import ImageReader
from trl_diffusion_sdpo.utils.processes import Peers


def stream(count, *, bad=(), shards=1, training=True):
    rows = [
        {"prompt": f"p{i}", "chosen": JUNK if i in bad else png(2 * i), "rejected": png(2 * i + 1)}
        for i in range(count)
    ]
    source = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=shards)
    return prepare_dataset(source, PairOptions(PairTransform(16), training=training, repeat=training))


def outline(items):
    return [(item["prompt"], item["row"], item["seed"]) for item in items]


def _length_of_a_pass(items):
    """Items before the first prompt that comes again."""
    prompts_read = [prompt for prompt, *_ in items]
    return next(
        (place for place, prompt in enumerate(prompts_read) if prompt in prompts_read[:place]), len(prompts_read)
    )


def prompts(items):
    return [int(item["prompt"][1:]) for item in items]


@pytest.fixture
def decoded(monkeypatch):
    values, decode = [], ImageReader.decode

    def spy(self, value, **options):
        values.append(value)
        return decode(self, value, **options)

    monkeypatch.setattr(ImageReader, "decode", spy)
    return values


@pytest.mark.parametrize(("count", "processes", "shards"), [(12, 2, 1), (11, 2, 3), (7, 4, 4)])
def test_training_processes_divide_every_pass_and_draw_differently(count, processes, shards, decoded):
    own = [stream(count, shards=shards).for_process(Peers(index, processes)) for index in range(processes)]
    passes = [outline(items) for items in (islice(share, 3 * -(-count // processes)) for share in own)]
    first = [share[: _length_of_a_pass(share)] for share in passes]
    assert sorted(prompt for share in first for prompt, *_ in share) == sorted(f"p{i}" for i in range(count))
    seeds = [seed for share in passes for *_, seed in share]
    assert len(set(seeds)) == len(seeds) == len(decoded) // 2


def test_a_process_of_an_evaluation_decodes_its_own_pairs_only(decoded):
    assert prompts(stream(12, training=False).for_process(Peers(1, 3))) == [1, 4, 7, 10]
    assert len(decoded) == 2 * 4


@pytest.mark.parametrize(
    ("count", "bad", "first", "second"),
    [
        (8, (), [0, 2, 4, 6], [1, 3, 5, 7]),
        (5, (), [0, 2, 4], [1, 3, 1]),
        (1, (), [0], [0]),
        (6, (2, 4), [0, 0, 0], [1, 3, 5]),
        (4, (1, 3), [0, 2], [0, 0]),
    ],
)
def test_in_evaluation_all_processes_have_equally_many_pairs_and_none_is_missing(count, bad, first, second):
    data = stream(count, bad=bad, training=False)
    for index, expected in enumerate((first, second)):
        share = list(data.for_process(Peers(index, 2)))
        assert prompts(share) == expected and outline(share) == outline(data.for_process(Peers(index, 2)))
        own = [number for number in range(index, count, 2) if number not in bad]
        assert [item["repeated"] for item in share] == [number >= len(own) for number in range(len(expected))]
        loader = DataLoader(data.for_process(Peers(index, 2)), batch_size=8, collate_fn=PreferenceCollator())
        assert [batch["counted"] for batch in loader] == [len(own)]


def test_a_share_without_a_good_image_is_an_error_and_not_an_endless_loop():
    with pytest.raises(ValueError, match="has no pair"):
        next(iter(stream(8, bad={0, 2, 4, 6}).for_process(Peers(0, 2))))

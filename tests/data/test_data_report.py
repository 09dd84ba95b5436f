"""Which images are checked before training: a sample, all or none, by one process or several."""

import threading

import datasets
import pytest
import torch
from tiny_pairs import JUNK, png, prepare

from trl_diffusion_sdpo.data.images import ImageReader
from trl_diffusion_sdpo.utils.processes import Peers


def rows(count, bad=(), identical=()):
    pictures = [png(level) for level in range(256)]
    return [
        {
            "prompt": f"p{i}",
            "chosen": JUNK if i in bad else pictures[i % 256],
            "rejected": pictures[i % 256 if i in identical else (i + 1) % 256],
        }
        for i in range(count)
    ]


@pytest.fixture
def decoded(monkeypatch):
    """How many images have been decoded so far."""
    counted, decode = [], ImageReader.decode

    def spy(self, value, **options):
        counted.append(value)
        return decode(self, value, **options)

    monkeypatch.setattr(ImageReader, "decode", spy)
    return counted


class ThreadGroup:
    """Simulates a process group with threads: each gets a `Peers` whose `gather` is a collective among them."""

    def __init__(self, count):
        self.count, self.values, self.barrier = count, [None] * count, threading.Barrier(count, timeout=20)

    def peers(self, index):
        def gather(value):
            self.values[index] = value
            self.barrier.wait()
            gathered = list(self.values)
            self.barrier.wait()
            return gathered

        return Peers(index, self.count, gather)

    def run(self, function):
        results = [None] * self.count

        def call(index):
            results[index] = function(self.peers(index))

        threads = [threading.Thread(target=call, args=(index,)) for index in range(self.count)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        return results


def test_by_default_128_pairs_are_checked_and_the_others_when_they_are_read(decoded, caplog):
    data = rows(1000, bad={0, 3})  # the sample is 0, 7, 15, ...
    prepared = prepare(data)
    assert len(decoded) == 2 * 128 - 1  # the loser of a bad winner is not decoded
    assert len(prepared) == 1000 and (prepared.report.pairs, prepared.report.undecodable) == (999, 1)
    assert "1 undecodable" in caplog.text
    assert prepared[0]["prompt"] == "p1" and prepared[3]["prompt"] == "p4"  # replaced by the next good pairs
    assert (prepared.report.pairs, prepared.report.undecodable) == (998, 2)


def test_a_file_that_cannot_be_read_at_the_start_does_not_change_the_index():
    """A run that resumes when the file can be read again finds its position by the number and order of the pairs."""
    good, torn = prepare(rows(300)), prepare(rows(300, bad={0}))
    assert len(torn) == len(good) == 300
    assert torn.fingerprint()["index"] == good.fingerprint()["index"]
    assert [torn[index]["prompt"] for index in (0, 1, 299)] == ["p1", "p1", "p299"]
    assert torn.report.examples["undecodable"][0][0] == 0


def test_a_sample_without_a_single_good_pair_is_an_error():
    with pytest.raises(ValueError, match="None of the 128 pairs that were checked can be decoded"):
        prepare([{"prompt": "a", "chosen": JUNK, "rejected": JUNK}] * 300)


@pytest.mark.parametrize("verify", ["sample", "all"])
@pytest.mark.parametrize("style", ["list", "arrow"])
def test_processes_divide_the_check_and_end_with_the_same_pairs(verify, style):
    data = rows(100, bad={5, 41, 99})
    if style == "arrow":
        data = datasets.Dataset.from_list(data)
    group = ThreadGroup(3)
    three = group.run(lambda peers: prepare(data, verify_images=verify, peers=peers))
    assert [prepared.report.pairs for prepared in three] == [97] * 3
    assert all(torch.equal(prepared.undecodable, three[0].undecodable) for prepared in three)
    assert three[0].report == three[1].report == three[2].report == prepare(data, verify_images=verify).report


def test_the_report_is_logged_by_one_process_only(caplog):
    processes = ThreadGroup(2)
    processes.run(lambda peers: prepare(rows(4, bad={1}), peers=peers))
    assert caplog.text.count("1 undecodable") == 1

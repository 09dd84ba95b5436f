"""Two processes disagree, or one is gone: nobody waits for long, and each says why."""

import multiprocessing
import time

import pytest
import torch.distributed as dist

from trl_diffusion_sdpo.engines.processes import check_agreement, gather_objects


def in_two_processes(act, folder) -> list[str]:
    """Return what `act(rank)` returned in each of two processes."""
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=joined, args=(act, rank, str(folder))) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert not any(process.is_alive() for process in both)
    return [(folder / f"result{rank}").read_text() for rank in (0, 1)]


def joined(act, rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with open(f"{folder}/result{rank}", "w") as file:
        file.write(act(rank))


def refusal(rank: int, **facts) -> str:
    try:
        check_agreement(facts)
    except ValueError as error:
        return str(error)
    return "agreed"


def test_a_process_that_has_ended_is_noticed_at_once(tmp_path):
    def act(rank: int) -> str:
        assert gather_objects(rank) == [0, 1]
        if rank == 1:
            return "ended"
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="Process 0 has lost another process"):
            gather_objects(rank)
        return f"{time.monotonic() - start < 30}"

    assert in_two_processes(act, tmp_path) == ["True", "ended"]


def test_processes_that_disagree_are_refused_in_both(tmp_path):
    first, second = in_two_processes(lambda rank: refusal(rank, seed=1, max_steps=4 + rank), tmp_path)
    assert first == second
    assert "`max_steps` is 4 in process 0 and 5 in process 1" in first

"""The comparison with the walk by hand bites: a mechanism with one part taken out is far from it."""

import pytest


def broken_case(engine: str, fault: str, accumulation: int) -> dict:
    args = {
        "safeguard": "parameter",
        "safeguard_mu": 0.7,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-4,
    }
    return {"name": f"{engine}-{fault}", "engine": engine, "tuning": "full", "fault": fault, "args": args}


def only(engine: str, fault: str, accumulation: int):
    return pytest.mark.parametrize("case", [broken_case(engine, fault, accumulation)], ids=[f"{engine}-{fault}"])


@only("ddp", "unreduced", accumulation=2)
def test_a_loser_branch_that_is_not_averaged_over_processes_is_noticed(found):
    assert found["update_error"] > 1e-2


@pytest.mark.matrix
@only("zero3", "uncleared", accumulation=2)
def test_gradients_left_between_the_branches_are_noticed(found):
    assert found["update_error"] > 1e-2


@pytest.mark.matrix
@only("fsdp2", "untotalled", accumulation=1)
def test_a_lambda_of_the_own_shard_is_noticed(found):
    assert found["update_error"] > 1e-2

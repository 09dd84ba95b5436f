"""The comparison with the walk by hand fails if one part of a mechanism is taken out."""

import pytest


def broken(engine: str, fault: str, accumulation: int, *marks):
    args = {
        "safeguard": "parameter",
        "safeguard_mu": 0.7,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-4,
    }
    name = f"{engine}-{fault}"
    case = {"name": name, "engine": engine, "tuning": "full", "fault": fault, "args": args}
    return pytest.param(case, id=name, marks=marks)


@pytest.mark.parametrize(
    "case",
    [
        broken("ddp", "unreduced", 2),  # the losers' branch is not averaged over processes
        broken("zero3", "uncleared", 2, pytest.mark.matrix),  # gradients stay between the branches
        broken("fsdp2", "untotalled", 1, pytest.mark.matrix),  # lambda is that of the process's own shard
    ],
)
def test_a_fault_is_noticed(found):
    assert found["update_error"] > 1e-2

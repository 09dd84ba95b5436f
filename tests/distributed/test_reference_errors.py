"""Precomputed errors of the reference under every engine: the step is the one by hand, and the first is neutral."""

import json

import pytest

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
PAIRS = 16  # of two in a batch, so 8 batches, half of them by each process
RATES = {"full": 1e-4, "started": 3e-3, "fresh": 1e-2}

pytestmark = pytest.mark.matrix


def build_case(engine: str, tuning: str, safeguard: str = "parameter", kind: str = "", **more) -> dict:
    given = {name: more.pop(name) for name in ("alone", "own_linear") if name in more}
    args = {
        "safeguard": safeguard,
        "safeguard_mu": 0.5,
        "learning_rate": RATES[tuning],
        "gradient_accumulation_steps": 2,
        "precompute_ref_errors": True,
        **more,
    }
    name = "-".join(part for part in (engine, tuning, safeguard, "errors", kind) if part)
    return {"name": name, "engine": engine, "tuning": tuning, "args": args, **given}


def each(cases: list[dict]):
    return pytest.mark.parametrize("case", cases, ids=[case["name"] for case in cases])


def facts_of(folder) -> list[dict]:
    return [json.loads((folder / f"reference{rank}.json").read_text()) for rank in (0, 1)]


@each(
    [
        build_case(engine, tuning, safeguard)
        for engine in ENGINES
        for tuning, safeguard in (
            ("full", "parameter"),
            ("started", "output"),
        )
    ]
)
def test_two_processes_take_the_step_with_a_live_reference(found, trained, case):
    assert [facts["reference"] for facts in facts_of(trained(case))] == ["errors", "errors"]
    assert sum(facts["computed"] for facts in facts_of(trained(case))) == PAIRS // 2
    assert found["logged"] == pytest.approx(found["lambdas"], abs=1e-5)
    assert found["update_error"] < 1e-3


@each(
    [
        build_case(
            *(engine, tuning, safeguard, "bf16" if bf16 else "plain"),
            alone=True,
            own_linear=engine == "zero3",
            bf16=bf16,
            beta=5000.0,
        )
        for engine in ENGINES
        for tuning, safeguard in (("full", "output"), ("fresh", "parameter"))
        for bf16 in (False, True)
    ]
)
def test_the_first_step_is_neutral_to_the_bit(trained, case):
    """ZeRO-3 replaces `linear` by a product and a sum, which round apart in bf16, unless its configuration says
    otherwise."""
    first = next(entry for entry in json.loads((trained(case) / "log.json").read_text()) if "loss" in entry)
    assert first["errors/winner_change"] == first["errors/loser_change"] == first["rewards/margins"] == 0

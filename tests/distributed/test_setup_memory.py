"""While an engine that shards weights is set up, no process holds a second whole model, and none moves one to its
device."""

import json
from pathlib import Path

import pytest
from two_processes import do_in_turn, folder_of_done

WORKER = Path(__file__).with_name("setup_worker.py")
ARGS = {
    "max_steps": 1,
    "per_device_train_batch_size": 1,
    "optim": "sgd",
    "beta": 500.0,
    "ema_decay": 0.9,
    "bf16": True,
    "safeguard": "output",
}
CASES = [{"name": engine, "engine": engine, "args": ARGS} for engine in ("fsdp2", "zero3")]


@pytest.fixture(scope="module")
def measured(start, make_sd_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("setup")
    pipeline = make_sd_pipeline(
        block_out_channels=(256,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
    )
    pipeline.save_pretrained(folder / "large")
    same = {"model": str(folder / "large"), "ref_model": None, "lora": None, "data": start["pairs"], "peft": None}
    freed = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors return to the system
    outputs = do_in_turn(WORKER, [{**case, **same} for case in CASES], folder, freed)

    def facts(case: dict) -> list[dict]:
        done = folder_of_done(case, folder, outputs)
        return [json.loads((done / f"setup{rank}.json").read_text()) for rank in (0, 1)]

    return facts


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_no_second_model_is_held_and_none_is_moved_whole(case, measured, record_property):
    """Policy, reference and average: three models of float32. Loading takes some more than one."""
    for rank, facts in enumerate(measured(case)):
        shares = {name: facts[name] / facts["weights"] for name in ("constructed", "trained", "moved")}
        record_property(f"shares of the weights, {rank}", shares)
        assert shares["moved"] < 0.1  # VAE and text encoder
        assert shares["constructed"] < 2.2

"""Full tuning of bf16 weights: rounding is right on average, the same after and within the backward pass and in a
resumed run, and refused where it would lose small updates."""

import math
import shutil

import pytest
import torch

from trl_diffusion_sdpo.cli.plan import planned_settings
from trl_diffusion_sdpo.step.stochastic_rounding import rounds_at_random, weight_by_weight

HALF = {"model_init_kwargs": {"dtype": "bfloat16"}, "bf16": True}
ROUNDED = {**HALF, "optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True", "safeguard": "output"}
IN_BACKWARD = {"gradient_accumulation_steps": 1, "max_grad_norm": 0}


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in trainer.denoiser.state_dict().items()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("size", [4096, 100])
def test_small_updates_add_up_on_average(size):
    """Adam moves each weight by the rate while its gradient is constant: 50 steps of 1e-4 from 1 end at 0.995. In bf16,
    the neighbours of 1 are 1/256 and 1/128 away, so rounding to the nearest value would stay at 1."""
    optim = pytest.importorskip("torchao.optim")
    weight = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
    optimizer = weight_by_weight(optim.AdamW8bit)(
        [weight], lr=1e-4, weight_decay=0.0, bf16_stochastic_round=True, seed=0
    )
    for _ in range(50):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    error = 1 / 256 * math.sqrt(50 * 1e-4 * 256 / size)  # one standard deviation of the mean, at most
    assert float(weight.detach().double().mean()) == pytest.approx(0.995, abs=4 * error)
    if size == 100:  # quantized by no one
        assert optimizer.state[weight]["exp_avg_sq"].dtype == torch.float32


def test_within_the_backward_pass_after_it_and_resumed_are_one_walk(make_trainer, tmp_path):
    pytest.importorskip("torchao")
    common = {**ROUNDED, "max_steps": 4, "precompute_ref_errors": True, "precompute_epochs": 1}
    saving = {"save_strategy": "steps", "save_steps": 2}
    within = make_trainer(output_dir=str(tmp_path / "a"), **common, **saving, **IN_BACKWARD)
    within.train()
    first = within.state.log_history[0]
    assert first["rewards/margins"] == first["errors/winner_change"] == first["errors/loser_change"] == 0
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6) and first["grad_norm"] > 0
    assert not within._gradient_hooks

    after = make_trainer(output_dir=str(tmp_path / "b"), **common, **{**IN_BACKWARD, "max_grad_norm": 1e9})
    after.train()
    assert_equal(weights_of(within), weights_of(after))

    checkpoint = tmp_path / "c" / "checkpoint-2"
    shutil.copytree(tmp_path / "a" / "checkpoint-2", checkpoint)
    resumed = make_trainer(output_dir=str(checkpoint.parent), **common, **saving, **IN_BACKWARD)
    resumed.train(str(checkpoint))
    assert_equal(weights_of(within), weights_of(resumed))


def test_an_average_of_bf16_weights_is_float32(make_trainer):
    pytest.importorskip("torchao")
    trainer = make_trainer(**ROUNDED, ema_decay=0.9, safeguard_mu=0.5, max_steps=1)
    trainer.train()
    assert trainer.denoiser.conv_in.weight.dtype == torch.bfloat16
    assert {weight.dtype for weight in trainer.average.second.weights().values()} == {torch.float32}


def test_the_plan_counts_the_bytes_that_are_allocated(make_trainer, sd_folder, tmp_path):
    pytest.importorskip("torchao")
    words = f"--model_name_or_path {sd_folder} --output_dir {tmp_path} --dtype bfloat16 --optim adamw_torch_8bit"
    words += " --optim_args bf16_stochastic_round=True --safeguard output --bf16"
    planned = planned_settings(words.split(), "plan", "cpu").plan().components
    trainer = make_trainer(**ROUNDED, max_steps=1)
    trainer.train()
    held = {"policy": 0, "optimizer": 0}
    for weight in trainer.denoiser.parameters():
        held["policy"] += weight.nbytes
        for name in ("exp_avg", "exp_avg_sq"):
            state = trainer.optimizer.state[weight][name]
            parts = [state] if type(state) is torch.Tensor else [state.codes, state.scale, state.qmap]
            held["optimizer"] += sum(part.nbytes for part in parts)
    assert planned["optimizer"] == held["optimizer"]
    assert planned["policy"] == pytest.approx(held["policy"], rel=1e-3)  # and a few buffers


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optim_args": None}, "bf16_stochastic_round=True"),
        ({"optim": "adamw_torch"}, "'adamw_torch'"),
        ({"bf16": False}, "bf16 autocast"),
        ({"model_init_kwargs": {"dtype": "float16"}}, "bf16 weights"),
        ({"sync_ref_model": True}, "`sync_ref_model`"),
        ({"optimizers": (object(), None)}, "an optimizer object"),
    ],
)
def test_what_would_lose_small_updates_is_refused(make_trainer, changed, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**{**ROUNDED, **changed})


def test_only_the_switch_rounds_at_random(make_args):
    chosen = [
        make_args(optim="adamw_torch_8bit", optim_args=given)
        for given in (None, "bf16_stochastic_round=False", "block_size=256, bf16_stochastic_round = yes")
    ]
    assert [rounds_at_random(args) for args in chosen] == [False, False, True]
    assert not rounds_at_random(make_args(optim="adamw_torch", optim_args="bf16_stochastic_round=True"))

"""Settings of engines: what is rounded, what is refused, and the default of DDP."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, HfDeepSpeedConfig

from trl_diffusion_sdpo.engines.engine import Engine
from trl_diffusion_sdpo.engines.engine_settings import check_deepspeed_precision
from trl_diffusion_sdpo.trainer.config.complete import copy_and_check_args


def engine(kind: str, **deepspeed_config) -> Engine:
    """`kind` is one of accelerate's distributed types; DeepSpeed runs ZeRO-2."""
    plugin = SimpleNamespace(zero_stage=2, deepspeed_config=deepspeed_config)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType(kind),
        is_fsdp2=False,
        num_processes=8,
        parallelism_config=None,
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )
    return Engine(lambda: accelerator, lambda: torch.nn.Linear(1, 1))


@pytest.mark.parametrize(("config", "rounds"), [({}, False), ({"enabled": False}, False), ({"enabled": True}, True)])
def test_only_half_precision_of_deepspeed_rounds_the_weights_themselves(config, rounds):
    found, module = engine("DEEPSPEED", bf16=config), torch.nn.Linear(2, 1)
    module.bias.requires_grad_(False)
    assert found.rounds_weights == rounds
    assert list(found.unrounded(module)) == ([module.weight] if rounds else [])
    assert engine("FSDP").unrounded(module) == engine("NO").unrounded(module) == {}


def test_version_1_of_fsdp_and_zero_plus_plus_are_refused():
    with pytest.raises(ValueError, match="FSDP must be version 2, got 1"):
        engine("FSDP").check()
    with pytest.raises(ValueError, match="ZeRO.. .*{'zero_quantized_weights': True}"):
        engine("DEEPSPEED", zero_optimization={"zero_quantized_weights": True}).check()
    engine("DEEPSPEED").check()


@pytest.mark.parametrize("asks", [True, False])
def test_an_engine_that_was_asked_for_and_does_not_run_is_said(make_trainer, monkeypatch, caplog, asks):
    """accelerate has no FSDP on CPUs, also if its configuration asks for it."""
    if asks:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    trainer = make_trainer(max_steps=1)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("FSDP" in warning and "cpu" in warning for warning in warnings) is asks
    trainer.train()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_without_momentum_is_refused_under_fsdp_alone(momentum):
    Accelerator(cpu=True)  # without it, no optimizer can be wrapped
    optimizer = AcceleratedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], momentum=momentum))
    for kind in ("NO", "MULTI_GPU", "DEEPSPEED"):
        engine(kind).check_resumable(optimizer)
    if momentum:
        engine("FSDP").check_resumable(optimizer)
    else:
        with pytest.raises(ValueError, match="SGD without momentum cannot be resumed"):
            engine("FSDP").check_resumable(optimizer)


@pytest.mark.parametrize(("config", "bf16"), [({"enabled": True}, False), ({"enabled": True}, True), ({}, False)])
def test_a_precision_of_deepspeed_that_the_arguments_lack_is_refused_with_the_option_to_set(config, bf16):
    plugin = SimpleNamespace(hf_ds_config=HfDeepSpeedConfig({"bf16": config}))
    args = SimpleNamespace(deepspeed_plugin=plugin, bf16=bf16, fp16=False)
    with pytest.raises(ValueError, match="--bf16 true") if config and not bf16 else nullcontext():
        check_deepspeed_precision(args)


def test_ddp_sends_no_buffers_unless_told_to(make_args):
    assert copy_and_check_args("model", None, make_args()).ddp_broadcast_buffers is False
    assert copy_and_check_args("model", None, make_args(ddp_broadcast_buffers=True)).ddp_broadcast_buffers is True

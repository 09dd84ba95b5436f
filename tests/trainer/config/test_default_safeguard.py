"""The safeguard of a run whose `safeguard` is unset."""

import json
import logging
from types import SimpleNamespace

import pytest
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from trl_diffusion_sdpo.saving.run_files import SETUP_FILE
from trl_diffusion_sdpo.saving.setup import ARGS_FILE
from trl_diffusion_sdpo.trainer.config.default_safeguard import default_safeguard


@pytest.mark.parametrize(
    ("settings", "safeguard", "mu"),
    [
        ({}, "parameter", 0.8),
        ({"loss_type": "dspo"}, "parameter", 0.8),
        ({"loss_type": ["apo_down", "sft"]}, "parameter", 0.8),
        ({"safeguard_kwargs": {"low_memory": True}}, "parameter", 0.8),
        ({"safeguard_mu": 0.3}, "parameter", 0.3),
        ({"safeguard": "parameter"}, "parameter", 0.8),
        ({"safeguard": "output"}, "output", 0.9),
        ({"safeguard": "output", "loss_type": "dspo"}, "output", 0.2),
        ({"safeguard_kwargs": {"granularity": "pair"}}, "output", 0.9),
        ({"safeguard_kwargs": {"eps": 0.0}}, "output", 0.9),
        ({"ddp_static_graph": True, "safeguard_mu": 0.3}, "output", 0.3),
        ({"loss_type": "sft"}, "none", 0.9),
        ({"loss_type": "apo_down"}, "none", 0.9),
    ],
)
def test_an_unset_safeguard_and_its_strictness_depend_on_the_loss_and_the_settings(
    make_trainer, settings, safeguard, mu
):
    args = make_trainer(**settings).args
    assert (args.safeguard, args.safeguard_mu) == (safeguard, mu)


@pytest.mark.parametrize(
    ("settings", "level", "named"),
    [
        ({}, None, ""),
        ({"loss_type": "sft"}, None, ""),
        ({"loss_type": "apo_down"}, logging.INFO, "apo_down"),
        ({"safeguard_kwargs": {"granularity": "pair", "eps": 1e-9}}, logging.WARNING, "`granularity` and `eps`"),
        ({"ddp_static_graph": True}, logging.WARNING, "`ddp_static_graph=True`"),
        ({"ddp_static_graph": True, "safeguard": "output"}, None, ""),
    ],
)
def test_one_sentence_says_why_a_run_does_not_have_the_default(make_trainer, caplog, settings, level, named):
    with caplog.at_level(logging.INFO, logger="trl_diffusion_sdpo"):
        make_trainer(**settings)
    said = [record for record in caplog.records if record.name.endswith("complete") and "safeguard" in record.message]
    said = [record for record in said if not record.message.startswith("Defaults for")]
    assert [record.levelno for record in said] == ([] if level is None else [level])
    assert all(named in record.message for record in said)


def deepspeed(stage: int, **settings):
    config = {"zero_optimization": {"stage": stage, **settings.pop("zero", {})}, **settings}
    return {"deepspeed_plugin": SimpleNamespace(zero_stage=stage, hf_ds_config=HfDeepSpeedConfig(config))}


BF16_SUMS = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
AUTO_SUMS = {**BF16_SUMS, "bf16": {"enabled": "auto"}}
MUON = {"optimizer": {"type": "Muon"}}


@pytest.mark.parametrize(
    ("attributes", "named"),
    [
        (deepspeed(0), "stage is 0"),
        (deepspeed(2, zero={"offload_optimizer": {"device": "cpu"}}), "`offload_optimizer_device: none`"),
        (deepspeed(3, zero={"offload_optimizer": {"device": "nvme"}}), "`offload_optimizer_device: none`"),
        (deepspeed(1, **BF16_SUMS), "`grad_accum_dtype`"),
        ({"bf16": True, **deepspeed(1, **AUTO_SUMS)}, "`grad_accum_dtype`"),
        ({"bf16": False, **deepspeed(1, **AUTO_SUMS)}, ""),
        (deepspeed(2, **MUON), "ZeRO-3"),
        ({"fsdp_plugin_args": {"cpu_offload": True}}, "`offload_params`"),
        ({"distributed_state": SimpleNamespace(distributed_type=SimpleNamespace(value="XLA"))}, "XLA"),
        ({"optim": "lomo"}, "'lomo'"),
        ({"optim": "galore_adamw_layerwise"}, "'galore_adamw_layerwise'"),
        (deepspeed(1), ""),
        (deepspeed(2, zero={"offload_optimizer": {"device": "none"}}, **BF16_SUMS), ""),
        (deepspeed(3, **MUON), ""),
        ({"fsdp_plugin_args": {"fsdp_version": 2}}, ""),
    ],
)
def test_an_engine_or_optimizer_that_mixes_the_branches_gets_the_output_rule(make_args, attributes, named):
    args = make_args()
    for name, value in attributes.items():
        setattr(args, name, value)
    safeguard, reason = default_safeguard(args, args.loss_spec)
    assert safeguard == ("output" if named else "parameter")
    assert named in reason and bool(named) == bool(reason)


@pytest.mark.parametrize(("dropout", "safeguard"), [(0.1, "output"), (0.0, "parameter")])
def test_zero3_with_two_predictions_of_the_winners_needs_a_denoiser_without_dropout(
    make_args, make_sd_pipeline, dropout, safeguard
):
    args = make_args(safeguard_kwargs={"anchor": "error"})
    args.deepspeed_plugin = deepspeed(3)["deepspeed_plugin"]
    unet = make_sd_pipeline(dropout=dropout).unet
    assert default_safeguard(args, args.loss_spec, unet)[0] == safeguard


@pytest.mark.parametrize("recorded", ["output", None])
def test_a_run_that_resumes_from_an_earlier_version_says_that_the_safeguard_differs(
    make_trainer, make_pairs, tmp_path, caplog, recorded
):
    def build(**settings):
        return make_trainer(train=make_pairs(4), max_steps=2, save_strategy="steps", save_steps=1, **settings)

    build(safeguard="output").train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    for file in (checkpoint / SETUP_FILE, checkpoint / ARGS_FILE):
        stored = json.loads(file.read_text())
        assert stored["safeguard"] == "output"
        if recorded is None:
            del stored["safeguard"]
        file.write_text(json.dumps(stored))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        build(overwrite_output_dir=True).train(resume_from_checkpoint=str(checkpoint))
    said = [record.getMessage() for record in caplog.records if record.name.endswith("resuming")]
    assert len(said) == 1 and "safeguard" in said[0] and '"parameter"' in said[0]

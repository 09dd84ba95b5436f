"""The targets of a LoRA are layers of the denoiser."""

import pytest
from peft import LoraConfig

from trl_diffusion_sdpo.models.adapters import add_lora
from trl_diffusion_sdpo.utils.errors import UserError


@pytest.mark.parametrize(
    "targets", [["nothing"], "nothing.*", ["to_q", "text_encoder.q_proj"], ["to_q", "te1_layers"]]
)
def test_targets_that_match_nothing_or_are_of_a_text_encoder_are_refused(sd_pipeline, targets):
    with pytest.raises(ValueError, match=targets if isinstance(targets, str) else targets[-1]) as caught:
        add_lora(sd_pipeline.unet, LoraConfig(r=2, target_modules=targets), (), 0)
    assert isinstance(caught.value, UserError)


def test_a_target_that_matches_nothing_beside_others_is_named(sd_pipeline, caplog):
    add_lora(sd_pipeline.unet, LoraConfig(r=2, target_modules=["to_q", "to_out.0", "q_proj"]), (), 0)
    assert "q_proj" in caplog.text and "to_q" not in caplog.text
    layers = {name for name, _ in sd_pipeline.unet.named_modules() if name.endswith(".lora_A")}
    assert layers and all(".to_q." in name or ".to_out.0." in name for name in layers)
    caplog.clear()


def test_default_targets_need_not_all_exist(sd_pipeline, caplog):
    """Those of a family are for all of its models."""
    add_lora(sd_pipeline.unet, LoraConfig(r=2), ("to_q", "q_proj"), 0)
    assert "q_proj" not in caplog.text

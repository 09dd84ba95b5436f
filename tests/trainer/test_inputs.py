"""Bad input: each error says the rule, what came and what to do."""

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from PIL import Image

from trl_diffusion_sdpo import DiffusionSDPOTrainer
from trl_diffusion_sdpo.utils._compat import CHECKPOINTING


def image(value=0, size=(16, 16)):
    return Image.fromarray(np.full((*size, 3), value, dtype=np.uint8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": float("nan")}, "`beta`"),
        ({"loss_type": "exo_pair"}, "`loss_type`.*dmpo"),
        ({"loss_type": "sigmoid", "loss_kwargs": [0.1]}, "`loss_kwargs`"),
        ({"loss_type": "dmpo", "loss_kwargs": {"dmpo_alpha": "low"}}, "`dmpo_alpha`"),
        ({"loss_type": "sigmoid", "loss_kwargs": {"dmpo_alpha": 0.1}}, "`dmpo_alpha`"),
        ({"loss_type": "sft", "sync_ref_model": True}, "`sync_ref_model=True`"),
        ({"timestep_range": [500, 500]}, "`timestep_range`"),
        ({"label_smoothing_factor": 0.1}, "`loss_type='robust'`"),
        ({"bf16_full_eval": True}, "`bf16_full_eval=True`"),
        ({f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}, "`use_reentrant=True`"),
        ({"loss_type": "apo_down", "safeguard": "output"}, "`safeguard='output'`.*`safeguard='none'`"),
        ({"loss_type": "apo_down", "safeguard": "parameter"}, "apo_down"),
        ({"beta": "high"}, "`beta`.*'high'"),
        ({"loser_noise_range": ["low", 1]}, "`loser_noise_range`.*'low'"),
        ({"timesteps": [None]}, "`timesteps`.*None"),
        (
            {"weighting_scheme": "mode", "weighting_kwargs": {"logit_mean": 1.0}},
            "`logit_mean`.*'mode'.*'logit_normal'",
        ),
        ({"timesteps": [1.0], "weighting_kwargs": {"mode_scale": 1.0}}, "`mode_scale`.*`timesteps`"),
        ({"weighting_kwargs": {"logit_mean": True}}, "`logit_mean` of `weighting_kwargs`.*True"),
        ({"weighting_kwargs": {"scheme": "mode"}}, "`weighting_kwargs`.*'scheme'"),
        ({"weighting_kwargs": {"logit_mena": 0.0}}, "`weighting_kwargs`.*Did you mean `logit_mean`"),
        ({"bucket_kwargs": {"step": 64.5}}, "`step` of `bucket_kwargs`.*64.5"),
        ({"winner_budget_kwargs": {"pairs": 2.5}}, "`pairs` of `winner_budget_kwargs`.*2.5"),
        ({"inversion_kwargs": {"steps": "many"}}, "`steps` of `inversion_kwargs`.*'many'"),
        ({"image_schemes": "memroy"}, "`image_schemes`.*Did you mean `memory`"),
    ],
)
def test_settings_out_of_range_are_refused(make_args, settings, message):
    with pytest.raises(ValueError, match=message):
        make_args(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "sft", "beta": 1.0}, "`beta=1.0` has no effect"),
        ({"safeguard": "none", "safeguard_mu": 0.5}, "`safeguard_mu` has no effect"),
        ({"loss_type": "sft", "safeguard_kwargs": {"granularity": "pair"}}, "`granularity`.*`safeguard_kwargs`"),
        ({"sample_steps": 5}, "`sample_steps` has no effect without `sample_prompts`"),
        ({"ref_model_sync_steps": 64}, "`ref_model_sync_steps` has no effect without `sync_ref_model`"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.0]}, "'sft' has no effect"),
    ],
)
def test_settings_without_effect_are_said_to_have_none(make_args, settings, message):
    with pytest.warns(UserWarning, match=message):
        make_args(**settings)


def test_weighting_kwargs_of_another_scheme_than_the_familys_are_refused(make_trainer):
    with pytest.raises(ValueError, match="`logit_mean`.*'none'.*'logit_normal'"):
        make_trainer(weighting_kwargs={"logit_mean": 0.5})


@pytest.mark.parametrize(
    ("settings", "interval"),
    [
        ({"winner_budget": 0.1, "winner_budget_kwargs": {"steps": 2}}, "`winner_budget_kwargs`"),
        ({"sync_ref_model": True, "ref_model_sync_steps": 3}, "`ref_model_sync_steps`"),
        ({"on_winner_rise": "stop", "eval_strategy": "steps", "eval_steps": 2}, "`eval_steps`"),
    ],
)
@pytest.mark.parametrize("max_steps", [2, 4])
def test_what_acts_only_after_the_last_step_is_said_to_have_no_effect(
    make_trainer, make_pairs, caplog, settings, interval, max_steps
):
    make_trainer(**settings, max_steps=max_steps, eval_dataset=make_pairs(2)).train()
    said = [record.message for record in caplog.records if "has no effect" in record.message]
    assert [interval in message and "2 steps" in message for message in said] == ([True] if max_steps == 2 else [])


@pytest.mark.parametrize(
    ("settings", "is_far"),
    [
        ({"beta": 0.1}, True),  # the default is 5000
        ({"beta": 50.0}, False),
        ({"beta": 1e6}, True),
        ({"loss_type": "mapo", "beta": 0.1}, False),
        ({"loss_type": "dspo", "beta": 5000.0}, True),
        ({"loss_type": ["sigmoid", "mapo"], "beta": 0.1}, False),
    ],
)
def test_a_beta_far_from_its_default_is_a_warning(make_trainer, caplog, settings, is_far):
    make_trainer(**settings)
    assert (f"`beta={settings['beta']:g}` is more than" in caplog.text) == is_far


def test_a_run_without_a_fault_warns_of_nothing_and_logs_its_defaults(make_trainer, caplog):
    caplog.set_level("INFO", "trl_diffusion_sdpo")
    make_trainer(beta=None, resolution=16, max_steps=1).train()
    ours = [record for record in caplog.records if record.name.startswith("trl_diffusion_sdpo")]
    assert not [record.getMessage() for record in ours if record.levelname == "WARNING"]
    assert any("beta=5000" in record.getMessage() for record in ours)


def test_wrong_columns_are_named_with_those_that_are_accepted(make_trainer):
    data = datasets.Dataset.from_dict({"text": ["a"], "picture": ["b"]})
    with pytest.raises(ValueError, match="(?s)text.*chosen.*rejected"):
        make_trainer(train=data)


def test_bad_rows_are_dropped_and_counted(make_trainer, caplog):
    good = {"prompt": "a", "chosen": image(), "rejected": image(9)}
    rows = [good, {**good, "prompt": None}, {**good, "rejected": image(9, size=(1, 1))}, good]
    trainer = make_trainer(train=rows)
    assert trainer.train_dataset.report.pairs == 2
    assert "1 undecodable" in caplog.text and "1 bad prompts" in caplog.text


def test_training_needs_data(sd_folder, make_args):
    with pytest.raises(ValueError, match="Training needs a `train_dataset`"):
        DiffusionSDPOTrainer(sd_folder, None, make_args()).train()


def test_an_unsupported_pipeline_class_is_refused(make_trainer, sd_folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(ValueError, match="(?s)StableDiffusionPipeline.*got KandinskyPipeline"):
        make_trainer(str(tmp_path / "other"))


def test_a_module_that_is_no_denoiser_is_refused(make_trainer, sd_pipeline):
    with pytest.raises(ValueError, match="must be a Hub id, a folder, a diffusers pipeline or its denoiser"):
        make_trainer(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="`processing_class` must be the pipeline"):
        make_trainer(sd_pipeline.unet)
    with pytest.raises(ValueError, match="must be the unet of `processing_class`"):
        make_trainer(AutoencoderKL(), processing_class=sd_pipeline)


def test_a_text_encoder_with_an_adapter_to_train_is_refused_and_a_frozen_one_is_used(make_trainer, sd_pipeline):
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), sd_pipeline.text_encoder)
    with pytest.raises(ValueError, match="`text_encoder`"):
        make_trainer(sd_pipeline)
    sd_pipeline.text_encoder.requires_grad_(False)
    make_trainer(sd_pipeline)


@pytest.mark.parametrize("safeguard", ["output", "parameter"])
def test_a_run_whose_first_gradient_is_exactly_zero_says_so(make_trainer, make_pairs, caplog, safeguard):
    """Between equal scores, `smpo` prefers neither image."""
    data = make_pairs(4).map(lambda row: {"chosen_score": 1.0})
    make_trainer(train=data, loss_type="smpo", safeguard=safeguard, logging_steps=2, max_steps=3).train()
    said = [record.message for record in caplog.records if "exactly 0" in record.message]
    assert len(said) == 1 and "smpo" in said[0] and safeguard in said[0]


@pytest.mark.parametrize(
    "settings", [{"peft_config": LoraConfig(r=4)}, {"loss_type": "apo_down", "safeguard": "none"}]
)
def test_a_run_whose_gradient_is_not_zero_does_not(make_trainer, caplog, settings):
    """B of a new LoRA is 0, and the winner's part of `apo_down` is 0 before the first step."""
    make_trainer(**settings, max_steps=1).train()
    assert "exactly 0" not in caplog.text


def test_a_second_lora_on_top_of_one_is_refused(make_trainer, sd_pipeline):
    sd_pipeline.unet.add_adapter(LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match="already has the adapter 'default'"):
        make_trainer(sd_pipeline, peft_config=LoraConfig())


def test_loading_options_without_loading_are_refused(make_trainer, sd_pipeline):
    with pytest.raises(ValueError, match="`model_init_kwargs`"):
        make_trainer(sd_pipeline, model_init_kwargs={"revision": "main"})


def test_a_quantized_base_needs_lora(make_trainer, sd_folder, make_args, make_pairs):
    with pytest.raises(ValueError, match="`quantization_config`"):
        DiffusionSDPOTrainer(sd_folder, None, make_args(), make_pairs(), quantization_config=object())


def test_a_loss_that_reads_scores_needs_the_columns(make_trainer, make_pairs):
    bare = make_pairs().remove_columns(["chosen_score", "rejected_score"])
    with pytest.raises(ValueError, match="`chosen_score`"):
        make_trainer(train=bare, loss_type="smpo")
    make_trainer(loss_type="smpo").train()


def test_the_users_arguments_stay_as_they_were(sd_folder, make_args, make_pairs):
    args = make_args(learning_rate=None)
    trainer = DiffusionSDPOTrainer(sd_folder, None, args, make_pairs())
    assert args.beta is None and args.safeguard is None and args.learning_rate is None and args.resolution is None
    assert (trainer.args.beta, trainer.args.safeguard, trainer.args.resolution) == (5000.0, "parameter", [16, 16])
    assert trainer.args.learning_rate == 2e-6


def test_a_quantization_of_transformers_becomes_one_of_diffusers():
    """TRL's `get_quantization_config` gives transformers' class, which diffusers' loaders do not know."""
    from diffusers import BitsAndBytesConfig
    from transformers import BitsAndBytesConfig as TransformersConfig

    from trl_diffusion_sdpo.models.loading import diffusers_quantization

    given = TransformersConfig(load_in_8bit=True, llm_int8_threshold=5.0, bnb_4bit_compute_dtype="bfloat16")
    ours = diffusers_quantization(given)
    assert isinstance(ours, BitsAndBytesConfig)
    assert ours.load_in_8bit and ours.llm_int8_threshold == 5.0 and ours.bnb_4bit_compute_dtype == torch.bfloat16
    assert diffusers_quantization(ours) is ours


def test_an_adapter_that_acts_with_another_weight_or_not_at_all_is_refused(make_trainer, sd_pipeline):
    sd_pipeline.unet.add_adapter(LoraConfig(target_modules=["to_q"], init_lora_weights=False), "mine")
    sd_pipeline.unet.set_adapters(["mine"], [0.5])
    with pytest.raises(ValueError, match="must have weight 1, got 0.5"):
        make_trainer(sd_pipeline)
    sd_pipeline.unet.set_adapters(["mine"], [1.0])
    sd_pipeline.unet.disable_adapters()
    with pytest.raises(ValueError, match="adapters are off"):
        make_trainer(sd_pipeline)
    sd_pipeline.unet.enable_adapters()
    make_trainer(sd_pipeline)


def test_a_pipeline_beside_a_pipeline_is_refused(make_trainer, sd_pipeline, sd_folder):
    with pytest.raises(ValueError, match="`processing_class`"):
        make_trainer(sd_folder, processing_class=sd_pipeline)


def test_arguments_and_models_of_the_wrong_kind_are_named(sd_folder, make_args, make_pairs):
    with pytest.raises(ValueError, match="`args`"):
        DiffusionSDPOTrainer(sd_folder, None, {"beta": 1.0}, make_pairs())
    with pytest.raises(ValueError, match="`model`"):
        DiffusionSDPOTrainer(None, None, make_args(), make_pairs())


def test_rows_without_a_score_are_bad_only_where_scores_are_read(make_trainer):
    rows = [
        {"prompt": "a", "chosen": image(), "rejected": image(9), "chosen_score": score, "rejected_score": 0.0}
        for score in (1.0, None, 2.0)
    ]
    assert len(make_trainer(train=rows).train_dataset) == 3
    assert len(make_trainer(train=rows, loss_type="smpo").train_dataset) == 2


HALF = {"model_init_kwargs": {"dtype": "bfloat16"}}
# LoRA that does not start at zero: the reference is the base without it, which would not be the policy before training.
REFUSED = [
    ({"bf16": True, **HALF}, "Full tuning needs float32"),
    ({"peft_config": LoraConfig(), **HALF}, "`bf16=True`"),
    ({"model_init_kwargs": {"dtype": "int8"}}, "`dtype`"),
    ({"save_full_pipeline": True, "peft_config": LoraConfig()}, "`save_full_pipeline=True`"),
    ({"resolution": 17}, "`resolution`"),
    ({"resolution": 20, "sample_prompts": ["a cat"]}, "`resolution`"),
    ({"peft_config": LoHaConfig(target_modules=["to_q"])}, "must be a `peft.LoraConfig`, got LoHaConfig"),
    ({"peft_config": LoraConfig(target_modules=["to_q"], modules_to_save=["conv_in"])}, "modules_to_save"),
    ({"peft_config": LoraConfig(target_modules=["nothing_like_this"])}, "nothing_like_this"),
    ({"peft_config": LoraConfig(init_lora_weights="pissa")}, "`init_lora_weights`"),
    ({"peft_config": LoraConfig(init_lora_weights=False)}, "`init_lora_weights`"),
    ({"peft_config": LoraConfig(bias="lora_only")}, "`bias`"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_settings_that_do_not_go_with_the_model_are_refused(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings)


@pytest.mark.parametrize(("loss_type", "warns"), [("simpo", True), ("sigmoid", False)])
def test_a_reference_that_the_loss_does_not_read_is_said_to_be_idle(make_trainer, sd_folder, caplog, loss_type, warns):
    make_trainer(ref_model=sd_folder, loss_type=loss_type)
    assert any("`ref_model`" in record.message for record in caplog.records) == warns

"""Features of transformers' Trainer work with a diffusers model."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from trl_diffusion_sdpo.models import denoiser_wrapper


def final_weights(trainer) -> torch.Tensor:
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.denoiser.parameters() if p.requires_grad])


def test_every_step_logs_the_metrics_by_their_names(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert set(trainer.state.log_history[0]) == {
        *("loss", "grad_norm", "learning_rate", "epoch", "step"),
        *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
        *("errors/winner", "errors/loser", "errors/winner_change", "errors/loser_change"),
        *("safeguard/scale", "safeguard/active", "safeguard/cosine"),
        *("safeguard/scale_output", "safeguard/opposed", "safeguard/skipped"),
    }


def test_logged_metrics_are_means_over_all_pairs_since_the_last_log(make_trainer):
    def logged(**more):
        trainer = make_trainer(max_steps=4, optim="sgd", learning_rate=0.0, **more)
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    each, together = logged(logging_steps=1), logged(logging_steps=4)
    for name in ("loss", "errors/winner", "safeguard/cosine"):
        assert together[0][name] == pytest.approx(np.mean([entry[name] for entry in each]), rel=1e-5)


def test_evaluation_weighs_pairs_alike_whatever_the_batch(make_trainer, make_pairs):
    pairs = make_pairs(6, seed=1)
    values = [make_trainer(eval_dataset=pairs, per_device_eval_batch_size=size).evaluate() for size in (1, 4, 6)]
    for name in ("eval_loss", "eval_errors/winner", "eval_errors/loser"):
        assert [value[name] for value in values] == pytest.approx([values[0][name]] * 3, rel=1e-5)


def test_compute_metrics_receives_the_rewards_of_every_pair(make_trainer, make_pairs):
    seen = {}

    def compute_metrics(prediction):
        seen["predictions"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"share": float((prediction.predictions[:, 0] > prediction.predictions[:, 1]).mean())}

    trainer = make_trainer(eval_dataset=make_pairs(6, seed=1), compute_metrics=compute_metrics, max_steps=3)
    trainer.train()
    metrics = trainer.evaluate()
    assert seen["predictions"].shape == (6, 2) and seen["labels"].shape == (6,)
    assert metrics["eval_share"] == pytest.approx(metrics["eval_rewards/accuracies"])
    assert seen["predictions"][:, 0].mean() == pytest.approx(metrics["eval_rewards/chosen"], rel=1e-4)


def test_the_best_checkpoint_is_loaded_at_the_end(make_trainer, make_pairs):
    trainer = make_trainer(
        eval_dataset=make_pairs(4, seed=1),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_errors/winner",
        greater_is_better=False,
        peft_config=LoraConfig(r=4),
    )
    trainer.train()
    best = min(entry["eval_errors/winner"] for entry in trainer.state.log_history if "eval_errors/winner" in entry)
    assert trainer.state.best_metric == best
    assert trainer.evaluate()["eval_errors/winner"] == pytest.approx(best, rel=1e-6)


def test_activation_checkpointing_changes_nothing_but_memory(make_trainer):
    peft_config, settings = LoraConfig(r=4), {"use_reentrant": False, "preserve_rng_state": False}
    plain = final_weights(make_trainer(peft_config=peft_config))
    trainer = make_trainer(
        peft_config=peft_config, activation_checkpointing=True, activation_checkpointing_kwargs=settings
    )
    torch.testing.assert_close(final_weights(trainer), plain, rtol=1e-4, atol=1e-5)
    assert any(getattr(m, "gradient_checkpointing", False) for m in trainer.denoiser.modules())


def test_checkpointing_every_second_block_gives_the_bits_of_checkpointing_all(make_trainer, monkeypatch):
    checkpointed = []
    original = denoiser_wrapper._checkpoint

    def counting(settings, block, *args):
        checkpointed.append(block)
        return original(settings, block, *args)

    monkeypatch.setattr(denoiser_wrapper, "_checkpoint", counting)
    weights, blocks = [], []
    for every in (1, 2):
        settings = {"use_reentrant": False, "every_n_layers": every}
        trainer = make_trainer(activation_checkpointing=True, activation_checkpointing_kwargs=settings)
        weights.append(final_weights(trainer))
        blocks.append(len(set(checkpointed)))
        checkpointed.clear()
    assert torch.equal(*weights)
    assert blocks[1] == (blocks[0] + 1) // 2


def test_evaluating_the_training_data_leaves_the_epoch_and_its_draws_alone(make_trainer, make_pairs):
    pairs = make_pairs(8)

    class Evaluate(TrainerCallback):
        seen = ()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                self.seen = (trainer.evaluate(trainer.train_dataset), trainer.evaluate(pairs))

    plain = final_weights(make_trainer(train=pairs, max_steps=6, proportion_empty_prompts=0.5))
    evaluate = Evaluate()
    trainer = make_trainer(train=pairs, max_steps=6, proportion_empty_prompts=0.5, callbacks=[evaluate])
    assert torch.equal(final_weights(trainer), plain)
    prepared, raw = evaluate.seen
    assert prepared["eval_errors/winner"] == raw["eval_errors/winner"]


def test_the_users_pipeline_is_not_rounded(make_trainer, sd_pipeline, tmp_path):
    trainer = make_trainer(sd_pipeline, bf16=True, max_steps=1, save_full_pipeline=True)
    trainer.train()
    assert sd_pipeline.text_encoder.dtype == torch.float32
    assert trainer.family.pipeline.text_encoder.dtype == torch.bfloat16
    trainer.save_model()
    fresh = type(sd_pipeline).from_pretrained(tmp_path / "run")
    for ours, theirs in zip(sd_pipeline.text_encoder.parameters(), fresh.text_encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    sd_pipeline("a cat", num_inference_steps=1, output_type="latent")


def test_a_given_reference_is_not_rounded_in_place(make_trainer, make_sd_pipeline):
    given = make_sd_pipeline()
    trainer = make_trainer(ref_model=given, bf16=True, max_steps=1)
    trainer.train()
    assert given.unet.conv_in.weight.dtype == torch.float32
    assert trainer.reference.module.conv_in.weight.dtype == torch.bfloat16

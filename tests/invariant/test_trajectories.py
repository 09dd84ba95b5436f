"""One trajectory, however pairs are batched, and whether or not the run was interrupted."""

import pytest
import torch
from peft import LoraConfig


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.denoiser.named_parameters() if p.requires_grad}


def curves(trainer) -> list[dict]:
    timeless = ("runtime", "per_second", "flos")
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in timeless)}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize(("tuning", "safeguard"), [("full", "output"), ("lora", "none")])
def test_eight_single_pairs_accumulated_walk_like_one_batch_of_eight(make_trainer, make_args, tuning, safeguard):
    def run(batch, accumulation, **more):
        trainer = make_trainer(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1e-5,
            max_grad_norm=0.0,
            max_steps=3,
            beta=100.0,
            safeguard=safeguard,
            safeguard_kwargs={"granularity": "pair"} if safeguard == "output" else {},
            proportion_empty_prompts=0.5,
            random_crop=True,
            noise_offset=0.1,
            timestep_weighting="min_snr",
            peft_config=LoraConfig(r=4) if tuning == "lora" else None,
            **more,
        )
        start = weights(trainer)
        trainer.train()
        return start, weights(trainer), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    start, single, single_losses = run(1, 8)
    _, batched, batched_losses = run(8, 1)

    assert single_losses == pytest.approx(batched_losses, rel=1e-5)
    moved = torch.cat([(single[name] - start[name]).flatten() for name in start])
    apart = torch.cat([(single[name] - batched[name]).flatten() for name in start])
    assert moved.norm() > 0
    assert apart.norm() < 1e-3 * moved.norm()


def test_dataloader_workers_change_nothing(make_trainer):
    runs = []
    for workers in (0, 2):
        trainer = make_trainer(
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
            max_steps=10,
            random_crop=True,
            proportion_empty_prompts=0.5,
        )
        trainer.train()
        runs.append(curves(trainer))
    assert runs[0] == runs[1]


def test_an_epoch_brings_new_draws(make_trainer, make_pairs):
    """Two pairs in one batch, SGD at rate 0: only the draws can change the errors."""
    trainer = make_trainer(
        train=make_pairs(2), per_device_train_batch_size=2, max_steps=3, optim="sgd", learning_rate=0.0
    )
    trainer.train()
    errors = [entry["errors/winner"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(set(errors)) == 3


@pytest.mark.parametrize("settings", [{}, {"sync_ref_model": True, "ref_model_sync_steps": 2}], ids=["", "synced"])
def test_a_resumed_run_equals_one_that_never_stopped(make_trainer, tmp_path, settings):
    def make(folder, **more):
        settings_of_both = {"max_steps": 8, "random_crop": True, "beta": 50.0, **settings}
        return make_trainer(output_dir=str(tmp_path / folder), **settings_of_both, **more)

    whole = make("whole", save_strategy="steps", save_steps=5)
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert curves(resumed)[5:8] == curves(whole)[5:8]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


def test_a_stream_resumes_across_its_end(make_trainer, make_pairs, tmp_path):
    def make(folder, **more):
        stream = make_pairs(6).to_iterable_dataset()
        return make_trainer(output_dir=str(tmp_path / folder), train=stream, max_steps=6, **more)

    whole = make("whole", save_strategy="steps", save_steps=4)
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert len([entry for entry in curves(whole) if "loss" in entry]) == 6
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


def test_evaluation_repeats_itself_and_is_not_touched_by_training_draws(make_trainer, make_pairs):
    trainer = make_trainer(eval_dataset=make_pairs(6, seed=1), max_steps=2, optim="sgd", learning_rate=0.0)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    kept = [name for name in before if "/" in name or name == "eval_loss"]
    assert len(kept) > 8
    assert {name: before[name] for name in kept} == {name: after[name] for name in kept}

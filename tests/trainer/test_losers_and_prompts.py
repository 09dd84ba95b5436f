"""Permuted losers and a prompt for each image: what the denoiser gets, what is precomputed, and what is refused."""

from pathlib import Path

import pytest
import torch

from trl_diffusion_sdpo.models.pipelines import load_pipeline

TIMES = ("runtime", "per_second", "flos", "time", "memory")


def two_prompts(pairs):
    """Texts of different lengths."""
    texts = {"chosen_prompt": "red", "rejected_prompt": "longer blue"}
    pairs = pairs.remove_columns("prompt")
    for column, text in texts.items():
        pairs = pairs.add_column(column, [f"{text} {row}" for row in range(len(pairs))])
    return pairs


def captions(pairs):
    return pairs.select_columns(["prompt", "chosen"]).rename_column("chosen", "image")


def walk(trainer, **resumed):
    """Logs without times, and the weights."""
    trainer.train(**resumed)
    history = trainer.state.log_history
    logs = [{name: value for name, value in row.items() if not any(t in name for t in TIMES)} for row in history]
    return logs, torch.cat([weight.detach().flatten() for weight in trainer.denoiser.parameters()])


def assert_equal(one, other):
    assert one[0] == other[0] and torch.equal(one[1], other[1])


# ---- A prompt of each image ---------------------------------------------------------------------------------------


def denoiser_inputs(pipeline, prompt):
    """Return what SDXL's call gives its UNet, for an image of 20 x 24 resized to 16 x 19 and cropped at the centre."""
    text, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    sizes = torch.tensor([[20.0, 24.0, 0.0, 2.0, 16.0, 16.0]])
    return {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}


@pytest.mark.parametrize("precomputed", [False, True])
def test_each_image_is_predicted_with_the_pipelines_encoding_of_its_own_prompt(
    make_trainer, make_pairs, sdxl_folder, tmp_path, precomputed
):
    """One image at a time, by the pipeline's own denoiser and its own `encode_prompt`."""
    pairs = two_prompts(make_pairs(4))
    cache = {"precompute_latents": True, "precompute_dir": str(tmp_path / "cache")} if precomputed else {}
    trainer = make_trainer(sdxl_folder, train=pairs, per_device_train_batch_size=2, resolution=16, **cache)
    collated = trainer.data_collator([trainer.train_dataset[row] for row in (2, 0)])
    prompts = [pairs[column][row] for column in ("chosen_prompt", "rejected_prompt") for row in (2, 0)]
    assert collated["prompts"] == prompts
    pipeline = load_pipeline(sdxl_folder)
    with torch.no_grad():
        predictions = trainer.pair_forward.predict_pairs(trainer.model, trainer._prepare_inputs(collated))
        for image, prompt in enumerate(prompts):
            ours = predictions.policy[image : image + 1]
            at = [values[image : image + 1] for values in (predictions.batch.noisy, predictions.batch.timesteps)]
            alone = pipeline.unet(*at, **denoiser_inputs(pipeline, prompt)).sample
            torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-5)
            partners = pipeline.unet(*at, **denoiser_inputs(pipeline, prompts[(image + 2) % 4])).sample
            assert (ours - partners).abs().max() > 100 * (ours - alone).abs().max()


def test_equal_prompts_of_both_images_are_one_prompt_to_the_bit(make_trainer, make_pairs):
    plain = make_pairs(8)
    both = plain.rename_column("prompt", "chosen_prompt").add_column("rejected_prompt", plain["prompt"])
    settings = {"proportion_empty_prompts": 0.3, "optim": "sgd", "safeguard": "parameter"}
    assert_equal(walk(make_trainer(train=both, **settings)), walk(make_trainer(train=plain, **settings)))


def test_encoded_prompts_of_both_images_are_those_of_training(make_trainer, make_pairs, sd_folder, tmp_path):
    """With dropped prompts and an evaluation."""
    settings = {"proportion_empty_prompts": 0.3, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    settings |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "resolution": 16}
    runs = []
    for cache in ({}, {"precompute_latents": True, "precompute_dir": str(tmp_path / "cache")}):
        data = {"train": two_prompts(make_pairs(6)), "eval_dataset": two_prompts(make_pairs(3, seed=1))}
        runs.append(walk(make_trainer(sd_folder, **data, **cache, **settings)))
    assert_equal(*runs)


def test_two_prompts_that_depend_on_each_other_are_not_encoded_alone(
    make_trainer, make_pairs, family_folder, tmp_path
):
    cache = {"precompute_latents": True, "precompute_dir": str(tmp_path)}
    sizes = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    with pytest.raises(ValueError, match="`precompute_latents=False`") as refused:
        make_trainer(family_folder("cogview4"), train=two_prompts(make_pairs(2)), **cache, **sizes)
    assert "per_device_train_batch_size" not in str(refused.value)  # which is 1 already


# ---- Permuted losers ----------------------------------------------------------------------------------------------

PERMUTE = {"losers": "permute", "proportion_empty_prompts": 0.3, "max_steps": 6, "eval_strategy": "steps"}
PERMUTE |= {"eval_steps": 3, "beta": 500.0}


def permuted(make_trainer, make_pairs, **settings):
    """A run of three epochs of captions, and an evaluation of others, with flips."""
    data = {"train": captions(make_pairs(8)), "eval_dataset": captions(make_pairs(4, seed=1))}
    return make_trainer(**data, **{**PERMUTE, **settings})


def test_a_resumed_run_has_the_losers_of_an_undisturbed_one(make_trainer, make_pairs, tmp_path):
    """The run resumes in the middle of the second of four epochs."""
    settings = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "no"}
    whole = permuted(make_trainer, make_pairs, **settings)
    _, weights = walk(whole)
    resumed = permuted(make_trainer, make_pairs, **settings, overwrite_output_dir=True)
    _, again = walk(resumed, resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
    assert torch.equal(weights, again)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"swap_labels": True}, "`swap_labels`"),
        ({"loss_type": "smpo"}, "'smpo'"),
        ({"pair_weights": "gap"}, "`pair_weights='gap'`"),
        ({"pair_weights": "agreement"}, "`pair_weights='agreement'`"),
        ({"calibrated_scores": True, "loss_type": "sigmoid"}, "`calibrated_scores`"),
        ({"aspect_ratio_buckets": True}, "`aspect_ratio_buckets`"),
        ({"precompute_latents": True, "random_crop": True}, "`precompute_latents`"),
    ],
)
def test_settings_that_permuted_losers_cannot_act_with_are_refused(make_args, settings, said):
    with pytest.raises(ValueError, match=f"`losers='permute'`.*{said}"):
        make_args(losers="permute", **settings)


def test_permuted_losers_with_a_column_of_weights_have_the_weight_of_the_winner(make_trainer, make_pairs):
    """The mean of 0.5, 1.5, ..., 3.5 is 2."""
    data = captions(make_pairs(4)).add_column("quality", [0.5, 1.5, 2.5, 3.5])
    trainer = make_trainer(train=data, losers="permute", pair_weights="quality", per_device_train_batch_size=4)
    (batch,) = trainer.get_train_dataloader()
    found = dict(zip(batch["rows"].tolist(), batch["pair_weights"].tolist(), strict=True))
    assert found == {row: (row + 0.5) / 2 for row in range(4)}

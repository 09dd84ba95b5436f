"""Training in aspect-ratio buckets: batches of one size, true sizes for the model, evaluation, resuming, refusals."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import CASES, case

SQUARE, WIDE, HIGH = (40, 40), (24, 40), (60, 36)  # of 40 x 40, 36 x 60 and 60 x 36 at any scale
IN_CI = ("stable_diffusion", "flux")
# Resolution and step, where the pipeline's own resolution and 4 pixels leave one size, or sizes that do not fit.
SIZES = {
    "aura_flow": (24, 4),
    "qwen_image_21": (128, 32),
    **dict.fromkeys(("krea2", "qwen_image"), (32, 8)),
    **dict.fromkeys(("hunyuan_dit", "lumina2", "wan"), (96, 16)),
}


def image(size, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pairs_of(*sizes):
    rows = [
        {"prompt": f"prompt {i}", "chosen": image(size, 2 * i), "rejected": image(size, 2 * i + 1)}
        for i, size in enumerate(sizes)
    ]
    return datasets.Dataset.from_list(rows)


MIXED = (SQUARE, WIDE, SQUARE, HIGH, SQUARE, WIDE, SQUARE, SQUARE, WIDE)  # 5 square, 3 wide and 1 high


@pytest.fixture
def bucketed(make_trainer, family_folder):
    """`bucketed(name, ...)`: a trainer of a tiny pipeline, with at least a wide, a square and a high bucket."""

    def build(name="stable_diffusion", **settings):
        resolution, step = SIZES.get(name, (case(name).RESOLUTION, 4))
        settings = {
            "resolution": resolution,
            "bucket_kwargs": {"step": step},
            "aspect_ratio_buckets": True,
            **settings,
        }
        return make_trainer(family_folder(name), **settings)

    return build


def watch(trainer):
    """The keyword arguments of each forward pass of the denoiser."""
    calls = []
    trainer.denoiser.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


def shapes(trainer, dataloader=None):
    loader = trainer.get_train_dataloader() if dataloader is None else dataloader
    return [tuple(batch["pixel_values"].shape[2:]) for batch in loader]


@pytest.mark.parametrize(
    "name", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.matrix) for name in CASES]
)
def test_every_family_trains_in_two_buckets(bucketed, name):
    trainer = bucketed(name, train=pairs_of(SQUARE, WIDE), per_device_train_batch_size=1)
    (wide, square) = sorted(trainer.train_dataset.target_size(pair) for pair in range(2))
    assert wide[0] < square[0] == square[1] < wide[1] and sorted(shapes(trainer)) == [wide, square]
    trainer.train()
    first, second, *_ = trainer.state.log_history
    assert first["errors/winner_change"] == first["errors/loser_change"] == 0  # neutral in a bucket, too
    assert all(0 < entry["grad_norm"] < float("inf") for entry in (first, second))


def test_sdxl_is_conditioned_on_the_true_sizes_and_crops(bucketed):
    """Original height and width, top and left of the crop, target height and width, worked out by hand: at 16 x 16, a
    40 x 40 image is not cropped; at 12 x 20, 24 x 40 is not; at 16 x 16, 24 x 32 becomes 16 x 21, of which 2 columns
    are cropped at the left (5 / 2 is rounded to the even number)."""
    pairs = pairs_of(SQUARE, WIDE)
    pairs = datasets.Dataset.from_list([{**pairs[0], "rejected": image((24, 32), 9)}, pairs[1]])
    # In output space, one pass predicts both halves, so a call shows the sizes of both images.
    settings = {"per_device_train_batch_size": 1, "max_steps": 2, "safeguard": "output"}
    trainer = bucketed("stable_diffusion_xl", train=pairs, **settings)
    calls = watch(trainer)
    trainer.train()
    told = {tuple(call["added_cond_kwargs"]["time_ids"].flatten().tolist()) for call in calls}
    assert told == {
        (40, 40, 0, 0, 16, 16, 24, 32, 0, 2, 16, 16),
        (24, 40, 0, 0, 12, 20, 24, 40, 0, 0, 12, 20),
    }


def test_flux_shifts_its_timesteps_by_the_tokens_of_the_bucket(bucketed, monkeypatch):
    """Tokens of 4 by 4 pixels: 16 in 16 x 16, 15 in 12 x 20."""
    trainer = bucketed("flux", train=pairs_of(SQUARE, WIDE), per_device_train_batch_size=1)
    process, given = type(trainer.family.noise_process), []
    drawn = process.timesteps
    monkeypatch.setattr(
        process, "timesteps", lambda self, *args, **kw: given.append(kw["image_seq_len"]) or drawn(self, *args, **kw)
    )
    trainer.train()
    assert sorted(given) == [15, 16]


def test_sizes_that_the_model_or_the_data_cannot_have_are_refused(bucketed):
    with pytest.raises(ValueError, match="at most 32 pixels"):
        bucketed("aura_flow", resolution=32)
    with pytest.raises(ValueError, match="`step` of `bucket_kwargs`"):
        bucketed("flux", bucket_kwargs={"step": 6})
    with pytest.raises(ValueError, match="`step=64`"):
        bucketed(bucket_kwargs={"step": 64})
    with pytest.raises(ValueError, match="`aspect_ratio_buckets`"):
        bucketed(train=pairs_of(*MIXED).to_iterable_dataset())


def test_batches_have_one_size_and_epochs_their_number(bucketed):
    """5, 3 and 1 pairs in batches of 2 make 3, 2 and 1 batches; 3 pairs come twice."""
    trainer = bucketed(train=pairs_of(*MIXED), per_device_train_batch_size=2, max_steps=-1, num_train_epochs=2)
    met = [shapes(trainer) for _ in range(2)]
    assert len(met[0]) == len(trainer.get_train_dataloader()) == 6
    assert sorted(met[0]) == [(12, 20)] * 2 + [(16, 16)] * 3 + [(20, 12)]
    trainer.train()
    assert trainer.state.global_step == 12 and trainer.state.epoch == 2
    dropping = bucketed(train=pairs_of(*MIXED), per_device_train_batch_size=2, dataloader_drop_last=True)
    assert sorted(shapes(dropping)) == [(12, 20)] + [(16, 16)] * 2


def test_pairs_come_in_a_new_order_each_epoch(bucketed):
    loader, orders = bucketed(train=pairs_of(*MIXED * 3), per_device_train_batch_size=1).get_train_dataloader(), []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        orders.append([int(batch["rows"]) for batch in loader])
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == list(range(27))
    in_order = bucketed(train=pairs_of(*MIXED), per_device_train_batch_size=1, train_sampling_strategy="sequential")
    assert [int(batch["rows"]) for batch in in_order.get_train_dataloader()] == list(range(9))


def test_a_resumed_run_walks_the_same_trajectory_to_the_bit(bucketed, tmp_path):
    """Accumulation steps have several sizes. The run resumes within the second epoch of 6 batches."""
    settings = {"train": pairs_of(*MIXED), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings |= {"random_crop": True, "max_steps": 5}
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = bucketed(**settings, **saving, output_dir=str(tmp_path / "whole"))
    whole.train()
    again = bucketed(**settings, output_dir=str(tmp_path / "again"))
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    one, two = (trainer.denoiser.state_dict() for trainer in (whole, again))
    assert all(torch.equal(one[key], two[key]) for key in one)
    logged = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, again)]
    assert logged[0] == logged[1] and len(set(logged[0])) == 5


def test_an_evaluation_counts_every_pair_once(bucketed):
    """Pairs that fill up batches of 4 change nothing: the figures are those of batches of 1, which none fills up."""
    measured, seen = {}, {}
    for size in (1, 4):

        def note(predictions, size=size):
            seen[size] = predictions.predictions, predictions.label_ids
            return {}

        trainer = bucketed(
            train=pairs_of(*MIXED),
            eval_dataset=pairs_of(*MIXED),
            per_device_eval_batch_size=size,
            compute_metrics=note,
        )
        trainer.train()
        measured[size] = trainer.evaluate()
    assert len(shapes(trainer, trainer.get_eval_dataloader())) == 4  # 5, 3 and 1 pairs: 2, 1 and 1 batches
    assert seen[4][0].shape == (9, 2) and seen[4][1].shape == (9,)
    np.testing.assert_allclose(np.sort(seen[4][0], axis=0), np.sort(seen[1][0], axis=0), rtol=1e-4, atol=1e-4)
    same = [name for name in measured[1] if "errors" in name or "rewards" in name or name == "eval_loss"]
    assert len(same) > 8
    assert {name: measured[4][name] for name in same} == pytest.approx(
        {name: measured[1][name] for name in same}, rel=1e-3, abs=1e-5
    )


def test_what_is_computed_before_training_changes_no_bit(bucketed, tmp_path):
    """The runs have two epochs."""
    common = {"train": pairs_of(*MIXED[:6]), "per_device_train_batch_size": 2, "max_steps": 8}
    stored = {"precompute_latents": True, "precompute_ref_errors": True, "precompute_epochs": 8}
    stored["precompute_dir"] = str(tmp_path / "cache")
    runs = [bucketed(**common), bucketed(**common, **stored, output_dir=str(tmp_path / "stored"))]
    for trainer in runs:
        trainer.train()
    live, stored = (trainer.denoiser.state_dict() for trainer in runs)
    assert all(torch.equal(live[key], stored[key]) for key in live)


def test_an_image_of_pairs_of_several_sizes_is_encoded_at_each(bucketed, tmp_path):
    """One image wins against a square one and against a high one: it is trained at two sizes."""
    square, high = pairs_of(SQUARE, (60, 24))
    pairs = datasets.Dataset.from_list([square, {**high, "chosen": square["chosen"]}])
    trainer = bucketed(train=pairs, precompute_latents=True, precompute_dir=str(tmp_path / "cache"), random_flip=False)
    shapes = [tuple(trainer.train_dataset[pair]["moments"].shape[2:]) for pair in range(2)]
    assert shapes == [(8, 8), (10, 6)] and trainer.encoding.report.images == 4


@pytest.mark.parametrize(("strategy", "never"), [("random", "1 of 9"), ("sequential", "3 of 9")])
def test_pairs_that_no_full_batch_takes_are_counted(strategy, never, bucketed, caplog):
    """5, 3 and 1 pairs in batches of 2: the single one never trains, and without shuffling the rest of the others."""
    settings = {"train": pairs_of(*MIXED), "per_device_train_batch_size": 2, "train_sampling_strategy": strategy}
    bucketed(**settings)
    assert "dataloader_drop_last" not in caplog.text
    bucketed(**settings, dataloader_drop_last=True)
    assert f"{never} pairs" in caplog.text.split("dataloader_drop_last")[1]

"""A resumed run obeys its own arguments, names the settings that changed, and goes on at its place in the data."""

import json
import re
import shutil

import datasets
import pytest
import torch
from peft import LoraConfig

from trl_diffusion_sdpo import DiffusionSDPOTrainer
from trl_diffusion_sdpo.data.images import ImageReader


@pytest.fixture
def second(run):
    """The checkpoint of step 2 of the copied run, without the later one."""
    shutil.rmtree(run / "checkpoint-4")
    return str(run / "checkpoint-2")


def rates(trainer) -> list[float]:
    """Return the learning rates of all steps."""
    return [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]


def groups(trainer) -> list[dict]:
    return [
        {name: value for name, value in group.items() if name != "params"} for group in trainer.optimizer.param_groups
    ]


# ---- The optimizer's settings ----------------------------------------------------------------------------------------


def test_another_learning_rate_applies_from_the_next_step(build, second, caplog):
    resumed = build(4, learning_rate=1e-5)
    resumed.train(resume_from_checkpoint=second)
    assert rates(resumed) == [1e-3, 1e-3, 1e-5, 1e-5]
    assert [group["lr"] for group in groups(resumed)] == [1e-5, 1e-5]
    assert "learning_rate was 0.001, is 1e-05" in caplog.text


def test_another_schedule_goes_on_at_its_own_place(build, second):
    """The checkpoint's schedule is constant. After step 2 the run continues linearly from 1e-2 over 5 steps."""
    resumed = build(5, learning_rate=1e-2, lr_scheduler_type="linear")
    resumed.train(resume_from_checkpoint=second)
    assert rates(resumed)[2:] == pytest.approx([1e-2 * (1 - step / 5) for step in range(2, 5)])


def test_weight_decay_betas_and_epsilon_are_this_run_s(build, second, caplog):
    resumed = build(3, weight_decay=0.5, adam_beta1=0.7, adam_beta2=0.8, adam_epsilon=1e-3)
    resumed.train(resume_from_checkpoint=second)
    assert [(group["weight_decay"], tuple(group["betas"]), group["eps"]) for group in groups(resumed)] == [
        (0.5, (0.7, 0.8), 1e-3),
        (0.0, (0.7, 0.8), 1e-3),
    ]
    for name in ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"):
        assert f"{name} was" in caplog.text


def test_the_moments_stay_those_of_the_checkpoint(build, second):
    resumed = build(3, learning_rate=1e-5, save_strategy="no")
    resumed.train(resume_from_checkpoint=second)
    assert {int(state["step"]) for state in resumed.optimizer.state.values()} == {3}


def test_the_rate_of_a_schedule_with_a_state_cannot_change(build, make_pairs):
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}
    plateau["eval_dataset"] = make_pairs(2, seed=1)
    build(2, **plateau).train()
    with pytest.raises(ValueError, match="`learning_rate`"):
        build(4, learning_rate=1e-5, **plateau).train(resume_from_checkpoint=True)


def test_another_optimizer_cannot_take_up_the_state_and_is_refused(build, run):
    before = {path.name for path in run.iterdir()}
    with pytest.raises(ValueError, match="`optim`"):
        build(4, optim="sgd").train(resume_from_checkpoint=True)
    assert {path.name for path in run.iterdir()} == before


# ---- Every setting that differs --------------------------------------------------------------------------------------


def test_every_setting_that_differs_is_named_once_and_places_are_not(build, second, caplog, tmp_path):
    changed = {"max_grad_norm": 0.3, "lr_scheduler_type": "linear", "warmup_steps": 1, "beta": 7.0, "save_steps": 3}
    elsewhere = {
        "run_name": "again",
        "overwrite_output_dir": True,
        "output_dir": str(tmp_path / "more"),
        "report_to": [],
    }
    build(5, **changed, **elsewhere).train(resume_from_checkpoint=second)
    (message,) = [text for text in caplog.messages if "beta was" in text]
    assert sorted(re.findall(r"(\w+) was", message)) == sorted([*changed, "max_steps"])


# ---- Another run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        ({"peft_config": None}, 'tuning was "lora", is "full"'),
        ({"loss_type": "sft"}, 'reference was "adapter_off", is "none"'),
        ({"peft_config": LoraConfig(r=8)}, r"lora\.r was 2, is 8"),
    ],
    ids=["tuning", "reference", "rank"],
)
def test_a_checkpoint_of_another_set_up_is_refused(build, second, settings, differs):
    with pytest.raises(ValueError, match=f"(?s){differs}"):
        build(4, **settings).train(resume_from_checkpoint=second)


def test_a_checkpoint_over_other_weights_is_refused(build, second, make_sd_pipeline):
    """If the tuned model were accepted, the frozen reference would be the tuned policy."""
    with pytest.raises(ValueError, match="weights_before_training was"):
        build(4, model=make_sd_pipeline(seed=1)).train(resume_from_checkpoint=second)


def test_another_scale_of_the_vae_and_other_weights_beside_the_denoiser_are_named(
    build, second, make_sd_pipeline, caplog
):
    changed = make_sd_pipeline()
    changed.vae.register_to_config(scaling_factor=0.5)
    with torch.no_grad():
        for weight in changed.text_encoder.parameters():
            weight.add_(1.0)
    build(3, model=make_sd_pipeline()).train(resume_from_checkpoint=second)
    assert "pipeline" not in caplog.text
    build(4, model=changed).train(resume_from_checkpoint=True)
    assert "vae.config.scaling_factor" in caplog.text and "text_encoder.weights" in caplog.text
    assert "vae.weights" not in caplog.text


def test_other_weights_of_a_given_reference_are_named(build, make_sd_pipeline, caplog):
    build(2, ref_model=make_sd_pipeline(seed=3)).train()
    build(3, ref_model=make_sd_pipeline(seed=3)).train(resume_from_checkpoint=True)
    assert "pipeline.reference" not in caplog.text
    build(4, ref_model=make_sd_pipeline(seed=4)).train(resume_from_checkpoint=True)
    assert "pipeline.reference" in caplog.text


def test_a_folder_without_a_checkpoint_is_refused(build, tmp_path):
    with pytest.raises(ValueError, match="`output_dir`"):
        build(4, output_dir=str(tmp_path / "none")).train(resume_from_checkpoint=True)
    for folder, said in ((tmp_path, "trainer_state.json"), (tmp_path / "chekpoint-4", "chekpoint-4")):
        with pytest.raises(ValueError, match=said):
            build(4).train(resume_from_checkpoint=str(folder))


# ---- The same data ---------------------------------------------------------------------------------------------------


def test_other_data_are_refused_by_name_and_can_be_begun_anew(build, run, make_pairs, caplog):
    others = {
        "pairs was 16, is 12": make_pairs(12),
        "prompts was": make_pairs().select(range(15, -1, -1)),
    }
    for message, data in others.items():
        with pytest.raises(ValueError, match=message):
            build(5, train=data).train(resume_from_checkpoint=True)
    build(5, train=make_pairs(12), ignore_data_skip=True).train(resume_from_checkpoint=True)
    assert "pairs was 16, is 12" in caplog.text


def test_other_images_under_the_same_prompts_are_named(build, run, make_pairs, caplog):
    pairs, others = make_pairs(), make_pairs(seed=5)
    changed = pairs.remove_columns("chosen").add_column("chosen", others.with_format("arrow")["chosen"].to_pylist())
    changed = changed.cast_column("chosen", datasets.Image())
    build(5).train(resume_from_checkpoint=True)
    assert "images was" not in caplog.text
    build(6, train=changed).train(resume_from_checkpoint=True)
    assert "images was" in caplog.text


def test_other_evaluation_pairs_are_named(build, make_pairs, caplog):
    build(2, eval_dataset={"held": make_pairs(4, seed=1)}).train()
    build(3, eval_dataset={"held": make_pairs(4, seed=1)}).train(resume_from_checkpoint=True)
    assert "held" not in caplog.text
    build(4, eval_dataset={"held": make_pairs(6, seed=1)}).train(resume_from_checkpoint=True)
    assert "held.pairs was 4, is 6" in caplog.text


def test_a_winner_budget_does_not_go_on_with_other_pairs_than_it_has_measured(build, make_pairs):
    budget = {"winner_budget": 0.1, "winner_budget_kwargs": {"pairs": 2, "steps": 1}}
    build(2, eval_dataset=make_pairs(4, seed=1), **budget).train()
    build(3, eval_dataset=make_pairs(4, seed=1), **budget).train(resume_from_checkpoint=True)
    for others in (make_pairs(4, seed=2), None):
        with pytest.raises(ValueError, match="`winner_budget`"):
            build(4, eval_dataset=others, **budget).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_a_version_that_knew_less_is_resumed_without_a_word(build, run, caplog):
    file = run / "checkpoint-4" / "diffusion_sdpo_setup.json"
    stored = json.loads(file.read_text())
    del stored["pipeline"], stored["train_data"]["images"]
    file.write_text(json.dumps(stored))
    build(5).train(resume_from_checkpoint=True)
    assert "pipeline" not in caplog.text and "images" not in caplog.text


def test_another_stream_is_refused(build, make_pairs):
    build(2, train=make_pairs().to_iterable_dataset()).train()
    build(3, train=make_pairs().to_iterable_dataset()).train(resume_from_checkpoint=True)
    others = {
        "shards": make_pairs().to_iterable_dataset(num_shards=2),
        "files": make_pairs(seed=1).to_iterable_dataset(),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"{name} was"):
            build(4, train=other).train(resume_from_checkpoint=True)


# ---- Where to resume, and whether anything is left ------------------------------------------------------------------


def test_a_checkpoint_named_in_the_arguments_is_gone_on_from(build, run):
    resumed = build(5, resume_from_checkpoint=str(run / "checkpoint-4"))
    resumed.train()
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5]
    newest = build(6, resume_from_checkpoint="true")  # as YAML and the command line have it
    newest.train()
    assert newest._first_step == 5
    with pytest.raises(ValueError, match="files of another run"):
        build(6, resume_from_checkpoint="true").train(resume_from_checkpoint=False)


# ---- A stream --------------------------------------------------------------------------------------------------------


@pytest.fixture
def consumed(build, make_pairs, tmp_path):
    """Return a function that trains on a shuffled stream with a damaged image and returns the prompts of each batch."""

    def train(steps, resume=None, **more):
        rows = make_pairs(10, size=(16, 16)).cast_column("chosen", datasets.Image(decode=False)).to_list()
        rows[4]["chosen"] = {"bytes": b"junk", "path": None}
        stream = datasets.Dataset.from_list(rows).to_iterable_dataset().shuffle(seed=1, buffer_size=4)
        options = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "output_dir": str(tmp_path / "s"),
        }
        trainer, seen, compute_loss = (
            build(steps, train=stream, **{**options, **more}),
            [],
            DiffusionSDPOTrainer.compute_loss,
        )
        trainer.compute_loss = lambda model, inputs, *rest, **named: (
            seen.append(inputs["prompts"]) or compute_loss(trainer, model, inputs, *rest, **named)
        )
        trainer.train(resume_from_checkpoint=resume)
        return seen

    return train


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.matrix)])
def test_a_resumed_stream_repeats_no_pair_and_decodes_nothing_twice(consumed, tmp_path, monkeypatch, caplog, workers):
    """The stream has ten pairs, one of them damaged, so the second pass begins in the third step."""
    decoded, decode = [], ImageReader.decode
    monkeypatch.setattr(
        ImageReader, "decode", lambda self, *args, **options: decoded.append(1) or decode(self, *args, **options)
    )
    undisturbed = consumed(5, dataloader_num_workers=workers, output_dir=str(tmp_path / "undisturbed"))
    in_one_run = len(decoded)
    assert consumed(3, dataloader_num_workers=workers) == undisturbed[:6]
    decoded.clear()
    assert consumed(5, "latest", dataloader_num_workers=workers) == undisturbed[6:]
    assert "decoded again" not in caplog.text
    if not workers:  # which decode elsewhere
        assert 2 * 2 * 4 <= len(decoded) < in_one_run / 2
        for file in (tmp_path / "s").rglob("stream_position_0.json"):
            file.unlink()
        consumed(6, "latest", dataloader_num_workers=0)
        assert "decoded again" in caplog.text

"""Precomputed errors of the reference give the run of a live reference, to the bit."""

import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from tiny_pipelines import case
from torch import nn

from trl_diffusion_sdpo.reporting import run_callbacks
from trl_diffusion_sdpo.step.pair_forward import PairForward

DRAWS = 2
# 16 pairs in micro-batches of 4: two steps an epoch, so that six steps take each of the two draws more than once.
SETTINGS = {
    "max_steps": 5,
    "gradient_accumulation_steps": 2,
    "random_crop": True,
    "proportion_empty_prompts": 0.5,
    "timestep_weighting": "min_snr",
    "beta": 500.0,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "ema_decay": 0.9,
}
PRECOMPUTED = {"precompute_ref_errors": True, "precompute_epochs": DRAWS}
CASES = [
    ("full", "output", {}),
    ("lora", "parameter", {}),
    *[
        pytest.param(tuning, safeguard, more, marks=pytest.mark.matrix)
        for tuning in ("full", "lora", "given")
        for safeguard in ("none", "output", "parameter")
        for more in (
            {},
            {"bf16": True, "winner_budget": 0.05, "winner_budget_kwargs": {"steps": 2}},
        )
    ],
    pytest.param("full", "output", {"loss_type": "smpo", "beta": 50.0}, marks=pytest.mark.matrix),
    pytest.param("full", "parameter", {"loss_type": "smpo", "beta": 50.0}, marks=pytest.mark.matrix),
    pytest.param("full", "parameter", {"safeguard_kwargs": {"low_memory": True}}, marks=pytest.mark.matrix),
    pytest.param("full", "output", {"precompute_latents": True, "random_crop": False}, marks=pytest.mark.matrix),
    pytest.param("lora", "output", {"precompute_latents": True, "precompute_epochs": 2}, marks=pytest.mark.matrix),
]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.denoiser.named_parameters() if p.requires_grad}


def logs(trainer) -> list[dict]:
    timeless = ("runtime", "per_second", "flos")
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in timeless)}
        for entry in trainer.state.log_history
    ]


@pytest.fixture
def counted(monkeypatch):
    """Number of pairs in each forward pass that computes errors."""
    calls, compute = [], PairForward.reference_errors

    def counting(self, model, inputs, **how):
        calls.append(len(inputs["seeds"]))
        return compute(self, model, inputs, **how)

    monkeypatch.setattr(PairForward, "reference_errors", counting)
    return calls


@pytest.fixture
def both(make_trainer, make_pairs, tmp_path, sd_folder, monkeypatch):
    """`both(tuning, **settings)`: a trained run with precomputed errors, and one with a live reference."""
    monkeypatch.setattr(run_callbacks, "plot_curves", lambda history, file: None)  # plots would take half of the time

    def train(tuning, **settings):
        given = {"peft_config": LoraConfig(r=4)} if tuning == "lora" else {}
        settings = {**SETTINGS, **settings}
        if tuning == "given":
            reference = StableDiffusionPipeline.from_pretrained(sd_folder)
            with torch.no_grad():
                for parameter in reference.unet.parameters():
                    parameter.mul_(1.001)
            given["ref_model"] = reference
        held = make_pairs(6, seed=1)
        before = make_trainer(
            output_dir=str(tmp_path / "before"), eval_dataset=held, **given, **settings, **PRECOMPUTED
        )
        live = make_trainer(output_dir=str(tmp_path / "live"), eval_dataset=held, **given, **settings)
        pairs = live.train_dataset
        pairs._options = replace(pairs._options, distinct_epochs=DRAWS)
        before.train()
        live.train()
        return before, live

    return train


@pytest.mark.parametrize(("tuning", "safeguard", "more"), CASES)
def test_the_run_is_that_with_a_live_reference_to_the_bit(both, tuning, safeguard, more):
    before, live = both(tuning, safeguard=safeguard, **more)
    assert before.reference.kind == "errors" and live.reference.kind != "errors"
    assert logs(before) == logs(live)
    ours, theirs = weights(before), weights(live)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    first = logs(before)[0]
    if tuning != "given" and "winner_change" not in more:
        assert first["errors/winner_change"] == first["errors/loser_change"] == first["rewards/margins"] == 0
    if tuning != "given" and before.args.loss_type == "sigmoid":
        assert first["loss"] == float(torch.nn.functional.softplus(torch.zeros(())))  # log 2 in float32


def denoisers(root, seen=None) -> int:
    """Return the number of UNets that an object refers to."""
    seen = set() if seen is None else seen
    if id(root) in seen or isinstance(root, (str, int, float, torch.Tensor, type, type(None))):
        return 0
    seen.add(id(root))
    count = int(type(root).__name__ == "UNet2DConditionModel")
    children = []
    if isinstance(root, nn.Module):
        children = list(root.children())
    elif isinstance(root, dict):
        children = list(root.values())
    elif isinstance(root, (list, tuple)):
        children = list(root)
    elif type(root).__module__.startswith("trl_diffusion_sdpo"):
        children = list(vars(root).values())
    return count + sum(denoisers(child, seen) for child in children)


@pytest.mark.parametrize("given", [False, True])
def test_no_reference_is_in_memory_or_in_the_step(make_trainer, sd_folder, given):
    reference = sd_folder if given else None
    live = make_trainer(ref_model=reference)
    trainer = make_trainer(ref_model=reference, precompute_ref_errors=True, max_steps=1)
    assert denoisers(live) == 2 and denoisers(trainer) == 1 + given  # a given one until its errors are computed
    passes = []
    trainer.denoiser.register_forward_hook(
        lambda module, args, kwargs, output: passes.append(output), with_kwargs=True
    )
    trainer.precompute_reference_errors()
    computed = len(passes)
    trainer.train()
    assert denoisers(trainer) == 1
    # Of four batches, and of the step, by the policy only: once to find out whether its gradients can be split.
    assert computed == (0 if given else 4) and len(passes) == computed + 2


# ---- What is computed, and when ------------------------------------------------------------------------------------


def test_a_second_run_computes_nothing_and_one_with_other_facts_computes_anew(
    make_trainer, make_sd_pipeline, make_pairs, counted, tmp_path
):
    def computed(**settings) -> int:
        counted.clear()
        given = {"precompute_ref_errors": True, "precompute_dir": str(tmp_path / "errors"), "train": make_pairs(4)}
        trainer = make_trainer(**given, **settings)
        trainer.precompute_reference_errors()
        return len(counted)

    assert computed() == 1
    assert computed() == computed(learning_rate=1e-4, beta=7.0, safeguard="none") == 0
    for fact, settings in {
        "draw_settings": {"seed": 7},
        "reference": {"ref_model": make_sd_pipeline(seed=3)},
        "noise": {"noise_offset": 0.1},
        "precision": {"bf16": True},
        "components": {"vae_dtype": "bfloat16"},
        "batch": {"safeguard": "parameter", "safeguard_kwargs": {"low_memory": True}},
    }.items():
        assert computed(**settings) == 1, fact
    assert computed(precompute_epochs=2) == computed(per_device_train_batch_size=2) == 2
    for settings in ({"resolution": 24}, {"random_crop": True}, {"proportion_empty_prompts": 0.2}):
        assert computed(**settings) == 1, settings


def test_errors_of_a_vae_with_another_scale_are_not_those_of_this_run(
    make_trainer, make_sd_pipeline, tmp_path, caplog
):
    """The policy begins as the reference, so a margin at the first step is one of stale errors."""
    caplog.set_level("INFO", "trl_diffusion_sdpo")
    for scale in (0.2, 0.4):
        pipeline = make_sd_pipeline()
        pipeline.vae.register_to_config(scaling_factor=scale)
        trainer = make_trainer(
            model=pipeline,
            precompute_ref_errors=True,
            precompute_dir=str(tmp_path / "errors"),
            output_dir=str(tmp_path / str(scale)),
            max_steps=1,
            beta=500.0,
        )
        trainer.train()
        assert logs(trainer)[0]["rewards/margins"] == 0
    assert "scaling_factor was 0.2, is 0.4" in caplog.text


def test_a_pair_that_could_not_be_read_is_left_out(make_trainer, make_pairs, counted):
    rows = [dict(row) for row in make_pairs(9)]
    rows[4]["chosen"] = {"bytes": b"no image", "path": None}
    trainer = make_trainer(train=rows, precompute_ref_errors=True, verify_images="none")
    trainer.precompute_reference_errors()
    assert [item["row"] for item in map(trainer.train_dataset.__getitem__, range(9))] == [0, 1, 2, 3, 5, 5, 6, 7, 8]
    rows[4]["chosen"] = rows[5]["chosen"]  # it can be read now
    again = make_trainer(train=rows, precompute_ref_errors=True, verify_images="none")
    errors = trainer.train_dataset._pairs.columns["ref_errors"].swapaxes(0, 1)
    again.train_dataset.set_reference_errors(errors)
    assert again.train_dataset[4]["row"] == 5 and again.train_dataset.report.undecodable == 1


def test_an_error_that_is_not_finite_is_reported_with_its_pair(make_trainer, make_sd_pipeline):
    broken = make_sd_pipeline(seed=3)
    with torch.no_grad():
        broken.unet.conv_out.bias.fill_(float("inf"))
    trainer = make_trainer(ref_model=broken, precompute_ref_errors=True)
    with pytest.raises(FloatingPointError, match=r"\[0, 1, 2, 3\] are not"):
        trainer.precompute_reference_errors()


# ---- What is refused -----------------------------------------------------------------------------------------------


def test_dropout_streams_and_other_data_are_refused(make_trainer, make_pairs, sd_pipeline):
    with pytest.raises(ValueError, match="`disable_dropout=True`"):
        make_trainer(precompute_ref_errors=True, disable_dropout=False, peft_config=LoraConfig(r=4, lora_dropout=0.1))
    with pytest.raises(ValueError, match="train data are a stream"):
        make_trainer(precompute_ref_errors=True, train=make_pairs().to_iterable_dataset())
    trainer = make_trainer(precompute_ref_errors=True, max_steps=1)
    before = trainer.evaluate(make_pairs(4, seed=5))
    assert before["eval_errors/winner_change"] == 0
    trainer.train()
    with pytest.raises(ValueError, match="`eval_dataset`"):
        trainer.evaluate(make_pairs(4, seed=6))
    assert trainer.evaluate(make_pairs(4, seed=5))["eval_errors/winner_change"] != 0


@pytest.mark.matrix
def test_prompts_that_depend_on_their_batch_are_refused_and_probed_alone(
    family_folder, make_trainer, make_pairs, tmp_path, monkeypatch
):
    given = {"model": family_folder("cogview4"), "resolution": case("cogview4").RESOLUTION, "train": make_pairs(4)}
    errors, alone = {"precompute_ref_errors": True}, {f"per_device_{kind}_batch_size": 1 for kind in ("train", "eval")}
    with pytest.raises(ValueError, match="`precompute_ref_errors=True`.*got 4"):
        make_trainer(**given, **errors).precompute_reference_errors()
    trainer = make_trainer(**given, **errors, **alone)
    trainer.precompute_reference_errors()
    assert "ref_errors" in trainer.train_dataset[0]
    budget = {"winner_budget": 0.1, "winner_budget_kwargs": {"pairs": 3}}
    cached = {"precompute_latents": True, "precompute_dir": str(tmp_path)}
    sizes = [
        [len(part.inputs["rows"]) for part in make_trainer(**given, **alone, **budget, **more)._load_probe()]
        for more in (cached, {})
    ]
    assert sizes == [[1, 1, 1], [2, 1]]


@pytest.mark.matrix
def test_a_resumed_run_equals_one_that_never_stopped(make_trainer, tmp_path):
    def make(folder, steps, **more):
        return make_trainer(
            output_dir=str(tmp_path / folder), max_steps=steps, **PRECOMPUTED, random_crop=True, **more
        )

    whole = make("whole", 6)
    whole.train()
    make("cut", 3, save_strategy="steps", save_steps=3).train()
    resumed = make("cut", 6)
    resumed.train(resume_from_checkpoint=True)
    assert logs(resumed)[3:6] == logs(whole)[3:6]
    assert all(torch.equal(weights(resumed)[name], tensor) for name, tensor in weights(whole).items())
    with pytest.raises(ValueError, match="reference was 'errors', is 'frozen'"):
        make_trainer(output_dir=str(tmp_path / "cut"), max_steps=7).train(resume_from_checkpoint=True)


KILLED = """
import sys
import datasets
from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer
from trl_diffusion_sdpo.cache import reference_errors

model, data, output = sys.argv[1:]
reference_errors.SHARD_PAIRS = 2
args = DiffusionSDPOConfig(
    output, per_device_train_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True, seed=5,
    precompute_ref_errors=True, precompute_dir=output, precompute_epochs=8, dataloader_num_workers=0,
)
trainer = DiffusionSDPOTrainer(model, None, args, datasets.load_from_disk(data))
print("begins", flush=True)
trainer.precompute_reference_errors()
print("done", flush=True)
"""


@pytest.mark.matrix
def test_a_killed_computation_goes_on_and_ends_as_an_undisturbed_one(sd_folder, make_pairs, tmp_path):
    make_pairs().save_to_disk(str(tmp_path / "pairs"))
    folders = {name: tmp_path / name for name in ("killed", "whole")}

    def start(name):
        command = [sys.executable, "-c", KILLED, sd_folder, str(tmp_path / "pairs"), str(folders[name])]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def shards(name):
        return sorted((folders[name] / "reference_errors").glob("*/*.safetensors"))

    for count in (3, 20):
        process = start("killed")
        while len(shards("killed")) < count:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert count <= len(shards("killed")) < 64
    before = {path: path.stat().st_mtime_ns for path in shards("killed")}
    runs = [start("killed"), start("whole")]
    assert all("done" in run.communicate()[0] for run in runs)
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    stores = [[path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))] for folder in folders.values()]
    assert len(stores[0]) == 64 and stores[0] == stores[1]


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [
        ({"num_train_epochs": 10, "max_steps": -1}, "10 epochs"),
        ({"max_steps": 12, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, "6 epochs"),
        ({"num_train_epochs": 2, "max_steps": -1}, None),
    ],
)
def test_noise_that_repeats_in_later_epochs_is_said(settings, epochs, make_trainer, make_pairs, tmp_path, caplog):
    stored = {"precompute_ref_errors": True, "precompute_epochs": 2, "precompute_dir": str(tmp_path / "cache")}
    make_trainer(train=make_pairs(8), **settings, **stored)
    said = [record.getMessage() for record in caplog.records if "`precompute_epochs=2`" in record.getMessage()]
    assert len(said) == (epochs is not None) and all(epochs in message for message in said)

"""`push_to_hub` through the real client, against a server on this machine that speaks the Hub's protocol."""

import datetime
import json
import logging
import multiprocessing
import re
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from peft import LoraConfig

from trl_diffusion_sdpo.reporting import run_callbacks
from trl_diffusion_sdpo.saving.publishing import Publisher, PublishingError

LORA = {"peft_config": LoraConfig(r=4), "hub_model_id": "tester/run"}
EACH_STEP = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
PUSHES = {"push_to_hub": True, "hub_always_push": True}


def files_of(hub_server, repo="tester/run"):
    return hub_server.repos[repo].files


def test_a_lora_is_published_with_its_card_and_loads_back(make_trainer, hub_server, sd_folder, tmp_path):
    trainer = make_trainer(sample_prompts=["a cat"], sample_kwargs={"num_inference_steps": 2}, max_steps=2, **LORA)
    trainer.train()
    trainer.push_to_hub(dataset_name="tester/pairs", tags=["mine"])

    files = files_of(hub_server)
    assert {"README.md", "pytorch_lora_weights.safetensors", "samples/step-000002-0.png"} <= set(files)
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "diffusers"
    assert {"mine", "trl-diffusion-sdpo", "lora"} <= set(card.data.tags)
    assert card.data.datasets in ("tester/pairs", ["tester/pairs"])
    assert "2511.03317" in card.text and "`max_steps`" in card.text and "load_lora_weights" in card.text
    shown = re.findall(r"!\[[^]]*\]\((.*?)\)", card.text)
    assert shown == ["samples/step-000000-0.png", "samples/step-000002-0.png"] and set(shown) <= set(files)

    (tmp_path / "got").mkdir()
    (tmp_path / "got" / "pytorch_lora_weights.safetensors").write_bytes(files["pytorch_lora_weights.safetensors"])
    DiffusionPipeline.from_pretrained(sd_folder).load_lora_weights(str(tmp_path / "got"))


def test_neither_token_nor_pickle_nor_checkpoint_nor_local_folder_is_published(
    make_trainer, hub_server, sd_folder, tmp_path
):
    trainer = make_trainer(hub_model_id="tester/run", hub_token=hub_server.token, **EACH_STEP)
    trainer.train()
    trainer.push_to_hub()
    files = files_of(hub_server)
    assert "unet/diffusion_pytorch_model.safetensors" in files and "trainer_state.json" not in files
    assert not [name for name in files if name.startswith("checkpoint-") or name.endswith((".bin", ".pt", ".pth"))]
    for name, content in files.items():
        assert hub_server.token.encode() not in content, name
        assert str(tmp_path).encode() not in content and sd_folder.encode() not in content, name


@pytest.mark.parametrize("strategy", ["checkpoint", pytest.param("all_checkpoints", marks=pytest.mark.matrix)])
def test_training_publishes_as_it_goes(make_trainer, hub_server, strategy):
    make_trainer(hub_strategy=strategy, **PUSHES, **EACH_STEP, **LORA).train()
    files = set(files_of(hub_server))
    assert {"README.md", "pytorch_lora_weights.safetensors"} <= files
    folder = {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-1"}[strategy]
    assert f"{folder}/trainer_state.json" in files and f"{folder}/optimizer.pt" in files


def test_a_published_checkpoint_is_downloaded_and_resumed(make_trainer, hub_server, tmp_path):
    make_trainer(push_to_hub=True, hub_strategy="checkpoint", **{**EACH_STEP, "max_steps": 1}, **LORA).train()
    got = huggingface_hub.snapshot_download(
        "tester/run", allow_patterns="last-checkpoint/*", local_dir=tmp_path / "got"
    )
    assert not (tmp_path / "got" / "last-checkpoint" / "training_args.json").exists()
    resumed = make_trainer(max_steps=2, output_dir=str(tmp_path / "other"), **LORA)
    resumed.train(resume_from_checkpoint=f"{got}/last-checkpoint")
    assert resumed._first_step == 1 and resumed.state.global_step == 2


ENDPOINTS = {
    "create": "POST /api/repos/create",
    "upload": "PUT /lfs/",
    "commit": "POST /api/models/.*/commit/",
}


@pytest.mark.parametrize("endpoint", [pytest.param("create", marks=pytest.mark.matrix), "commit"])
def test_what_cannot_be_published_is_safe_and_a_second_call_goes_on(make_trainer, hub_server, tmp_path, endpoint):
    trainer = make_trainer(hub_private_repo=True, **LORA)
    hub_server.failing = {ENDPOINTS[endpoint]: float("inf")}
    with pytest.raises(PublishingError) as caught:
        trainer.push_to_hub()
    message = str(caught.value)
    assert f"The weights are saved in {tmp_path / 'run'}" in message and "push_to_hub()`" in message
    assert "\n" not in message and "tester/run" in message
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()

    hub_server.failing = {}
    sent = len(hub_server.paths("PUT"))
    trainer.push_to_hub()
    assert "pytorch_lora_weights.safetensors" in files_of(hub_server)
    assert hub_server.repos["tester/run"].private
    if endpoint == "commit":
        assert len(hub_server.paths("PUT")) == sent  # the weights had arrived


def test_a_hub_that_is_away_is_reported_before_training(make_trainer, hub_server):
    hub_server.failing = {ENDPOINTS["create"]: float("inf")}
    with pytest.raises(PublishingError, match="tester/run failed: .*503.* Nothing was trained") as caught:
        make_trainer(push_to_hub=True, hub_model_id="tester/run")
    assert "\n" not in str(caught.value)


def test_an_upload_that_fails_during_training_is_logged_and_ends_nothing(make_trainer, hub_server, caplog, tmp_path):
    hub_server.failing = {ENDPOINTS["commit"]: float("inf")}
    trainer = make_trainer(hub_strategy="checkpoint", **PUSHES, **EACH_STEP, **LORA)
    trainer.train()
    assert trainer.state.global_step == 2
    warnings = [
        record.message for record in caplog.records if record.levelno == logging.WARNING
    ]  # not single attempts
    messages = [message for message in warnings if "Uploading to tester/run failed" in message]
    assert len(messages) == 4  # the weights and the checkpoint, twice
    assert all(f"saved in {tmp_path / 'run'}" in message for message in messages)
    assert any("503" in line for line in messages)  # on a busy machine the server here may also answer too late


def wait_for_the_upload_of_the_first(rank: int, folder: str) -> None:
    """Run one of two processes. Their collectives time out after two seconds, and an upload takes three."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    short = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=2))
    publisher = Publisher(SimpleNamespace())
    publisher.repository = "tester/run"
    if rank == 0:
        publisher._jobs.append(publisher._api.run_as_future(time.sleep, 3))
    publisher.wait()
    dist.all_reduce(torch.ones(1), group=short)
    dist.destroy_process_group()


@pytest.mark.matrix
def test_all_processes_wait_for_an_upload_longer_than_a_collective_may_last(tmp_path):
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=wait_for_the_upload_of_the_first, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]


def test_curves_and_state_are_of_the_whole_run_after_a_resume(make_trainer, tmp_path, monkeypatch):
    plotted = []
    monkeypatch.setattr(run_callbacks, "plot_curves", lambda history, file: plotted.append((list(history), file)))

    def curves_of(**args):
        trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=3, peft_config=LoraConfig(r=4), **args)
        trainer.train(resume_from_checkpoint=args.get("resume_from_checkpoint"))
        state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
        assert state["log_history"] == trainer.state.log_history == plotted[-1][0] and state["global_step"] == 4
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses

    losses = curves_of(learning_rate=1e-2)
    assert [len(history) for history, _ in plotted] == [3, 4, 5], "at both saves and, with the means, at the end"
    assert plotted[-1][1] == tmp_path / "run" / "curves.png"
    early = str(tmp_path / "run" / "checkpoint-3")
    again = curves_of(learning_rate=1e-2, resume_from_checkpoint=early, overwrite_output_dir=True)
    assert again == losses
    assert [entry["step"] for entry in plotted[-1][0] if "loss" in entry] == [1, 2, 3, 4]

"""Images in trackers, read back from what the trackers wrote. Weights & Biases and Trackio are no requirement of the
tests; where they are installed, both write to this machine."""

import io

import pytest
from peft import LoraConfig
from PIL import Image

PROMPT = "a red | cube"


@pytest.fixture
def tracked(make_trainer, make_pairs):
    """`tracked(tracker)`: a trainer that has generated images at steps 0, 2 and 3, and was evaluated after step 3."""

    def run(tracker):
        evaluated = {"eval_dataset": make_pairs(4, seed=5), "eval_strategy": "steps", "eval_steps": 3}
        sampled = {"sample_prompts": [PROMPT], "sample_steps": 2, "sample_inference_steps": 1}
        trainer = make_trainer(
            train=make_pairs(4), peft_config=LoraConfig(r=2), max_steps=3, report_to=tracker, **evaluated, **sampled
        )
        trainer.train()
        return trainer

    return run


def test_tensorboard_has_the_images_of_every_step(tracked, tmp_path):
    pytest.importorskip("matplotlib")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracked("tensorboard")
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    assert events.Tags()["images"] == ["samples/0", "eval/noise_bins", "verdict"]
    assert [event.step for event in events.Images("samples/0")] == [0, 2, 3]
    for event in events.Images("samples/0"):
        with Image.open(tmp_path / "run" / "samples" / f"step-{event.step:06d}-0.png") as image:
            sent = Image.open(io.BytesIO(event.encoded_image_string))
            assert sent.tobytes() == image.convert("RGB").tobytes()
    assert [event.step for event in events.Images("eval/noise_bins")] == [3]
    captions = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/0/text_summary")]
    assert captions == [PROMPT] * 3


def test_wandb_has_the_images_of_every_step(tracked, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    tracked("wandb")
    wandb.finish()
    (media,) = (tmp_path / "wandb").glob("offline-run-*/files/media/images")
    files = sorted((media / "samples").iterdir(), key=lambda file: int(file.name.split("_")[1]))
    sent = [Image.open(file).tobytes() for file in files]
    kept = [Image.open(tmp_path / "run" / "samples" / f"step-{step:06d}-0.png").tobytes() for step in (0, 2, 3)]
    assert sent == kept and len(list((media / "eval").iterdir())) == 1


def test_trackio_has_the_images_of_every_step(tracked, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import MEDIA_DIR

    trainer = tracked("trackio")
    project = trainer.args.project
    (run,) = SQLiteStorage.get_runs(project)
    logs = [entry for entry in SQLiteStorage.get_logs(project, run) if "samples/0" in entry]
    assert [entry["train/global_step"] for entry in logs] == [0, 2, 3]
    assert {entry["samples/0"]["caption"] for entry in logs} == {PROMPT}
    for entry in logs:
        kept = tmp_path / "run" / "samples" / f"step-{entry['train/global_step']:06d}-0.png"
        assert (MEDIA_DIR / entry["samples/0"]["file_path"]).read_bytes() == kept.read_bytes()

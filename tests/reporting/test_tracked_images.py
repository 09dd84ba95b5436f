"""Images in trackers, read from the files that the trackers wrote. Tests of Weights & Biases and Trackio are skipped if
these are not installed."""

import io
import struct

import pytest
from peft import LoraConfig
from PIL import Image

PROMPT = "a red | cube"


@pytest.fixture
def tracked(make_trainer, make_pairs):
    """`tracked(tracker)`: a trainer that has generated images at steps 0, 2 and 3, and was evaluated after step 3."""

    def run(tracker):
        evaluated = {"eval_dataset": make_pairs(4, seed=5), "eval_strategy": "steps", "eval_steps": 3}
        sampled = {"sample_prompts": [PROMPT], "sample_steps": 2, "sample_kwargs": {"num_inference_steps": 1}}
        trainer = make_trainer(
            train=make_pairs(4), peft_config=LoraConfig(r=2), max_steps=3, report_to=tracker, **evaluated, **sampled
        )
        trainer.train()
        return trainer

    return run


def tensorboard_values(file):
    """Step and value of each summary in an event file: records of length, checksum, content, checksum."""
    event_pb2 = pytest.importorskip("tensorboard.compat.proto.event_pb2")
    content, position = file.read_bytes(), 0
    while position < len(content):
        (length,) = struct.unpack_from("<Q", content, position)
        event = event_pb2.Event.FromString(content[position + 12 : position + 12 + length])
        yield from ((event.step, value) for value in event.summary.value)
        position += length + 16


def test_tensorboard_has_the_images_of_every_step(tracked, tmp_path):
    tracked("tensorboard")
    (file,) = (tmp_path / "run" / "runs").rglob("events.*")
    values = list(tensorboard_values(file))
    images = [(value.tag, step, value.image) for step, value in values if value.HasField("image")]
    expected = [("samples/0", 0), ("samples/0", 2), ("eval/noise_bins", 3), ("samples/0", 3)]
    assert [image[:2] for image in images] == expected
    for name, step, sent in images:
        where = f"samples/step-{step:06d}-0.png" if name == "samples/0" else f"{name.removeprefix('eval/')}.png"
        with Image.open(tmp_path / "run" / where) as image:
            read = Image.open(io.BytesIO(sent.encoded_image_string))
            assert read.tobytes() == image.convert("RGB").tobytes()
    captions = [value.tensor.string_val[0].decode() for _, value in values if value.tag.startswith("samples/0/text")]
    assert captions == [PROMPT] * 3


@pytest.mark.matrix
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


@pytest.mark.matrix
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

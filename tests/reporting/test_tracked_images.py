"""Images in TensorBoard, read from the files that it wrote."""

import io
import struct

import pytest
from peft import LoraConfig
from PIL import Image

PROMPT = "a red | cube"


def tensorboard_values(file):
    """Step and value of each summary in an event file: records of length, checksum, content, checksum."""
    event_pb2 = pytest.importorskip("tensorboard.compat.proto.event_pb2")
    content, position = file.read_bytes(), 0
    while position < len(content):
        (length,) = struct.unpack_from("<Q", content, position)
        event = event_pb2.Event.FromString(content[position + 12 : position + 12 + length])
        yield from ((event.step, value) for value in event.summary.value)
        position += length + 16


def test_tensorboard_has_the_images_of_every_step(make_trainer, make_pairs, tmp_path):
    evaluated = {"eval_dataset": make_pairs(4, seed=5), "eval_strategy": "steps", "eval_steps": 3}
    sampled = {"sample_prompts": [PROMPT], "sample_steps": 2, "sample_kwargs": {"num_inference_steps": 1}}
    settings = {"peft_config": LoraConfig(r=2), "max_steps": 3, "report_to": "tensorboard"}
    make_trainer(train=make_pairs(4), **settings, **evaluated, **sampled).train()
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

"""What all scorers share: names, functions, batches and checks of what comes out."""

import pytest
import torch
from PIL import Image

from trl_diffusion_sdpo.rewards import BatchedScorer, FunctionScorer, load_scorer, register_scorer, scorer_names

IMAGES = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (10, 20, 30)]
PROMPTS = ["a", "b", "c"]


def redness(images, prompts):
    return [image.getpixel((0, 0))[0] for image in images]


def test_a_function_is_a_scorer():
    scorer = load_scorer(f"{__name__}:redness")
    assert scorer.name == f"{__name__}:redness"
    assert scorer(IMAGES, PROMPTS).tolist() == [10.0, 20.0, 30.0]


@pytest.mark.parametrize("name", ["no_such_scorer", "no_module:function", f"{__name__}:no_function"])
def test_an_unknown_scorer_is_an_error(name):
    with pytest.raises(ValueError, match=name.rpartition(":")[2]):
        load_scorer(name)


def test_a_registered_scorer_is_found_by_its_name():
    @register_scorer("redness of a test")
    def build(factor=1):
        return FunctionScorer(
            "redness", lambda images, prompts: [factor * value for value in redness(images, prompts)]
        )

    assert "redness of a test" in scorer_names()
    scorer = load_scorer("redness of a test", factor=2)
    assert scorer(IMAGES, PROMPTS).tolist() == [20.0, 40.0, 60.0]
    assert scorer.name == "redness(factor=2)"  # other scores than those of factor 1
    with pytest.raises(ValueError, match="redness of a test"):
        register_scorer("redness of a test")


@pytest.mark.parametrize(
    ("scores", "match"),
    [
        ([1.0, 2.0], "shape"),
        ([[1.0]] * 3, "shape"),
        ([1.0, float("nan"), 2.0], "'b'"),
        (["good"] * 3, "good"),
        (None, "None"),
    ],
)
def test_a_wrong_score_is_an_error(scores, match):
    with pytest.raises(ValueError, match=match):
        FunctionScorer("broken", lambda images, prompts: scores)(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("hpsv3", {}, "hpsv3.*instruction"),
        ("vlm_server", {"url": "http://127.0.0.1:9/v1"}, "vlm_server.*model"),
        ("clip_score", {"model": "no/such/folder"}, "clip_score.*no/such/folder"),
        (f"{__name__}:redness", {"device": "cpu"}, "device.*redness"),
    ],
)
def test_a_scorer_that_cannot_be_loaded_is_an_error_with_its_name(name, settings, match):
    with pytest.raises(ValueError, match=match):
        load_scorer(name, **settings)


class Counting(BatchedScorer):
    def score_batch(self, images, prompts):
        assert all(image.mode == "RGB" for image in images)
        self.sizes = [*getattr(self, "sizes", []), len(images)]
        return torch.tensor([float(ord(prompt)) for prompt in prompts])


def test_images_are_scored_in_batches():
    scorer = Counting("counting", batch_size=2)
    assert scorer([image.convert("L") for image in IMAGES], PROMPTS).tolist() == [97.0, 98.0, 99.0]
    assert scorer.sizes == [2, 1]
    assert scorer([], []).shape == (0,)


def test_each_image_needs_a_prompt():
    with pytest.raises(ValueError, match="3 images and 2"):
        Counting("counting")(IMAGES, PROMPTS[:2])

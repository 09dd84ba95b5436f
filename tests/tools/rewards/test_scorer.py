"""What all scorers share: names, functions, batches and checks of what comes out."""

import importlib
import itertools
import json
import os
import sys

import pytest
import torch
from PIL import Image
from tiny_clip import save_clip

from trl_diffusion_sdpo.tools.rewards import BatchedScorer, FunctionScorer, load_scorer, register_scorer, scorer_names
from trl_diffusion_sdpo.tools.rewards import scorer as scorer_module
from trl_diffusion_sdpo.tools.rewards.scorer import describe_scorer, fitting, on_device, saved_scores

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
    described = [
        describe_scorer(load_scorer("redness of a test", **given)) for given in ({}, {"factor": 1}, {"factor": 2})
    ]
    assert described[0]["settings"] == {"factor": 1}  # defaults count
    assert described[2]["settings"] == {"factor": 2}
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


def test_whatever_changes_scores_changes_what_saved_scores_depend_on(tmp_path):
    """Each two of these scorers give other scores; before, they shared names."""
    models = [save_clip(tmp_path / version / "clip", seed) for seed, version in enumerate(("v1", "v2"))]
    server = {"url": "http://127.0.0.1:9/v1", "model": "org/model"}
    question = "Say {prompt}. " + 50 * "x"
    scorers = [
        *(load_scorer("clip_score", model=model) for model in models),
        *(load_scorer("clip_score", model=models[0], scale=scale) for scale in (1.5, 2.0)),
        *(load_scorer("vlm_server", **{**server, **more}) for more in ({}, {"url": "http://127.0.0.1:8/v1"})),
        *(load_scorer("vlm_server", **server, question=question + end) for end in ("a", "b")),
        load_scorer("vlm_server", **{**server, "model": "other/model"}),
    ]
    described = [describe_scorer(scorer) for scorer in scorers]
    assert all(one != other for one, other in itertools.combinations(described, 2))
    assert json.loads(json.dumps(described)) == described
    names = [scorer.name for scorer in scorers]
    assert names[4] == names[5] == names[8]  # of two servers, and of two owners on the Hub
    assert len({*names}) == len(names) - 2
    assert all(len(name) < 80 for name in names)
    speed = {"batch_size": 2, "timeout": 5.0, "max_unreadable": 0.5}
    assert describe_scorer(load_scorer("vlm_server", **server, **speed)) == described[4]


def test_a_scorer_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    branch = tmp_path / "models--org--clip" / "refs" / "main"
    branch.parent.mkdir(parents=True)

    @register_scorer("scorer of the Hub")
    def build(model="org/clip"):
        return FunctionScorer("of the Hub", redness)

    for commit in ("1" * 40, "2" * 40):
        branch.write_text(commit)
        assert describe_scorer(load_scorer("scorer of the Hub"))["sources"]["model"]["commit"] == commit


def test_a_device_that_does_not_exist_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="`device`.*gpu"), on_device(FunctionScorer("red", redness), "gpu"):
        pass


class Weighted(BatchedScorer):
    """A scorer with a network of so many bytes, and another in a scorer of its own."""

    def __init__(self, name, inner, outer=0):
        super().__init__(name)
        self.network = torch.nn.Linear(inner // 4, 1, bias=False)
        self.network.register_buffer("mean", torch.zeros(2, dtype=torch.bfloat16))  # 4 bytes
        if outer:
            self.inside = Weighted("inside", outer)

    def score_batch(self, images, prompts):
        return torch.zeros(len(images))


@pytest.mark.parametrize(
    ("free", "groups"), [(1000, [[0, 1, 2, 3]]), (500, [[0, 1, 2], [3]]), (300, [[0], [1, 2], [3]])]
)
def test_scorers_share_a_device_while_their_weights_take_half_of_its_memory(free, groups, monkeypatch, caplog):
    """They take 164, 84, nothing and 84 bytes."""
    caplog.set_level("INFO")
    monkeypatch.setattr(scorer_module, "_free_bytes", lambda device: free)
    scorers = [Weighted("a", 80, 76), Weighted("b", 80), FunctionScorer("red", redness), Weighted("c", 80)]
    assert [scorer.weight_bytes() for scorer in scorers if isinstance(scorer, Weighted)] == [164, 84, 84]
    assert fitting(scorers, "meta") == groups
    assert len(caplog.records) == (len(groups) > 1)
    assert fitting(scorers, "cpu") == [[0, 1, 2, 3]]  # where they are already
    assert fitting([], "meta") == [[]]


def test_a_changed_function_is_another_scorer(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "own_scores.py"
    described = []
    for value in (1, 22):
        file.write_text(f"def score(images, prompts):\n    return [{value}] * len(images)\n")
        sys.modules.pop("own_scores", None)
        importlib.invalidate_caches()
        described.append(describe_scorer(load_scorer("own_scores:score")))
    assert described[0]["name"] == described[1]["name"] and described[0] != described[1]
    assert os.path.basename(next(iter(described[0]["code"]["file"]))) == "own_scores.py"


def test_a_password_of_a_setting_is_not_written(tmp_path):
    @register_scorer("scorer with a password")
    def build(password=""):
        return FunctionScorer("with a password", redness)

    described = describe_scorer(load_scorer("scorer with a password", password="hunter2-hunter2"))
    assert "hunter2" not in json.dumps(described)


def test_saved_scores_of_another_scorer_stay_and_are_told(tmp_path, caplog):
    caplog.set_level("INFO")
    scorers = [load_scorer("vlm_server", url=f"http://127.0.0.1:{port}/v1", model="m") for port in (8, 9)]
    paths = [saved_scores(tmp_path, scorer) for scorer in (*scorers, scorers[0])]
    assert paths[0] == paths[2] != paths[1]
    assert "127.0.0.1:8" in caplog.text and "127.0.0.1:9" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize(("dtype", "match"), [("bfloat16", None), ("int7", "int7")])
def test_the_dtype_of_a_scorer_may_be_text(dtype, match, tmp_path):
    folder = save_clip(tmp_path / "clip")
    if match is None:
        assert load_scorer("clip_score", model=folder, dtype=dtype).model.dtype == torch.bfloat16
        return
    with pytest.raises(ValueError, match=match):
        load_scorer("clip_score", model=folder, dtype=dtype)

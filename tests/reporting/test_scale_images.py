"""The images of a sweep on disk: which are there, which are made anew, and whose scores are known."""

import json

import numpy as np
import pytest
from PIL import Image

from trl_diffusion_sdpo.reporting.scale_images import Cell, ScaleImages, draw_grid

MADE = {"weights": "abc", "guidance_scale": 5.0, "steps": 30}
PROMPTS = ["a dog", "a cat"]


def images_in(folder, *, prompts=PROMPTS, seed=3, scales=(0.0, 1.0, 2.0), **made):
    found = ScaleImages(folder, {**MADE, **made}, prompts, seed)
    found.add_scales(scales)
    return found


def grey(value):
    return Image.new("RGB", (4, 6), (value, value, value))


@pytest.fixture
def made(tmp_path):
    """All images of three scales and two prompts, scored by the red of their first pixel."""
    images = images_in(tmp_path)
    for (form, scale), indices in images.missing().items():
        for index in indices:
            images.save(Cell(form, scale, index), grey(int(10 * scale + index + (100 if form == "prediction" else 0))))
    images.write_index()
    images.score("red", red, lambda count: None)
    return images


def red(images, prompts):
    return np.array([image.getpixel((0, 0))[0] for image in images])


def test_each_image_is_made_once_and_guidance_by_0_and_1_is_that_of_the_weights(tmp_path, made):
    names = sorted(file.name for file in (tmp_path / "images").iterdir())
    at = ["prediction-2-0", "weights-0-0", "weights-1-0", "weights-2-0"]
    assert names == [f"{name}{index}.png" for name in at for index in (0, 1)]
    assert made.missing() == {} and images_in(tmp_path).missing() == {}
    assert made.scores("red") == {
        "weights": {0.0: [0.0, 1.0], 1.0: [10.0, 11.0], 2.0: [20.0, 21.0]},
        "prediction": {0.0: [0.0, 1.0], 1.0: [10.0, 11.0], 2.0: [120.0, 121.0]},
    }


@pytest.mark.parametrize(
    "change",
    [{"guidance_scale": None}, {"steps": 20}, {"weights": "other"}, {"seed": 4}, {"prompts": ["a bird", "a fish"]}],
    ids=lambda change: next(iter(change)),
)
def test_another_setting_makes_all_anew(tmp_path, made, change):
    other = images_in(tmp_path, **change)
    assert sum(map(len, other.missing().values())) == 8 and other.scores("red") == {}


def test_what_is_there_is_kept(tmp_path, made):
    longer = images_in(tmp_path, prompts=[*PROMPTS, "a bird"])
    assert set(map(tuple, longer.missing().values())) == {(2,)}
    (tmp_path / "images" / "weights-1-01.png").write_bytes(b"\x89PNG cut off")
    assert images_in(tmp_path).missing() == {("weights", 1.0): [1]}
    assert images_in(tmp_path, scales=[4.0]).add_scales([]) == [0.0, 1.0, 2.0, 4.0]  # with those of earlier calls


def test_only_images_without_a_score_are_scored(tmp_path, made):
    def never(images, prompts):
        raise AssertionError("all have scores")

    again = images_in(tmp_path)
    again.score("red", never, lambda count: None)
    assert again.scores("red") == made.scores("red") and again.scores(None) == {}
    index = json.loads((tmp_path / "images.json").read_text())
    assert index["settings"] == {**MADE, "prompts": PROMPTS, "seed": 3} and index["scales"] == [0.0, 1.0, 2.0]


def test_an_image_says_how_it_was_made(tmp_path, made):
    with Image.open(tmp_path / "images" / "prediction-2-01.png") as image:
        assert (image.info["prompt"], image.info["seed"]) == ("a cat", "4")
        assert json.loads(image.info["scale_sweep"])["guidance_scale"] == 5.0


def test_a_grid_has_a_column_for_each_scale_and_a_row_for_each_prompt(tmp_path, made, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    heads, scores = {1.0: "winners +1.00% ± 0.10%"}, made.scores("red")["weights"]
    draw_grid(made, "weights", [0.0, 1.0, 2.0], tmp_path / "grid.png", heads=heads, scores=scores)
    panels = np.array(drawn[0].axes).reshape(2, 3)
    assert [axes.get_title() for axes in panels[0]] == [
        "base\nscore 0.5 ± 0.5",
        "1 (tuned)\nwinners +1.00% ± 0.10%\nscore 10.5 ± 0.5",
        "2\nscore 20.5 ± 0.5",
    ]
    assert [axes.get_ylabel() for axes in panels[:, 0]] == PROMPTS
    for row in (0, 1):
        assert [int(axes.images[0].get_array()[0, 0, 0]) for axes in panels[row]] == [row, 10 + row, 20 + row]
        assert [axes.get_xlabel() for axes in panels[row]] == [str(row), str(10 + row), str(20 + row)]


def test_scores_are_of_the_scales_whose_images_all_have_one(tmp_path, made):
    more = images_in(tmp_path, scales=(3.0,))
    assert more.only_scorer == "red"
    assert {form: list(found) for form, found in more.scores("red").items()} == {
        "weights": [0.0, 1.0, 2.0],
        "prediction": [0.0, 1.0, 2.0],
    }
    made.score("other", red, lambda count: None)
    assert images_in(tmp_path).only_scorer is None

"""The oracle: ideal images score 1, and each flaw lowers the part that is named after it."""

import numpy as np
import pytest

from trl_diffusion_sdpo.tools.demo.oracle import PERIMETERS, oracle_parts, oracle_score
from trl_diffusion_sdpo.tools.demo.world import SHAPES, Caption, captions, inside, render

PROMPTS = [caption.text for caption in captions()]


@pytest.fixture(scope="module")
def ideal():
    return np.stack([render(caption) for caption in captions()])


def test_every_ideal_render_scores_at_least_0_95_in_every_part(ideal):
    parts = oracle_parts(ideal, PROMPTS)
    for part in (parts.colour, parts.shape, parts.centred, parts.sharp, parts.score):
        assert part.shape == (72,)
        assert part.min() >= 0.95


def test_a_wrong_colour_lowers_the_colour_part_and_nothing_else():
    right = oracle_parts(render(Caption("red", "cross", "white"))[None], ["a red cross on white"])
    wrong = oracle_parts(render(Caption("blue", "cross", "white"))[None], ["a red cross on white"])
    assert wrong.colour[0] == 0.0  # red and blue are further apart than the reach
    assert right.colour[0] > 0.95
    for name in ("shape", "centred", "sharp"):
        assert getattr(wrong, name)[0] == pytest.approx(getattr(right, name)[0], abs=0.02)


def test_a_wrong_shape_loses_the_whole_shape_part_and_nothing_else(ideal):
    for shown in SHAPES:
        for asked in set(SHAPES) - {shown}:
            image = render(Caption("green", shown, "gray"))[None]
            parts = oracle_parts(image, [f"a green {asked} on gray"])
            assert parts.shape[0] == 0.0
            assert min(parts.colour[0], parts.centred[0], parts.sharp[0]) >= 0.95


def test_the_centred_part_falls_evenly_with_the_distance():
    drawings = [render(Caption("red", "square", "black"), offset=(step, 0.0)) for step in (0.0, 2.0, 4.0)]
    centred = oracle_parts(np.stack(drawings), ["a red square on black"] * 3).centred
    assert centred[0] == pytest.approx(1.0, abs=0.01)
    assert centred[0] - centred[1] == pytest.approx(centred[1] - centred[2], abs=0.01)
    assert centred[0] - centred[1] > 0.2


@pytest.mark.parametrize("kind", ["noise", "one colour", "one bright pixel", "half and half"])
def test_an_image_without_an_object_scores_zero(kind):
    images = {
        "noise": np.random.default_rng(0).random((1, 32, 32, 3)),
        "one colour": np.full((1, 32, 32, 3), 0.5),
        "one bright pixel": np.pad(np.ones((1, 1, 1, 3)), ((0, 0), (15, 16), (15, 16), (0, 0))),
        "half and half": np.concatenate([np.ones((1, 17, 32, 3)), np.zeros((1, 15, 32, 3))], axis=1),
    }
    assert oracle_score(images[kind], ["a red circle on gray"])[0] == 0.0


@pytest.mark.parametrize("shape", SHAPES)
def test_perimeters_agree_with_counted_boundary_crossings(shape):
    # Cauchy-Crofton: the length is pi / 2 times the mean over directions of the integral over parallel lines of the
    # number of times that a line enters or leaves.
    crossings, step = [], 1 / 200
    points = np.arange(-1.5, 1.5, step)
    for angle in np.linspace(0, np.pi, 60, endpoint=False):
        along, across = np.meshgrid(points, points)
        x = along * np.cos(angle) - across * np.sin(angle)
        y = along * np.sin(angle) + across * np.cos(angle)
        crossings.append(np.abs(np.diff(inside(shape, x, y).astype(int), axis=1)).sum() * step)
    assert np.mean(crossings) * np.pi / 2 == pytest.approx(PERIMETERS[shape], rel=0.02)


def test_another_prompt_is_refused(ideal):
    with pytest.raises(ValueError, match="a <colour> <shape>"):
        oracle_score(ideal[:1], ["a dog"])

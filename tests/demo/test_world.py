"""The world: its captions, rendered images, and the flaws of its training images."""

import numpy as np
import pytest

from trl_diffusion_sdpo.demo.world import (
    BACKGROUNDS,
    COLOURS,
    SHAPE_AREA,
    SHAPES,
    Caption,
    captions,
    imperfect_render,
    inside,
    parse_caption,
    render,
)


def test_there_are_seventy_two_different_captions():
    texts = [caption.text for caption in captions()]
    assert len(texts) == len(set(texts)) == 6 * 4 * 3
    assert texts[0] == "a red circle on white"


@pytest.mark.parametrize("text", ["", "a pink circle on white", "red a circle on white"])
def test_an_unknown_prompt_is_refused_with_the_accepted_ones(text):
    with pytest.raises(ValueError, match="a <colour> <shape>"):
        parse_caption(text)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_unit_area_has_area_one_and_its_centroid_at_the_origin(shape):
    points = (np.arange(1200) + 0.5) / 400 - 1.5  # [-1.5, 1.5] in steps of 1/400
    x, y = np.meshgrid(points, points)
    within = inside(shape, x, y)
    assert within.sum() / 400**2 == pytest.approx(1.0, abs=1e-2)  # a line of points on an edge is 0.5%
    assert (x * within).sum() / 400**2 == pytest.approx(0.0, abs=2e-3)
    assert (y * within).sum() / 400**2 == pytest.approx(0.0, abs=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_ideal_render_covers_the_area_in_the_caption_colours(shape):
    image = render(Caption("red", shape, "black"))
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert tuple(image[16, 16]) == tuple(np.rint(255 * np.array(COLOURS["red"])).astype(int))
    assert tuple(image[0, 0]) == tuple(np.rint(255 * np.array(BACKGROUNDS["black"])).astype(int))
    coverage = image[..., 0].sum() / image[16, 16, 0]
    assert coverage == pytest.approx(SHAPE_AREA, rel=0.02)


def test_equal_generators_give_equal_flaws_and_the_count_of_draws_is_constant():
    first, second = np.random.default_rng(5), np.random.default_rng(5)
    images = [imperfect_render(caption, first) for caption in captions()]
    again = [imperfect_render(caption, second) for caption in reversed(captions())]
    assert np.array_equal(images[0], imperfect_render(captions()[0], np.random.default_rng(5)))
    assert len(again) == len(images)
    assert first.random() == second.random()


def test_flaws_have_the_documented_frequencies():
    generator = np.random.default_rng(0)
    caption, count = Caption("red", "square", "black"), 600
    images = np.stack([imperfect_render(caption, generator) for _ in range(count)]).astype(float) / 255
    light = images.sum(axis=-1)  # (600, 32, 32)
    places = np.arange(32) + 0.5 - 16
    right = (light.sum(axis=1) * places).sum(axis=1) / light.sum(axis=(1, 2))
    assert right.mean() == pytest.approx(0.0, abs=0.4)  # standard error 3 / sqrt(600) = 0.12
    assert right.std() == pytest.approx(2.9, abs=0.3)  # a normal of 3 cut at 6

    brightest = images.reshape(count, -1, 3)[np.arange(count), light.reshape(count, -1).argmax(axis=1)]
    hue = brightest / np.linalg.norm(brightest, axis=-1, keepdims=True)
    red = np.array(COLOURS["red"]) / np.linalg.norm(COLOURS["red"])
    assert np.mean(hue @ red < 0.99) == pytest.approx(0.10, abs=0.04)

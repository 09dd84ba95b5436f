"""The world: its captions, rendered images, and the flaws of its training images."""

import numpy as np
import pytest

from trl_diffusion_sdpo.tools.demo.world import (
    BACKGROUNDS,
    COLOURS,
    SHAPE_AREA,
    SHAPES,
    Caption,
    captions,
    imperfect_render,
    inside,
    render,
)


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

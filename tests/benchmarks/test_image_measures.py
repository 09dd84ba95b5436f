"""Diversity and distance from the drawings, by hand."""

import numpy as np
import pytest

from benchmarks.studies.image_measures import ImageMeter, frechet_distance
from trl_diffusion_sdpo.tools.demo.world import captions, render


def test_the_frechet_distance_of_normals_by_hand():
    # Means 0 and (3, 4), variances (1, 4) and (9, 16) without covariance: 25 + (1 - 3)^2 + (2 - 4)^2.
    cross = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]]) * (3 / 2) ** 0.5  # sample variance 1 in each direction
    first, second = cross * [1, 2], cross * [3, 4] + [3, 4]
    assert frechet_distance(first, second) == pytest.approx(33)
    # A turned coordinate system changes nothing, and neither does the order.
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert frechet_distance(second @ turn, first @ turn) == pytest.approx(33)
    # Covariances that do not commute: tr((S1 S2)^(1/2)) is the root of tr(S1 S2) + 2 sqrt(det(S1 S2)) for 2 x 2.
    turned = second @ turn
    product = np.cov(first.T) @ np.cov(turned.T)
    trace = (np.trace(product) + 2 * np.linalg.det(product) ** 0.5) ** 0.5
    means = np.square(first.mean(0) - turned.mean(0)).sum()
    assert frechet_distance(first, turned) == pytest.approx(means + 1 + 4 + 9 + 16 - 2 * trace)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_drawings_are_nearer_to_the_drawings_than_other_colours_are():
    shown = [caption for caption in captions()[::9] for _ in range(4)]
    meter = ImageMeter([caption.text for caption in shown], drawings_per_prompt=4)
    offsets = [(-3, 0), (3, 0), (0, -3), (0, 3)] * 8
    drawn = np.stack([render(caption, offset=at, blur=1.0) for caption, at in zip(shown, offsets, strict=True)])
    right, grey = meter(drawn), meter(np.repeat(drawn.mean(-1, keepdims=True), 3, -1).astype(np.uint8))
    assert right.frechet < grey.frechet / 2
    assert right.saturation == pytest.approx(1, abs=0.15) and grey.saturation == 0
    assert 0.1 < right.diversity < 0.3
    same = meter(np.repeat(drawn[::4], 4, axis=0))
    assert same.diversity == 0 and same.frechet > right.frechet

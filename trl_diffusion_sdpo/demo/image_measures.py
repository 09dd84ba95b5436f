"""Measures of generated images besides a score: diversity, distance from the world's drawings, saturation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..evaluation.images import diversity, saturation
from .pairs import eval_pairs
from .world import IMAGE_SIZE

FEATURE_SIZE = 8  # pixels, the side to which images are averaged
COMPONENTS = 24
DRAWINGS_SEED = 60_000  # differs from the seeds of training, held-out pairs and probes
DRAWINGS_PER_PROMPT = 14  # pairs before near ties are dropped; the preferred drawing of each is used


@dataclass(frozen=True)
class ImageMeasures:
    """Measurements of a set of images, by [`ImageMeter`]."""

    diversity: float  # distance of two images of one prompt, averaged over prompts
    frechet: float  # to the drawings; lower is nearer
    saturation: float  # relative to the drawings': 1 is equal, 1.1 a tenth more


class ImageMeter:
    """Measures images of fixed prompts against the drawings that pairs of these prompts prefer.

    The drawings are the preferred images of pairs that no training sees. They are equal for every model.

    The features are the first 24 principal components of an image that is averaged to `(8, 8)` pixels in `[0, 1]`. The
    components are fitted on the drawings and not scaled.

    Args:
        prompts (`Sequence[str]` of length N): Prompts of the world, one for each image that will be measured, at least
            two of every prompt. The diversity of a single image is NaN.
        drawings_per_prompt (`int`): Pairs rendered for each prompt.
    """

    def __init__(self, prompts: Sequence[str], drawings_per_prompt: int = DRAWINGS_PER_PROMPT):
        self.prompts = list(prompts)
        pairs = eval_pairs(DRAWINGS_SEED, drawings_per_prompt)
        wanted = set(self.prompts)
        rows = [row for row, prompt in enumerate(pairs["prompt"]) if prompt in wanted]
        drawings = np.stack([np.asarray(image.convert("RGB")) for image in pairs.select(rows)["chosen"]])
        self._components = principal_components(pixel_features(drawings), COMPONENTS)
        self._drawings = pixel_features(drawings) @ self._components
        self._saturation = saturation(drawings)

    def __call__(self, images: np.ndarray) -> ImageMeasures:
        """Measure images `(N, 32, 32, 3)`, uint8, of the prompts."""
        features = pixel_features(images) @ self._components
        prompts = np.array(self.prompts)
        return ImageMeasures(
            diversity=float(np.mean([diversity(images[prompts == prompt]) for prompt in dict.fromkeys(self.prompts)])),
            frechet=frechet_distance(features, self._drawings),
            saturation=saturation(images) / self._saturation,
        )


def pixel_features(images: np.ndarray) -> np.ndarray:
    """Return means of blocks of images `(N, 32, 32, 3)`, uint8, as `(N, 8 * 8 * 3)` in `[0, 1]`."""
    block = IMAGE_SIZE // FEATURE_SIZE
    blocks = images.reshape(len(images), FEATURE_SIZE, block, FEATURE_SIZE, block, 3)
    return blocks.mean(axis=(2, 4)).reshape(len(images), -1) / 255


def principal_components(features: np.ndarray, count: int) -> np.ndarray:
    """Return the directions in which features `(N, D)` vary most, `(D, count)`, with orthonormal columns."""
    _, _, directions = np.linalg.svd(features - features.mean(0), full_matrices=False)
    return directions[:count].T


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Frechet distance of two normal distributions that are fitted to features `(N, D)` and `(M, D)`.

    It is `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`. `S1^(1/2) S2 S1^(1/2)` has the eigenvalues of `S1 S2`. The
    distance falls with the number of samples, so compare sets of equal size.

    Source: https://huggingface.co/papers/1706.08500, equation 6.
    """
    means = [features.mean(0) for features in (first, second)]
    ours, theirs = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (first, second))
    values, vectors = np.linalg.eigh(ours)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    product = np.linalg.eigvalsh(root @ theirs @ root).clip(min=0)  # rounding can make a zero negative
    return float(np.square(means[0] - means[1]).sum() + np.trace(ours) + np.trace(theirs) - 2 * np.sqrt(product).sum())

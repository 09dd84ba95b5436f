"""Measure generated images without a scorer: diversity, distance from the toy world's drawings, and saturation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trl_diffusion_sdpo.tools.demo.pairs import eval_pairs
from trl_diffusion_sdpo.tools.demo.world import IMAGE_SIZE
from trl_diffusion_sdpo.tools.evaluation.images import diversity, saturation

FEATURE_SIZE = 8  # images are downsampled to this height and width by averaging
COMPONENTS = 24  # number of principal components
DRAWINGS_SEED = 60_000  # seed of the drawings; not the demo's default seed
DRAWINGS_PER_PROMPT = 14  # pairs per prompt, before near ties are dropped


@dataclass(frozen=True)
class ImageMeasures:
    """Measurements of a set of images, which [`ImageMeter`] returns."""

    diversity: float  # mean distance between two images of the same prompt
    frechet: float  # Frechet distance from the drawings; lower is more similar
    saturation: float  # colour saturation, divided by that of the drawings


class ImageMeter:
    """Measures generated images of fixed prompts, and compares them with drawings of the same prompts.

    The drawings are the preferred images of pairs that are not in the training data, and are the same for all models.

    The Frechet distance is computed from features: an image is downsampled to `(8, 8)` pixels in `[0, 1]` and projected
    on the first 24 principal components of the drawings. The projections are not scaled to equal variance.

    Args:
        prompts (`Sequence[str]` of length N): The prompt of each image to measure. Every prompt must occur at least
            twice, because the diversity of a single image is NaN.
        drawings_per_prompt (`int`): Number of pairs to render for each prompt, before near ties are dropped.
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
        """Measure images of the N prompts, `(N, 32, 32, 3)`, uint8, one for each prompt in `prompts`."""
        features = pixel_features(images) @ self._components
        prompts = np.array(self.prompts)
        return ImageMeasures(
            diversity=float(np.mean([diversity(images[prompts == prompt]) for prompt in dict.fromkeys(self.prompts)])),
            frechet=frechet_distance(features, self._drawings),
            saturation=saturation(images) / self._saturation,
        )


def pixel_features(images: np.ndarray) -> np.ndarray:
    """Average images `(N, 32, 32, 3)`, uint8, over blocks of pixels, and return `(N, 8 * 8 * 3)` in `[0, 1]`."""
    block = IMAGE_SIZE // FEATURE_SIZE
    blocks = images.reshape(len(images), FEATURE_SIZE, block, FEATURE_SIZE, block, 3)
    return blocks.mean(axis=(2, 4)).reshape(len(images), -1) / 255


def principal_components(features: np.ndarray, count: int) -> np.ndarray:
    """Return the first `count` principal components of features `(N, D)`, as orthonormal columns `(D, count)`."""
    _, _, directions = np.linalg.svd(features - features.mean(0), full_matrices=False)
    return directions[:count].T


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Frechet distance between two normal distributions that are fitted to features `(N, D)` and `(M, D)`.

    With means `m1`, `m2` and covariances `S1`, `S2`, the distance is `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`. The
    code computes the last trace from `S1^(1/2) S2 S1^(1/2)`, which has the same eigenvalues as `S1 S2`. The result
    depends on the numbers of samples (it is larger for few samples), so compare only distances of sets of equal size.

    Source: https://huggingface.co/papers/1706.08500, equation 6.
    """
    means = [features.mean(0) for features in (first, second)]
    ours, theirs = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (first, second))
    values, vectors = np.linalg.eigh(ours)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    product = np.linalg.eigvalsh(root @ theirs @ root).clip(min=0)  # rounding can make an eigenvalue of zero negative
    return float(np.square(means[0] - means[1]).sum() + np.trace(ours) + np.trace(theirs) - 2 * np.sqrt(product).sum())

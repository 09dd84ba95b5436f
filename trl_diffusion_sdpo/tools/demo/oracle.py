"""Score an image of the toy world against its caption, from the pixels alone. Scores are in [0, 1].

The background colour is the median colour of the image's border, and the object is the pixels that differ from it. The
score is the mean of four parts: colour, shape, position and sharpness of the object.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..rewards import FunctionScorer
from .world import BACKGROUNDS, COLOURS, IMAGE_SIZE, SHAPE_AREA, SHAPES, inside, parse_caption

COLOUR_REACH = 0.6  # colours this RGB distance from the captioned one score 0
CENTRE_REACH = 8.0  # objects this many pixels off centre score 0 for their position
CRISP_EDGE, SOFT_EDGE = 1.0, 4.0  # an edge 1 pixel wide scores 1, one 4 pixels wide 0
MIN_CONTRAST = 0.15  # smallest RGB distance between an object and the background
AREA_RANGE = (SHAPE_AREA / 4, SHAPE_AREA * 3)  # smallest and largest area of an object in pixels

Images = np.ndarray | Sequence[np.ndarray] | Sequence[Image.Image]

# Perimeter of each shape of area 1.
PERIMETERS = {"circle": 2 * np.pi**0.5, "square": 4.0, "triangle": 6 * 3**-0.25, "cross": 12 * 5**-0.5}


@dataclass(frozen=True)
class OracleParts:
    """The four parts of the oracle's score, each of shape `(N,)` and in `[0, 1]`."""

    colour: np.ndarray
    shape: np.ndarray
    centred: np.ndarray
    sharp: np.ndarray

    @property
    def score(self) -> np.ndarray:
        """Mean of the four parts, `(N,)`."""
        return (self.colour + self.shape + self.centred + self.sharp) / 4


def oracle_score(images: Images, prompts: Sequence[str]) -> np.ndarray:
    """Return the oracle's scores of images for their prompts. A perfect drawing scores almost 1.

    Args:
        images (`np.ndarray` of shape `(N, 32, 32, 3)`, or a sequence of N arrays or N PIL images): The images. Arrays
            are uint8, or float in `[0, 1]`.
        prompts (`Sequence[str]` of length N): Captions of the toy world, such as `"a red circle on white"`.

    Returns:
        `np.ndarray` of shape `(N,)`: Scores in `[0, 1]`.
    """
    return oracle_parts(images, prompts).score


# The oracle as a scorer for evaluations, with float32 scores.
oracle = FunctionScorer("oracle", oracle_score)


def oracle_parts(images: Images, prompts: Sequence[str]) -> OracleParts:
    """Return the four parts of [`oracle_score`], with the same arguments and errors.

    Returns:
        `OracleParts`: `colour` is the lower of the scores of object and background colour. `shape` is the object's
        intersection over union with the captioned shape of the same area and centre, or 0 if another shape overlaps
        more. `centred` scores the object's position, and `sharp` the width of its edge. All are 0 without an object.
    """
    pixels = _as_float(images)
    wanted = [parse_caption(prompt) for prompt in prompts]
    background, colour, alpha = _separate(pixels)
    mask = alpha > 0.5
    area = mask.sum(axis=(1, 2))
    seen = np.linalg.norm(colour - background, axis=-1) >= MIN_CONTRAST
    seen &= (AREA_RANGE[0] <= area) & (area <= AREA_RANGE[1])
    area = np.maximum(area, AREA_RANGE[0])
    centre = _centroid(mask, area)
    overlaps = _overlaps(mask, area, centre)
    best = overlaps.argmax(axis=1)
    names = list(SHAPES)
    captioned = np.array([names.index(caption.shape) for caption in wanted], dtype=int)

    wanted_colour = np.array([COLOURS[caption.colour] for caption in wanted]).reshape(-1, 3)
    wanted_background = np.array([BACKGROUNDS[caption.background] for caption in wanted]).reshape(-1, 3)
    off_colour = np.linalg.norm(colour - wanted_colour, axis=-1)
    off_background = np.linalg.norm(background - wanted_background, axis=-1)
    perimeter = np.array([PERIMETERS[name] for name in names])[best] * np.sqrt(area)
    edge = (4 * alpha * (1 - alpha)).sum(axis=(1, 2)) / perimeter
    return OracleParts(
        colour=seen * _fade(np.maximum(off_colour, off_background), 0.0, COLOUR_REACH),
        shape=seen * np.where(best == captioned, overlaps.max(axis=1), 0.0),
        centred=seen * _fade(np.linalg.norm(centre, axis=-1), 0.0, CENTRE_REACH),
        sharp=seen * _fade(edge, CRISP_EDGE, SOFT_EDGE),
    )


def _as_float(images: Images) -> np.ndarray:
    if not isinstance(images, np.ndarray):
        images = np.stack(
            [np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image) for image in images]
        )
    return images / 255.0 if images.dtype == np.uint8 else images.astype(np.float64)


def _separate(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the colours of background and object, `(N, 3)` each, and the share of each pixel that the object covers,
    `(N, 32, 32)`."""
    rim = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    background = np.median(rim, axis=1)
    distance = np.linalg.norm(pixels - background[:, None, None], axis=-1)  # (N, 32, 32)
    # An object covers about 15% of the image, so the pixel at the 95th percentile of the distance is inside it. Single
    # outliers do not move this percentile.
    core = distance >= 0.8 * np.quantile(distance, 0.95, axis=(1, 2), keepdims=True)
    colour = (pixels * core[..., None]).sum(axis=(1, 2)) / core.sum(axis=(1, 2))[:, None]
    contrast = np.maximum(np.linalg.norm(colour - background, axis=-1), MIN_CONTRAST)
    return background, colour, np.clip(distance / contrast[:, None, None], 0, 1)


def _centroid(mask: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Return the mean position (x, y) of each mask's pixels from the image's centre, `(N, 2)`. y points down."""
    position = np.arange(IMAGE_SIZE) + 0.5 - IMAGE_SIZE / 2
    right = (mask * position[None, None, :]).sum(axis=(1, 2)) / area
    down = (mask * position[None, :, None]).sum(axis=(1, 2)) / area
    return np.stack([right, down], axis=-1)


def _overlaps(mask: np.ndarray, area: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Return each mask's intersection over union with every shape of the same area and centre, `(N, shapes)`."""
    position = np.arange(IMAGE_SIZE) + 0.5 - IMAGE_SIZE / 2
    scale = np.sqrt(area)[:, None, None]
    x = (position[None, None, :] - centre[:, 0, None, None]) / scale
    y = (position[None, :, None] - centre[:, 1, None, None]) / scale
    x, y = np.broadcast_arrays(x, y)  # (N, 32, 32)
    templates = [inside(name, x, y) for name in SHAPES]
    shares = [(mask & template).sum(axis=(1, 2)) / (mask | template).sum(axis=(1, 2)) for template in templates]
    return np.stack(shares, axis=-1)


def _fade(value: np.ndarray, full: float, zero: float) -> np.ndarray:
    """Return 1 for values up to `full`, 0 from `zero` on, and interpolate linearly in between."""
    return np.clip((zero - value) / (zero - full), 0, 1)

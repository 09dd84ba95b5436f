"""A toy world: 72 captions of coloured shapes, perfect drawings of them, and drawings with random flaws.

Drawings are rendered with numpy, so that a random seed gives the same images on every machine.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from ...utils.errors import UserError

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.70, 0.15),
    "blue": (0.10, 0.20, 0.90),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.60, 0.15, 0.75),
    "cyan": (0.10, 0.80, 0.85),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
    "gray": (0.5, 0.5, 0.5),
}

IMAGE_SIZE = 32
SHAPE_AREA = 150.0  # in pixels, for every shape
MAX_OFFSET = 6.0  # in pixels; farther off, a triangle would leave the image

OFFSET_SD = 3.0
BLUR_CHANCE = 0.6
BLUR_RANGE = (1.0, 2.0)
WRONG_COLOUR_CHANCE = 0.1
WRONG_SHAPE_CHANCE = 0.1

_SUPERSAMPLE = 8


@dataclass(frozen=True)
class Caption:
    """Content of a drawing, whose prompt is the property `text`."""

    colour: str
    shape: str
    background: str

    @property
    def text(self) -> str:
        return f"a {self.colour} {self.shape} on {self.background}"


def captions() -> list[Caption]:
    """Return all 72 captions, ordered by colour, shape and background."""
    return [Caption(*words) for words in itertools.product(COLOURS, SHAPES, BACKGROUNDS)]


def parse_caption(text: str) -> Caption:
    """Return the caption of a prompt such as `"a red circle on white"`. Raise `ValueError` for other texts than prompts
    of the toy world."""
    words = text.split()
    if len(words) == 5:
        caption = Caption(words[1], words[2], words[4])
        is_of_world = caption.colour in COLOURS and caption.shape in SHAPES and caption.background in BACKGROUNDS
        if is_of_world and caption.text == text:
            return caption
    raise UserError(
        f"A prompt of the toy world must be 'a <colour> <shape> on <background>', got {text!r}. Use a colour of "
        f"{list(COLOURS)}, a shape of {list(SHAPES)} and a background of {list(BACKGROUNDS)}."
    )


def render(caption: Caption, *, offset: tuple[float, float] = (0.0, 0.0), blur: float = 0.0) -> np.ndarray:
    """Return a drawing of a caption, by default a perfect one: centred and sharp.

    Args:
        caption (`Caption`): The caption.
        offset (`tuple[float, float]`): Pixels by which to move the shape to the right and down.
        blur (`float`): Standard deviation of a Gaussian blur in pixels; 0 for no blur.

    Returns:
        `np.ndarray` of shape `(32, 32, 3)`, uint8.
    """
    alpha = _coverage(caption.shape, offset)
    if blur > 0:
        alpha = _gaussian_blur(alpha, blur)
    colour, background = np.array(COLOURS[caption.colour]), np.array(BACKGROUNDS[caption.background])
    pixels = background + alpha[..., None] * (colour - background)  # (32, 32) -> (32, 32, 3)
    return np.rint(255 * pixels).astype(np.uint8)


def imperfect_render(caption: Caption, generator: np.random.Generator) -> np.ndarray:
    """Return a drawing of a caption with random flaws. The base model was trained on such drawings.

    On each axis, the shape is off centre by a normal random number with standard deviation 3 pixels, clipped at 6. 60%
    of the drawings are blurred, 10% have a wrong colour and 10% a wrong shape, independently.

    Every call takes the same number of random numbers from the generator.
    """
    offset = np.clip(generator.normal(0.0, OFFSET_SD, size=2), -MAX_OFFSET, MAX_OFFSET)
    blurred, wrong_colour, wrong_shape = generator.random(3) < (BLUR_CHANCE, WRONG_COLOUR_CHANCE, WRONG_SHAPE_CHANCE)
    blur = generator.uniform(*BLUR_RANGE)
    other_colour = _other(caption.colour, COLOURS, generator.random())
    other_shape = _other(caption.shape, SHAPES, generator.random())
    shown = Caption(
        colour=other_colour if wrong_colour else caption.colour,
        shape=other_shape if wrong_shape else caption.shape,
        background=caption.background,
    )
    return render(shown, offset=(float(offset[0]), float(offset[1])), blur=float(blur) if blurred else 0.0)


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return whether each point is inside a shape of area 1 with its centroid at the origin, x pointing right and y
    down, as a bool array of the shape of `x` and `y`."""
    return SHAPES[shape](x, y)


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x**2 + y**2 <= 1 / np.pi


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) <= 0.5


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    inradius = 27**-0.25  # with inradius r, an equilateral triangle has the area 3 sqrt(3) r^2
    left_and_right = np.sqrt(3) / 2 * np.abs(x) - y / 2 <= inradius
    return left_and_right & (y <= inradius)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    width = 5**-0.5  # the cross consists of five squares of this width
    x, y = np.abs(x), np.abs(y)
    return (np.minimum(x, y) <= width / 2) & (np.maximum(x, y) <= 1.5 * width)


SHAPES = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross}


def _coverage(shape: str, offset: tuple[float, float]) -> np.ndarray:
    """Return the share of each pixel that the shape covers, `(32, 32)` in `[0, 1]`, from 8 x 8 points per pixel."""
    fine = IMAGE_SIZE * _SUPERSAMPLE
    points = (np.arange(fine) + 0.5) / _SUPERSAMPLE - IMAGE_SIZE / 2
    x, y = points[None, :] - offset[0], points[:, None] - offset[1]
    scale = np.sqrt(SHAPE_AREA)
    x, y = np.broadcast_arrays(x / scale, y / scale)
    blocks = inside(shape, x, y).reshape(IMAGE_SIZE, _SUPERSAMPLE, IMAGE_SIZE, _SUPERSAMPLE)
    return blocks.mean(axis=(1, 3))  # (256, 256) -> (32, 32)


def _gaussian_blur(plane: np.ndarray, sd: float) -> np.ndarray:
    radius = int(np.ceil(3 * sd))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sd) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        width = [(radius, radius) if a == axis else (0, 0) for a in (0, 1)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(plane, width, mode="edge"), len(kernel), axis=axis)
        plane = windows @ kernel
    return plane


def _other(name: str, names: dict, uniform: float) -> str:
    """Return one of `names` other than `name`, chosen by the random number `uniform` in `[0, 1)`."""
    others = [candidate for candidate in names if candidate != name]
    return others[int(uniform * len(others))]

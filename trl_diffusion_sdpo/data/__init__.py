"""Preference data: turns rows of published data sets into batches of image pairs."""

from .buckets import AspectRatioBuckets
from .dataset import PairOptions, PreferenceCollator, PreferenceDataset
from .formats import FORMATS, detect_format
from .images import UndecodableImageError, decode_image
from .loading import load_pairs
from .mixtures import PairMixture
from .rows_to_pairs import prepare_dataset
from .streaming import PreferenceIterableDataset
from .transforms import PairDraws, PairTransform, pixels_as_floats

__all__ = [
    "FORMATS",
    "AspectRatioBuckets",
    "PairDraws",
    "PairMixture",
    "PairOptions",
    "PairTransform",
    "PreferenceCollator",
    "PreferenceDataset",
    "PreferenceIterableDataset",
    "UndecodableImageError",
    "decode_image",
    "detect_format",
    "load_pairs",
    "pixels_as_floats",
    "prepare_dataset",
]

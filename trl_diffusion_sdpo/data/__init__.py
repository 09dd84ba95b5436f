"""Preference data. This package turns the columns of published data sets into batches of pairs."""

from .buckets import AspectRatioBuckets
from .checking import DataReport
from .formats import FORMATS, PreferenceFormat, detect_format
from .images import PairDraws, PairTransform, UndecodableImageError, decode_image, pixels_as_floats
from .loading import load_pairs
from .pairs import PairOptions, PreferenceCollator, PreferenceDataset
from .preparing import prepare_dataset
from .sources import PairMixture
from .streaming import PreferenceIterableDataset

__all__ = [
    "FORMATS",
    "AspectRatioBuckets",
    "DataReport",
    "PairDraws",
    "PairMixture",
    "PairOptions",
    "PairTransform",
    "PreferenceCollator",
    "PreferenceDataset",
    "PreferenceFormat",
    "PreferenceIterableDataset",
    "UndecodableImageError",
    "decode_image",
    "detect_format",
    "load_pairs",
    "pixels_as_floats",
    "prepare_dataset",
]

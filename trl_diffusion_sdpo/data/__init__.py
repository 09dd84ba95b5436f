"""Preference data. This package turns the columns of published data sets into batches of pairs."""

from .buckets import AspectRatioBuckets
from .formats import FORMATS, PreferenceFormat, detect_format
from .images import UndecodableImageError, decode_image
from .loading import load_pairs
from .pairs import DataReport, PairMixture, PreferenceDataset, PreferenceIterableDataset, prepare_dataset
from .transforms import PairDraws, PairTransform, PreferenceCollator, pixels_as_floats

__all__ = [
    "FORMATS",
    "AspectRatioBuckets",
    "DataReport",
    "PairDraws",
    "PairMixture",
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

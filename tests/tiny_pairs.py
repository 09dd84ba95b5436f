"""Rows of tiny pairs, in every style that a data set may have, for the tests of data."""

import io

import datasets
import torch
from PIL import Image

from trl_diffusion_sdpo.data import PairOptions, PairTransform, PreferenceIterableDataset, prepare_dataset
from trl_diffusion_sdpo.utils.processes import ALONE

JUNK = b"this is no image"
STYLES = ["arrow", "stream", "list"]


def picture(level, size=(16, 16)):
    return Image.new("RGB", size, (level, level, level))


def png(level=7, size=(16, 16)):
    buffer = io.BytesIO()
    picture(level, size).save(buffer, "PNG")
    return buffer.getvalue()


def in_style(rows, style, features=None):
    if style == "list":
        return rows
    dataset = datasets.Dataset.from_list(rows, features=features)
    return dataset.to_iterable_dataset() if style == "stream" else dataset


def prepare(dataset, resolution=16, center_crop=True, random_flip=False, peers=ALONE, **options):
    transform = PairTransform(resolution, center_crop=center_crop, random_flip=random_flip)
    return prepare_dataset(dataset, PairOptions(transform, **options), peers=peers)


def items_of(prepared):
    return (
        list(prepared)
        if isinstance(prepared, PreferenceIterableDataset)
        else [prepared[i] for i in range(len(prepared))]
    )


def canonical(count=4, **extra):
    return [{"prompt": f"p{i}", "chosen": png(100 + i), "rejected": png(i), **extra} for i in range(count)]


def same(first, second):
    return torch.equal(first["pixel_values"], second["pixel_values"]) and all(
        first[key] == second[key] for key in first if key != "pixel_values"
    )


def bad_rows():
    rows = [
        {"prompt": "good", "path1": png(1), "path2": png(2)},
        {"prompt": None, "path1": png(1), "path2": png(2)},
        {"prompt": "junk", "path1": png(1), "path2": JUNK},
        {"prompt": "cut", "path1": png(1, (64, 64))[:80], "path2": png(2)},
        {"prompt": "dot", "path1": png(1, (1, 1)), "path2": png(2)},
        {"prompt": "none", "path1": None, "path2": png(2)},
        {"prompt": "fine", "path1": png(3), "path2": png(4)},
    ]
    return rows

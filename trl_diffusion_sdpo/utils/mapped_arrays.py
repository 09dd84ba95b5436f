"""Arrays in files, which the processes of a machine map into memory together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


class MappedArray(np.ndarray):
    """Array whose values stay in its file. A spawned worker maps the file too, instead of getting a copy."""

    def __reduce__(self) -> Any:
        if isinstance(self.base, np.memmap):  # neither a part of the array nor computed from it
            return map_array, (Path(str(self.base.filename)),)
        return np.asarray(self).__reduce__()


def map_array(file: Path) -> np.ndarray:
    """Map the array of a file (`.npy`) into memory, for reading.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not the file of an array.
    """
    return np.load(file, mmap_mode="r", allow_pickle=False).view(MappedArray)

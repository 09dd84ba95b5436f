"""A checksum of every byte of the images of a source, or of its prompts, in the order of its rows. Data that lie on a
disk are read for it once, and again when the size or time of a file changes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from tqdm.auto import tqdm

from ..files import write_atomically
from .checking import usable_cores
from .columns import one_chunk
from .formats import PreferenceFormat
from .images import MAX_FILE_BYTES, OF_THE_PATH
from .kept_index import KEPT_FOLDER, kept_folder

logger = logging.getLogger(__name__)

READING = "Reading images once, to recognize them"
BLOCK_ROWS = 256  # that are hashed together
AT_ONCE = 64  # blocks or files, of which a thread has one
MAX_THREADS = 8
SHOWN_AFTER = 5.0  # seconds
MISSING = hashlib.sha256(b"missing").digest()  # in place of a file's
VERSION = 1  # of what is kept: raise it where the same images would give another checksum


def checksum_of_images(table: datasets.Dataset, known: PreferenceFormat) -> str:
    """Of image columns: the bytes in the table, those of the local files that rows name, and URLs as they are written.

    Equal wherever data and files lie, in memory or in files of any number.
    """
    columns = [column for column in known.image_columns if column in table.column_names]
    images = table.select_columns(columns)
    folder = kept_folder(images, known)
    facts = _kept(None if folder is None else folder.name, lambda: _facts_of(images))
    names = _names_in(images) if facts["names"] else []
    return _joined(facts["sha256"], checksum_of_files(names))


def checksum_of_prompts(table: datasets.Dataset, known: PreferenceFormat) -> str:
    """Of the column of prompts."""
    column = next(name for name in known.prompt_columns if name in table.column_names)
    digest = hashlib.sha256()
    for block in _blocks(table.select_columns([column])):
        _hash(one_chunk(block.column(0)), digest, None)
    return digest.hexdigest()


def checksum_of_values(rows: Iterable[Sequence[Any]]) -> str:
    """Of undecoded images, or of prompts as bytes, of each row in memory."""
    digest, names = hashlib.sha256(), []
    for values in rows:
        digest.update(f"{len(values)} values\n".encode())
        for value in values:
            names += _hash_value(value, digest)
    return _joined(digest.hexdigest(), checksum_of_files(names))


def checksum_of_files(names: Sequence[str]) -> str:
    """Of the content of local files, in this order; of a file that is missing, that it is."""
    if not names:
        return ""
    distinct = list(dict.fromkeys(names))
    places = {name: place for place, name in enumerate(distinct)}
    order = np.array([places[name] for name in names])
    stated = [_status(name) for name in tqdm(distinct, "Looking at the files of images", delay=SHOWN_AFTER)]
    state = hashlib.sha256("\0".join(os.path.abspath(name) for name in distinct).encode("utf-8", "surrogatepass"))
    state.update(np.array(stated, dtype="<i8").data)
    state.update(order.astype("<i8").data)

    def read() -> dict[str, Any]:
        bar = tqdm(_in_threads(_digest_of_file, distinct), READING, len(distinct), delay=SHOWN_AFTER)
        digests = np.frombuffer(b"".join(bar), dtype="V32")
        return {"sha256": hashlib.sha256(digests[order].tobytes()).hexdigest()}

    kept = state.hexdigest()[:32] if datasets.is_caching_enabled() else None
    return _kept(kept, read)["sha256"]


def _kept(name: str | None, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `compute` returns, from the cache of `datasets` where it is there under this name."""
    if name is None:
        return compute()
    file = Path(datasets.config.HF_DATASETS_CACHE, KEPT_FOLDER, f"{name}-{VERSION}.json")
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        found = compute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(found).encode(), ending=f".{socket.gethostname()}-{os.getpid()}.partial")
    except OSError as error:
        logger.warning("The checksum of the images was not kept in %s: %s. They are read at every start.", file, error)
    return found


def _joined(*digests: str) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _in_threads(function: Callable, items: Iterable) -> Iterator:
    """`map` by several threads, which does not read far ahead."""
    rest = iter(items)
    with ThreadPoolExecutor(min(MAX_THREADS, usable_cores())) as pool:
        while some := list(islice(rest, AT_ONCE)):
            yield from pool.map(function, some)


# ---- Files --------------------------------------------------------------------------------------------------------


def _status(name: str) -> tuple[int, int]:
    """Size and time of a regular file; -1 of others."""
    try:
        found = os.stat(name)
    except (OSError, ValueError):
        return -1, -1
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else (-1, -1)


def _digest_of_file(name: str) -> bytes:
    try:
        if not 0 <= _status(name)[0] <= MAX_FILE_BYTES:  # which is not read as an image either
            return MISSING
        with open(name, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        if error.errno not in OF_THE_PATH:
            raise  # the file may be good, and another checksum of it would be kept
        return MISSING


# ---- Tables -------------------------------------------------------------------------------------------------------


def _blocks(images: datasets.Dataset) -> Iterator[pa.Table]:
    return images.with_format("arrow").iter(batch_size=BLOCK_ROWS)


def _facts_of(images: datasets.Dataset) -> dict[str, Any]:
    """A checksum of what is in a table, and whether rows name files."""
    count, digest, has_names = -(-len(images) // BLOCK_ROWS), hashlib.sha256(), False
    for part, names in tqdm(_in_threads(_hash_block, _blocks(images)), READING, count, delay=SHOWN_AFTER):
        digest.update(part)
        has_names |= bool(names)
    return {"sha256": digest.hexdigest(), "names": has_names}


def _names_in(images: datasets.Dataset) -> list[str]:
    """The names of local files, by row."""
    return [name for block in _blocks(images) for name in _names_of(block)]


def _names_of(block: pa.Table) -> list[str]:
    return _hash_block(block, hashes=False)[1]


def _hash_block(block: pa.Table, hashes: bool = True) -> tuple[bytes, list[str]]:
    """A hash of the values of some rows, and the local files that they name, in an order that depends on the rows
    alone."""
    digest = hashlib.sha256() if hashes else None
    names: list[str] = []
    for column in block.columns:
        _hash(one_chunk(column), digest, names)
    return b"" if digest is None else digest.digest(), names


def _hash(array: pa.Array, digest: Any, names: list[str] | None) -> None:
    """Update a hash, if there is one, with the values of an array; strings that are local files go to `names` instead,
    if there are any."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        _hash(array.storage, digest, names)
    elif pa.types.is_dictionary(kind):
        _hash(array.dictionary_decode(), digest, names)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        _update(digest, pc.list_value_length(array).fill_null(-1).to_numpy(zero_copy_only=False))
        _hash(array.flatten(), digest, names)
    elif pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}:
        data, path = (child.cast(pa.large_binary()) for child in _children(array))
        _hash_bytes(data, digest)
        absent = pc.equal(pc.binary_length(data), 0).fill_null(True)
        _hash(path.filter(absent).cast(pa.large_string()), digest, names)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        if names is None:
            _hash_bytes(array.cast(pa.large_binary()), digest)
        else:
            _sort_out(array, digest, names)
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        _hash_bytes(array.cast(pa.large_binary()), digest)
    elif digest is not None:
        digest.update(repr(array.to_pylist()).encode("utf-8", "surrogatepass"))


def _children(array: pa.StructArray) -> list[pa.Array]:
    """Bytes and path of an image's structure; null where the structure is."""
    children = dict(zip([field.name for field in array.type], array.flatten(), strict=True))
    return [children["bytes"], children["path"]]


def _sort_out(array: pa.Array, digest: Any, names: list[str]) -> None:
    """Names of local files; of other strings, which are URLs, the hash."""
    values = array.to_pylist()
    local = [value is not None and "://" not in value for value in values]
    names += [value for value, is_local in zip(values, local, strict=True) if is_local]
    if digest is not None:
        others = [None if is_local else value for value, is_local in zip(values, local, strict=True)]
        digest.update(json.dumps([local, others]).encode())


def _hash_bytes(array: pa.LargeBinaryArray, digest: Any) -> None:
    """The lengths, and the bytes in one piece of the array's buffer."""
    if digest is None:
        return
    _update(digest, pc.binary_length(array).fill_null(-1).to_numpy(zero_copy_only=False))
    _, places, data = array.buffers()
    if len(array) and data is not None:
        offsets = np.frombuffer(places, dtype=np.int64)
        digest.update(memoryview(data)[offsets[array.offset] : offsets[array.offset + len(array)]])


def _update(digest: Any, values: np.ndarray) -> None:
    if digest is not None:
        digest.update(np.ascontiguousarray(values, dtype="<i8").data)


# ---- Rows in memory -----------------------------------------------------------------------------------------------


def _hash_value(value: Any, digest: Any) -> list[str]:
    """Update a hash with an image that is not decoded; the local file that it names, if it does."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and "://" not in value:
        digest.update(b"file\n")
        return [value]
    if isinstance(value, Image.Image):
        head, data = repr((value.mode, value.size)), value.tobytes()
    elif isinstance(value, bytes | bytearray | memoryview):
        head, data = "bytes", bytes(value)
    else:
        head, data = "other", (value if isinstance(value, str) else repr(type(value))).encode("utf-8", "surrogatepass")
    digest.update(f"{head} {len(data)}\n".encode())
    digest.update(data)
    return []

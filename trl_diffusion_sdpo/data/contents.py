"""A checksum of every byte of the images of a source, or of its prompts, in the order of its rows. Data that lie on a
disk are read for it once."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageFile
from tqdm.auto import tqdm

from ..utils._compat import without_selection
from .columns import ROUND_ROWS, holds_bytes, holds_text, spans, without_views
from .file_contents import READING, SHOWN_AFTER, checksum_of_files, in_threads, kept
from .formats import PreferenceFormat
from .images import UndecodableImageError, UnreadableImageError, as_undecodable, decode_image
from .kept_index import kept_folder

BLOCK_ROWS = 256  # that are hashed together


def checksum_of_images(table: datasets.Dataset, known: PreferenceFormat) -> str:
    """Of image columns: the bytes in the table, those of the local files that rows name, and URLs as they are written.

    Equal wherever data and files lie, in memory or in files of any number.
    """
    columns = [column for column in known.image_columns if column in table.column_names]
    images = table.select_columns(columns)
    folder = kept_folder(images, known)
    facts = kept(None if folder is None else folder.name, lambda: _facts_of(images))
    names = _names_in(images) if facts["names"] else []
    return _joined(facts["sha256"], checksum_of_files(names))


def checksum_of_prompts(table: datasets.Dataset, known: PreferenceFormat) -> str:
    """Of the column of prompts, or of both, one after the other."""
    digest = hashlib.sha256()
    for column in known.read_prompt_columns(table.column_names):
        base, selected = without_selection(table.select_columns([column]))
        parts = (without_views(part.column(0)) for part in base.with_format("arrow").iter(batch_size=ROUND_ROWS))
        for part in parts if selected is None else [_rows_of(list(parts), selected)]:
            for start in range(0, len(part), BLOCK_ROWS):
                _hash(part.slice(start, BLOCK_ROWS).chunks, digest, has_files=False)
    return digest.hexdigest()


def checksum_of_values(rows: Iterable[Sequence[Any]]) -> str:
    """Of undecoded images, or of prompts as bytes, of each row in memory."""
    digest, names = hashlib.sha256(), []
    for values in rows:
        digest.update(f"{len(values)} values\n".encode())
        for value in values:
            names += _hash_value(value, digest)
    return _joined(digest.hexdigest(), checksum_of_files(names))


def _joined(*digests: str) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


# ---- Tables -------------------------------------------------------------------------------------------------------


def _blocks(images: datasets.Dataset) -> Iterator[pa.Table]:
    return images.with_format("arrow").iter(batch_size=BLOCK_ROWS)


def _rows_of(parts: list[pa.ChunkedArray], rows: np.ndarray) -> pa.ChunkedArray:
    """Some rows of a column, in any order."""
    kind = pa.large_string() if holds_text(parts[0].type) else parts[0].type  # whose offsets reach beyond 2 GB
    return pa.chunked_array([chunk.cast(kind) for part in parts for chunk in part.chunks]).take(pa.array(rows))


def _facts_of(images: datasets.Dataset) -> dict[str, Any]:
    """A checksum of what is in a table, and whether rows name files."""
    count, digest, has_names = -(-len(images) // BLOCK_ROWS), hashlib.sha256(), False
    for part, names in tqdm(in_threads(_hash_block, _blocks(images)), READING, count, delay=SHOWN_AFTER):
        digest.update(part)
        has_names |= names
    return {"sha256": digest.hexdigest(), "names": has_names}


def _hash_block(block: pa.Table) -> tuple[bytes, bool]:
    """A hash of the values of some rows, and whether they name local files."""
    digest, has_names = hashlib.sha256(), False
    for column in block.columns:
        chunks = without_views(column).chunks
        _hash(chunks, digest, has_files=True)
        has_names |= any(len(local_names(chunk)[0]) for chunk in chunks)
    return digest.digest(), has_names


def _names_in(images: datasets.Dataset) -> list[str]:
    """The names of local files, by column and row. Bytes of images are not read."""
    base, selected = without_selection(images)
    found: dict[str, list[tuple[pa.Array, np.ndarray]]] = {column: [] for column in images.column_names}
    for part in base.with_format("arrow").iter(batch_size=ROUND_ROWS):
        for column, of_column in found.items():
            of_column += [local_names(chunk) for chunk in part.column(column).chunks]
    names: list[str] = []
    for of_column in found.values():
        of_rows = pa.concat_arrays([part for part, _ in of_column])
        if selected is not None:
            counts = np.concatenate([part for _, part in of_column])
            starts = np.cumsum(counts) - counts
            of_rows = of_rows.take(pa.array(spans(starts[selected], counts[selected])))
        names += of_rows.to_pylist()
    return names


def local_names(array: pa.Array) -> tuple[pa.LargeStringArray, np.ndarray]:
    """The local files that rows name, and how many each row names."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return local_names(array.storage)
    if pa.types.is_dictionary(kind):
        return local_names(array.dictionary_decode())
    if _is_list(kind):
        parts = [local_names(piece) for piece in _flat(array)]
        before = np.concatenate([[0], np.cumsum(np.concatenate([counts for _, counts in parts]))])
        lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
        ends = np.cumsum(lengths)
        return pa.concat_arrays([names for names, _ in parts]), before[ends] - before[ends - lengths]
    if _is_image(kind):
        data, path = _children(array)
        are_absent = _are_absent(data)
        counts = np.zeros(len(array), dtype=np.int64)
        names, counts[are_absent.to_numpy(zero_copy_only=False)] = local_names(
            path.filter(are_absent).cast(pa.large_string())
        )
        return names, counts
    if not (holds_text(kind) or pa.types.is_string_view(kind)):
        return pa.array([], pa.large_string()), np.zeros(len(array), dtype=np.int64)
    array = array.cast(pa.large_string())
    are_local = _are_local(array)
    return array.filter(are_local), are_local.to_numpy(zero_copy_only=False).astype(np.int64)


def _hash(chunks: Sequence[pa.Array], digest: Any, *, has_files: bool) -> None:
    """Update a hash with the values of an array, equally in chunks of any size, which are not copied into one: together
    they may have more bytes than offsets reach.

    Args:
        has_files (`bool`): Whether strings may name local files, whose names do not count.
    """
    kind = chunks[0].type
    rest = partial(_hash, digest=digest, has_files=has_files)
    if isinstance(kind, pa.BaseExtensionType):
        rest([chunk.storage for chunk in chunks])
    elif pa.types.is_dictionary(kind):
        rest([chunk.dictionary_decode() for chunk in chunks])
    elif _is_list(kind):
        _update(digest, [pc.list_value_length(chunk) for chunk in chunks])
        rest([piece for chunk in chunks for piece in _flat(chunk)])
    elif _is_image(kind):
        children = [_children(chunk) for chunk in chunks]
        _hash_bytes([data for data, _ in children], digest)
        rest([path.filter(_are_absent(data)).cast(pa.large_string()) for data, path in children])
    elif holds_text(kind) and has_files:
        _hash_urls(chunks, digest)
    elif holds_text(kind) or holds_bytes(kind):
        _hash_bytes([chunk.cast(pa.large_binary()) for chunk in chunks], digest)
    else:
        values = [value for chunk in chunks for value in chunk.to_pylist()]
        digest.update(repr(values).encode("utf-8", "surrogatepass"))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_image(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}


def _flat(array: pa.Array) -> list[pa.Array]:
    """The values of lists. `flatten` would copy them where a list is null."""
    if not array.null_count:
        return [array.flatten()]
    if not pa.types.is_fixed_size_list(array.type):
        offsets = array.offsets.to_numpy()
        if not np.diff(offsets)[array.is_null().to_numpy(zero_copy_only=False)].any():  # nothing is behind the nulls
            return [array.values[offsets[0] : offsets[-1]]]
    return [row.values for row in array if row.is_valid] or [array.values[:0]]


def _children(array: pa.StructArray) -> tuple[pa.LargeBinaryArray, pa.LargeBinaryArray]:
    """Bytes and path of an image's structure; null where the structure is."""
    children = dict(zip([field.name for field in array.type], array.flatten(), strict=True))
    return children["bytes"].cast(pa.large_binary()), children["path"].cast(pa.large_binary())


def _are_absent(data: pa.LargeBinaryArray) -> pa.BooleanArray:
    return pc.equal(pc.binary_length(data), 0).fill_null(True)


def _are_local(array: pa.Array) -> pa.BooleanArray:
    """Which strings name local files; others are URLs."""
    return pc.invert(pc.match_substring(array, "://")).fill_null(False)


def _hash_urls(chunks: Sequence[pa.Array], digest: Any) -> None:
    local = [flag for chunk in chunks for flag in _are_local(chunk).to_pylist()]
    values = [value for chunk in chunks for value in chunk.to_pylist()]
    others = [None if is_local else value for value, is_local in zip(values, local, strict=True)]
    digest.update(json.dumps([local, others]).encode())


def _hash_bytes(chunks: Sequence[pa.LargeBinaryArray], digest: Any) -> None:
    """All lengths, then all bytes, of each chunk in one piece of its buffer."""
    _update(digest, [pc.binary_length(chunk) for chunk in chunks])
    for chunk in chunks:
        _, places, data = chunk.buffers()
        if len(chunk) and data is not None:
            offsets = np.frombuffer(places, dtype=np.int64)
            digest.update(memoryview(data)[offsets[chunk.offset] : offsets[chunk.offset + len(chunk)]])


def _update(digest: Any, lengths: Sequence[pa.Array]) -> None:
    """-1 where there is no value."""
    for part in lengths:
        numbers = part.fill_null(-1).to_numpy(zero_copy_only=False)
        digest.update(np.ascontiguousarray(numbers, dtype="<i8").data)


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
        head, data = "pixels", pixels_of(value)
    elif isinstance(value, bytes | bytearray | memoryview):
        head, data = "bytes", bytes(value)
    else:
        head, data = "other", (value if isinstance(value, str) else repr(type(value))).encode("utf-8", "surrogatepass")
    digest.update(f"{head} {len(data)}\n".encode())
    digest.update(data)
    return []


def pixels_of(image: Image.Image) -> bytes:
    """The pixels that an image in memory is decoded to, upright and as RGB, which it does not keep; that it is
    unreadable, if it is.

    Raises:
        UnreadableImageError: If it cannot be read for a reason that may pass.
    """
    try:
        decoded = decode_image(_opened_again(image))
    except UnreadableImageError:
        raise
    except UndecodableImageError:
        return b"unreadable"
    return repr((decoded.mode, decoded.size)).encode() + decoded.tobytes()


def _opened_again(image: Image.Image) -> Image.Image:
    """Of an image that was opened and not decoded, another one, as an image keeps its pixels once it is decoded."""
    file = image.fp if isinstance(image, ImageFile.ImageFile) else None
    if file is None:
        return image
    try:
        place = file.tell()
        file.seek(0)
        content = file.read()
        file.seek(place)
        again = Image.open(io.BytesIO(content), formats=None if image.format is None else [image.format])
        again.seek(image.tell())
        return again
    except Exception as error:  # decoders and files raise any type
        raise as_undecodable(error, "cannot be read") from error

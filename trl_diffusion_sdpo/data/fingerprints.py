"""Hashes and facts by which prompts, undecoded images, files and streams are recognized."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from ..utils._compat import stream_parts
from ..utils.files import file_facts
from ..utils.identity import short_hash
from .images import as_list

HASHED_BYTES = 2**16  # bytes at the start of an image that are hashed
_COMMIT = re.compile(r"@([0-9a-f]{40})/")  # in addresses of the Hub


def start_of(image: Any) -> bytes:
    """Return size and first bytes of an undecoded image, equal on all machines. Of a URL or a missing file, return the
    name."""
    content = (image.get("bytes") or image.get("path")) if isinstance(image, Mapping) else image
    if isinstance(content, bytes):
        return f"{len(content)} ".encode() + content[:HASHED_BYTES]
    if isinstance(content, str) and os.path.isfile(content):
        with contextlib.suppress(OSError), open(content, "rb") as file:
            return f"{os.path.getsize(content)} ".encode() + file.read(HASHED_BYTES)
    return os.path.basename(str(content)).encode("utf-8", "surrogatepass")


def local_names(column: pa.ChunkedArray | pa.Array) -> list[str]:
    """Return the names of local files in an Arrow column of images, in the order of the rows."""
    if isinstance(column, pa.ChunkedArray):
        return [name for chunk in column.chunks for name in local_names(chunk)]
    if isinstance(column, pa.ExtensionArray):
        return local_names(column.storage)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return local_names(column.flatten())
    if pa.types.is_struct(column.type):
        fields = [field.name for field in column.type]
        if "path" not in fields:
            return []
        paths = pc.struct_field(column, "path")
        return local_names(paths.filter(pc.is_null(pc.struct_field(column, "bytes"))) if "bytes" in fields else paths)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return []
    return [name for name in column.to_pylist() if name and "://" not in name]


def digest_of(text: str) -> int:
    """Return a 64-bit hash of a text, the same on all machines."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big", signed=True)


def facts_if_there(file: str) -> list[str | int] | None:
    """Return size and times of a file, or `None` if it cannot be read."""
    try:
        return file_facts(file)[1:]
    except (OSError, ValueError):
        return None


def short(digest: Any) -> str:
    """Return 16 hexadecimal digits of a hash."""
    return digest.hexdigest()[:16]


def facts_of_streams(sources: Sequence[datasets.IterableDataset]) -> dict[str, Any]:
    """Return a hash of what streams read, equal on all machines, and the commits of their files on the Hub."""
    parts = [part for source in sources for part in stream_parts(source)]
    names = [part for part in parts if isinstance(part, str)]
    files = sorted({_name_of_file(name) for name in names})
    tables = [part for part in parts if isinstance(part, datasets.Dataset)]
    rows = [row for table in tables[:1] for row in table.with_format("arrow")[:1].to_pylist()]
    first = [list(map(start_of, as_list(value))) for row in rows for _, value in sorted(row.items())]
    commits = sorted({commit for name in names for commit in _COMMIT.findall(name)})
    return {"files": short_hash([files, sum(map(len, tables)), first]), "commits": commits or None}


def _name_of_file(name: str) -> str:
    """Return name and size of a local file, or the address of a remote one without its commit and signature."""
    if os.path.isfile(name):
        return f"{os.path.basename(name)} {os.path.getsize(name)}"
    return _COMMIT.sub("/", name.partition("?")[0])

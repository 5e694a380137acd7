"""Input formats: what there is to label, and how its bytes are read.

A source is one object with ``find`` and ``read`` and one row of ``SOURCES``.
"""

from typing import Protocol

import pyarrow as pa

from pipelines.storage import ObjectError, Store
from pipelines.tables import LISTING
from pspnet_core.errors import ConfigError, ImageError
from pspnet_core.images import IMAGE_SUFFIXES

ReadResult = bytes | ImageError
MAX_BYTES = 2**29  # a chunk travels in memory, and Arrow's binary columns end at 2 GiB


class Source(Protocol):
    """One input format."""

    def find(self, store: Store) -> pa.Table:
        """All images below the store's root, as a ``LISTING`` table in the order of their keys."""

    def read(self, store: Store, rows: pa.Table, *, threads: int) -> list[ReadResult]:
        """Encoded bytes of some listed images, or why one has none (kinds ``Changed``, ``Missing``, ``Denied``).

        Raises:
            TransientStorageError: when the storage stays unreachable; that is no fault of an image.
        """


class LooseImages:
    """One object per image; other files below the prefix are left alone."""

    def find(self, store: Store) -> pa.Table:
        """As ``Source.find``."""
        columns: dict[str, list[object]] = {name: [] for name in LISTING.names}
        for item in store.list(suffixes=IMAGE_SUFFIXES):
            for name in columns:
                columns[name].append(getattr(item, name))
        return pa.table(columns, schema=LISTING)

    def read(self, store: Store, rows: pa.Table, *, threads: int) -> list[ReadResult]:
        """As ``Source.read``."""
        listed = list(zip(*(rows[name].to_pylist() for name in ("key", "etag", "bytes")), strict=True))
        wanted = [(key, etag) for key, etag, size in listed if size <= MAX_BYTES]
        results = iter(store.read_many(wanted, threads=threads))
        return [_explained(next(results)) if size <= MAX_BYTES else _too_large(size) for _, _, size in listed]


SOURCES: dict[str, Source] = {"images": LooseImages()}


def _too_large(size: int) -> ImageError:
    return ImageError("TooLarge", f"{size} bytes; at most {MAX_BYTES} are read")


def find_source(name: str) -> Source:
    """The source called ``name``; ConfigError when there is none."""
    if name not in SOURCES:
        raise ConfigError("source", name, f"choose one of {', '.join(SOURCES)}")
    return SOURCES[name]


def _explained(result: bytes | ObjectError) -> ReadResult:
    return ImageError(result.kind, result.message) if isinstance(result, ObjectError) else result

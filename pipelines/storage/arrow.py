"""Arrow tables as bytes: Parquet files, with metadata of ours, and IPC streams."""

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pspnet_core.errors import PspnetError

METADATA_KEY = b"pspnet"
"""Key of our metadata, which is JSON, in a Parquet file's key-value metadata."""

LONGEST_REASON = 200
"""Characters of what Arrow says of a damaged file."""


def to_parquet(
    table: pa.Table,
    *,
    row_groups: Sequence[tuple[int, int]] | None = None,
    metadata: Mapping[str, object] | None = None,
) -> bytes:
    """A table as the bytes of a Parquet file.

    Args:
        row_groups: ``(start, stop)`` rows of each row group; by default one for all.
        metadata: kept as JSON under the key ``pspnet`` of the file's key-value metadata.
    """
    if metadata is not None:
        table = table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata)})
    # Masks do not repeat from row to row: dictionaries would only cost time there.
    repeating = [name for name in ("status", "error", "run_id") if name in table.schema.names]
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", use_dictionary=repeating or False) as writer:
        for start, stop in row_groups if row_groups is not None else [(0, len(table))]:
            writer.write_table(table.slice(start, stop - start), row_group_size=max(1, stop - start))
    return sink.getvalue()


def metadata_of(file: pq.ParquetFile) -> dict[str, Any]:
    """The ``pspnet`` metadata of a file that ``to_parquet`` wrote."""
    return cast(dict[str, Any], json.loads((file.schema_arrow.metadata or {})[METADATA_KEY]))


@contextlib.contextmanager
def damage_told(told: Callable[[str], Exception]) -> Iterator[None]:
    """Raise ``told(reason)`` for what reading a damaged Parquet file, or our metadata in it, raises."""
    try:
        yield
    except PspnetError:
        raise
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's own
            raise
        raise told(" ".join(str(error).split())[:LONGEST_REASON]) from error


def metadata_json(schema: pa.Schema) -> bytes:
    """The ``pspnet`` metadata of a file as it stands there, for ``read_back``; empty where there is none."""
    return bytes((schema.metadata or {}).get(METADATA_KEY, b""))


def to_ipc(table: pa.Table) -> bytes:
    """A table as an Arrow IPC stream, the form in which chunks travel between stages."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return cast(bytes, sink.getvalue().to_pybytes())


def from_ipc(data: bytes) -> pa.Table:
    """The table that ``to_ipc`` wrote."""
    return pa.ipc.open_stream(data).read_all()

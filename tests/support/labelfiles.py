"""Label files as tests compare them: what does not depend on who wrote them, and when."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.storage.arrow import metadata_of


def substance(content: bytes) -> tuple[bytes, pa.Schema, dict[str, Any]]:
    """A label file's values as they lie there, byte by byte, its columns, and its metadata but for the totals."""
    file = pq.ParquetFile(io.BytesIO(content))
    explanation = metadata_of(file)
    explanation.pop("totals")
    footer = int.from_bytes(content[-8:-4], "little")
    return content[: -8 - footer], file.schema_arrow.remove_metadata(), explanation

"""Source ``images``: one object per image."""

from collections.abc import Iterator

import pyarrow as pa

from pipelines.sources.base import ReadResult, Row, batched, read_objects
from pipelines.sources.inputs import Inputs
from pspnet_core.images.decoding import IMAGE_SUFFIXES


class LooseImages:
    """One object per image; other files beside them are left alone."""

    def find(self, inputs: Inputs) -> Iterator[pa.RecordBatch]:
        """As ``Source.find``."""
        objects = inputs.new_objects(IMAGE_SUFFIXES)
        return batched(Row(item.uri, item.key, item.etag, item.bytes) for item in objects)

    def read(self, rows: pa.Table, *, threads: int) -> list[ReadResult]:
        """As ``Source.read``."""
        return read_objects(rows, threads=threads)

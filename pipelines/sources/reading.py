"""Read listed images, and tell the fault of one of them from storage that is away.

Storage is away when it answers nobody. So where an error may be its fault or one image's (no answer after all attempts,
a refusal that names neither), the input that holds the image is asked; if it answers, the image is tried once more.

What only a manifest names lies in no input: its bucket or disk is asked, which a run cannot do without either. A web
server that does not answer is the fault of the lines that name it.
"""

from collections.abc import Sequence

import pyarrow as pa

from pipelines.sources.base import ReadResult, Row, Source, is_named, place_of, rows_of
from pipelines.sources.inputs import Input
from pipelines.storage import ObjectArchived, ObjectDenied, ObjectError, Store
from pspnet_core.errors import ConfigError, ImageError, as_image_error


def read_listed(
    source: Source, rows: pa.Table, *, inputs: Sequence[str], threads: int = 16
) -> list[bytes | ImageError]:
    """Encoded bytes of some listed images, or why one has none, in the order of the rows.

    Args:
        rows: of a ``LISTING`` table.
        inputs: URIs of the folders, globs and objects that were listed.
        threads: upper bound of concurrent reads.

    Raises:
        TransientStorageError, ConfigError: storage answers nobody.
    """
    results = source.read(rows, threads=threads)
    again = _check_answers(rows, results, inputs)
    if again:
        some = rows.take(pa.array(again))
        found = source.read(some, threads=threads)
        _check_answers(some, found, inputs)  # it may have gone away only now
        for index, result in zip(again, found, strict=True):
            results[index] = result
    return [result if isinstance(result, bytes) else _image_error(result) for result in results]


def _check_answers(rows: pa.Table, results: Sequence[ReadResult], inputs: Sequence[str]) -> list[int]:
    """Raise what storage says where it is away; returns the indices of the results that are worth another try."""
    doubtful = [index for index, result in enumerate(results) if _is_doubtful(result)]
    again, troubles = list[int](), dict[str, Exception | None]()
    for index, row in zip(doubtful, rows_of(rows.take(pa.array(doubtful, pa.int64()))), strict=True):
        store = _asked(row, inputs)
        if store is None:
            continue
        if store.root not in troubles:
            troubles[store.root] = store.trouble()
        trouble = troubles[store.root]
        if trouble is None:
            again.append(index)
        elif not is_named(row.uri, row.key) or not store.root.startswith(("http://", "https://", "ftp://")):
            raise trouble
    return again


def _asked(row: Row, inputs: Sequence[str]) -> Store | None:
    """The store to be asked about an image: of the input that holds it, else of its bucket, disk or host; None where a
    manifest names no place at all."""
    if is_named(row.uri, row.key):
        try:
            return place_of(row.uri, row.key)[0]
        except ConfigError:
            return None
    for place in map(Input.parse, inputs):
        if f"{row.uri}/".startswith(f"{place.root.rstrip('/')}/"):
            return place.store
    return place_of(row.uri, row.key)[0]


def _is_doubtful(result: ReadResult) -> bool:
    """Whether the storage may be to blame: it tells some refusals of all from those of one only when it is asked."""
    if isinstance(result, ObjectDenied):
        return not isinstance(result, ObjectArchived)
    return not isinstance(result, bytes | ImageError | ObjectError)


def _image_error(error: Exception) -> ImageError:
    return ImageError(error.kind, error.message) if isinstance(error, ObjectError) else as_image_error(error)

"""Read listed images, and tell the fault of one of them from storage that is away.

Storage is away when it answers nobody. So where an error may be its fault or one image's (no answer after all attempts,
a refusal that names neither), the run's inputs are asked; where one answers, the image is tried once more.
"""

from collections.abc import Sequence
from typing import TypeGuard

import pyarrow as pa

from pipelines.sources.base import ReadResult, Source
from pipelines.sources.inputs import Input
from pipelines.storage import ObjectError, TransientStorageError
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
    doubtful = _check_answers(results, inputs)
    if doubtful:
        again = source.read(rows.take(pa.array(doubtful)), threads=threads)
        _check_answers(again, inputs)  # it may have gone away only now
        for index, result in zip(doubtful, again, strict=True):
            results[index] = result
    return [result if isinstance(result, bytes) else _image_error(result) for result in results]


def _check_answers(results: Sequence[ReadResult], inputs: Sequence[str]) -> list[int]:
    """The indices of the results that may be the storage's fault; raises the first unless one of the inputs answers."""
    doubtful = {index: result for index, result in enumerate(results) if _is_doubtful(result)}
    if doubtful and not any(Input.parse(uri).answers() for uri in inputs):
        raise next(iter(doubtful.values()))
    return list(doubtful)


def _is_doubtful(result: ReadResult) -> TypeGuard[TransientStorageError | ConfigError]:
    return isinstance(result, TransientStorageError | ConfigError)


def _image_error(error: Exception) -> ImageError:
    return ImageError(error.kind, error.message) if isinstance(error, ObjectError) else as_image_error(error)

"""The work on one chunk: encoded images in, rows of the label table out. Pixels live here only.

The walk of a chunk: ``Read`` (bytes from storage) -> ``Segment`` on an actor (decode in threads -> predict in batches
-> statistics and run-length code in threads) -> ``Write`` (one Parquet object, put if absent). Chunks travel between
the three as Arrow IPC streams, one row of Ray Data per chunk.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipelines.chunks import ChunkRow, Work
from pipelines.cluster import Share
from pipelines.sources import ReadResult
from pipelines.tables import CLASS_STATISTIC, LISTING, MASKS, from_ipc, to_ipc
from pipelines.threads import map_ahead
from pspnet_core.errors import ImageError
from pspnet_core.images import decode_image
from pspnet_core.inference import Prediction, Prepared
from pspnet_core.masks import run_lengths, to_png
from pspnet_core.statistics import ClassStatistics, class_statistics, image_confidence


class Predictor(Protocol):
    """What turns decoded images into masks; ``pspnet_core.inference.Segmenter`` is the real one."""

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """Make one ``(H, W, 3)`` uint8 RGB image ready; called in threads."""

    def predict(self, images: Iterable[Prepared]) -> Iterator[Prediction]:
        """Label prepared images, in order."""


class Labelled(NamedTuple):
    """One image's share of a row."""

    shape: tuple[int, int]
    classes: NDArray[np.int32]
    lengths: NDArray[np.int32]
    png: bytes | None
    confidence: float
    statistics: ClassStatistics


class Segment:
    """Stage 2, on an actor that holds the model: from encoded images to rows of the label table.

    Args:
        make_predictor: builds the predictor, once per actor.
        share: what each actor of the pool may use; the threads for decoding, encoding and torch follow from it.
    """

    def __init__(self, work: Work, make_predictor: Callable[[], Predictor], share: Share) -> None:
        threads = share.threads_here()
        torch.set_num_threads(threads)
        self.work = work
        self.predictor = make_predictor()
        self.pool = ThreadPoolExecutor(threads)
        self.depth = 4 * threads + 16
        self.names = pa.array(work.classes.names)
        self.wants_png = work.plan.order.mask in ("png", "both")
        self.wants_rle = work.plan.order.mask in ("rle", "both")

    def __call__(self, row: ChunkRow) -> ChunkRow:
        """Replace ``payload`` by a ``MASKS`` table."""
        cpu, start = Stopwatch(), time.process_time()
        encoded = from_ipc(row["payload"])
        reasons: dict[int, str] = {}
        labelled: dict[int, Labelled] = {}
        for index, result in self._label(encoded, cpu):
            if isinstance(result, ImageError):
                reasons[index] = str(result)
            else:
                labelled[index] = result
        table = self._table(encoded, labelled, reasons)
        return {
            "chunk": row["chunk"],
            "payload": to_ipc(table),
            "images": row["images"],
            "cpu_read": row["cpu_read"],
            "cpu_segment": time.process_time() - start,
            "cpu_decode": cpu.decode,
            "cpu_encode": cpu.encode,
            "labelled": len(labelled),
            "errors": len(reasons),
        }

    def _label(self, encoded: pa.Table, cpu: "Stopwatch") -> Iterator[tuple[int, Labelled | ImageError]]:
        """Each image's outcome, with its index."""
        good: list[int] = []
        bad: list[tuple[int, ImageError]] = []

        def prepared() -> Iterator[Prepared]:
            decoded = map_ahead(self.pool, lambda item: self._decode(item, cpu), _encoded(encoded), depth=self.depth)
            for index, result in enumerate(decoded):
                if isinstance(result, ImageError):
                    bad.append((index, result))
                else:
                    good.append(index)
                    yield result

        predictions = self.predictor.predict(prepared())
        finished = map_ahead(self.pool, lambda item: self._encode(item, cpu), predictions, depth=self.depth)
        for position, result in enumerate(finished):
            yield good[position], result
        yield from bad

    def _decode(self, data: ReadResult, cpu: "Stopwatch") -> Prepared | ImageError:
        start = time.thread_time()
        try:
            if isinstance(data, ImageError):
                return data
            return self.predictor.prepare(decode_image(data, max_pixels=self.work.pixels))
        except ImageError as error:
            return error
        finally:
            cpu.decode += time.thread_time() - start

    def _encode(self, prediction: Prediction, cpu: "Stopwatch") -> Labelled:
        start = time.thread_time()
        mask, confidence = prediction
        classes, lengths = run_lengths(mask)
        labelled = Labelled(
            (mask.shape[0], mask.shape[1]),
            classes,
            lengths,
            to_png(mask, self.work.classes.palette(), classes=len(self.work.classes)) if self.wants_png else None,
            image_confidence(confidence),
            class_statistics(classes, lengths, confidence),
        )
        cpu.encode += time.thread_time() - start
        return labelled

    def _table(self, encoded: pa.Table, labelled: dict[int, Labelled], reasons: dict[int, str]) -> pa.Table:
        """The chunk's rows of the label table, in the order of the plan."""
        count = len(encoded)
        rows = [labelled.get(index) for index in range(count)]
        plan = self.work.plan
        columns = {name: encoded[name] for name in LISTING.names} | {
            "width": [row and row.shape[1] for row in rows],
            "height": [row and row.shape[0] for row in rows],
            "status": ["ok" if row else "error" for row in rows],
            "error": [reasons.get(index) for index in range(count)],
            "mask_classes": _lists([row and row.classes for row in rows], pa.int32(), keep=self.wants_rle),
            "mask_lengths": _lists([row and row.lengths for row in rows], pa.int32(), keep=self.wants_rle),
            "mask_png": [row and row.png for row in rows],
            "confidence": [row and row.confidence for row in rows],
            "class_stats": self._statistics([row and row.statistics for row in rows]),
            "run_id": [plan.run_id] * count,
            "labelled_at": [plan.made] * count,
        }
        return pa.table(columns, schema=MASKS)

    def _statistics(self, rows: Sequence[ClassStatistics | None]) -> pa.ListArray:
        present = [{"class_id": row.class_id} | dict(row.columns) for row in rows if row is not None]

        def joined(name: str, dtype: pa.DataType) -> pa.Array:
            return pa.array(np.concatenate([values[name] for values in present]) if present else [], dtype)

        ids = joined("class_id", pa.int32())
        fields = [ids, self.names.take(ids)]
        fields += [joined(field.name, field.type) for field in list(CLASS_STATISTIC)[len(fields) :]]
        values = pa.StructArray.from_arrays(fields, fields=list(CLASS_STATISTIC))
        return _list_array([None if row is None else len(row.class_id) for row in rows], values)


@dataclass
class Stopwatch:
    """CPU seconds of the threaded stages; a lost addition between threads only blurs a diagnostic figure."""

    decode: float = 0.0
    encode: float = 0.0


def _encoded(table: pa.Table) -> Iterator[ReadResult]:
    for data, error in zip(table["data"], table["error"], strict=True):
        if error.is_valid:
            kind, _, message = error.as_py().partition(": ")
            yield ImageError(kind, message)
        else:
            yield data.as_py()


def _lists(rows: Sequence[NDArray[np.int32] | None], dtype: pa.DataType, *, keep: bool) -> pa.ListArray:
    if not keep:
        return pa.nulls(len(rows), pa.list_(dtype))
    present = [row for row in rows if row is not None]
    values = pa.array(np.concatenate(present) if present else [], dtype)
    return _list_array([None if row is None else len(row) for row in rows], values)


def _list_array(lengths: Sequence[int | None], values: pa.Array) -> pa.ListArray:
    """``values`` cut into lists of the given lengths; None makes a null."""
    offsets = [0, *itertools.accumulate(length or 0 for length in lengths)]
    missing = pa.array([length is None for length in lengths], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=missing)

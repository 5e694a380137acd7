"""The work on one chunk: encoded images in, rows of the label table out. Pixels live here only.

The walk of a chunk: ``Read`` (bytes from storage) -> ``Segment`` on an actor (decode in threads -> predict in batches
-> statistics and run-length code in threads) -> ``Write`` (one Parquet object, put if absent). Chunks travel between
the three as Arrow IPC streams, one row of Ray Data per chunk.

An actor has two chunks under way: while one is with the network, the other one's images are decoded, or its last masks
encoded and its table built, so that the network does not wait between chunks. It takes one chunk's images after the
other's.

A process that dies with a chunk is started again by Ray, with the same chunk. From the second attempt on the chunk has
the process to itself, so that no other one's fault counts as its own, and its images go through ``quarantine`` first.
From the third on each of them is labelled alone before all are labelled together, which tells those that end the
process elsewhere than in decoding. After some attempts that no image is to blame for the run gives up.
"""

import collections
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipelines.cluster.resources import Share
from pipelines.label_table.schema import CLASS_STATISTIC, LISTING, MASKS
from pipelines.labelling.stages.chunks import ChunkRow, Work
from pipelines.labelling.stages.clocks import Start, Stopwatch
from pipelines.labelling.stages.coordinator import ATTEMPTS, ChunkFailed
from pipelines.labelling.stages.quarantine import Decodes, survivors
from pipelines.sources import ReadResult
from pipelines.storage.arrow import from_ipc, to_ipc
from pspnet_core.errors import ImageError
from pspnet_core.images import run_lengths
from pspnet_core.images.decoding import ImageFile, decode_image, open_image
from pspnet_core.images.masks import to_png
from pspnet_core.images.statistics import ClassStatistics, class_statistics, image_confidence
from pspnet_core.inference.inputs import Prepared
from pspnet_core.inference.segmenter import Outcome, Prediction
from pspnet_core.threads import SharedLock, map_ahead

T = TypeVar("T")
R = TypeVar("R")

AHEAD_BYTES = 2**28
"""Decoded images that wait, or predictions, for each thread of an actor and chunk under way; one alone may be more."""

ALONE_FIRST = 3
"""The attempt from which on a chunk's images are labelled one by one before they are labelled together."""
ALONE_ONLY = 5
"""The attempt from which on they are not labelled together any more: that is what ends the process then."""
PLAIN = np.full((64, 64, 3), 128, np.uint8)
"""An image that is nobody's: what ends the process with it is no other image's fault."""


class Predictor(Protocol):
    """What turns decoded images into masks; ``pspnet_core.inference.segmenter.Segmenter`` is the real one."""

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """Make one ``(H, W, 3)`` uint8 RGB image ready; called in threads."""

    def predict(self, images: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, Outcome]]:
        """Label keyed images, in any order. Called by a thread for each chunk; one chunk's images can be drawn when
        the last one's are, though these may not all be labelled."""


@runtime_checkable
class FileDecoder(Protocol):
    """A predictor that decodes files itself, since it knows how many of their pixels it needs."""

    def decode(self, file: ImageFile, /) -> Prepared:
        """Make one image file ready; called in threads. Raises ImageError."""


class Unloadable:
    """Stands for a model whose loading has ended the process too often.

    It is told with the first image, since what goes wrong while an actor is made reaches nobody as itself.
    """

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """Raises ChunkFailed."""
        raise ChunkFailed(
            f"loading the model ended its process {ATTEMPTS} times: look for the reason in the workers' logs (too "
            "little memory? fewer --workers leave more for each)"
        )

    def predict(self, images: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, Outcome]]:
        """Nothing, of no images."""
        return iter(())


class Labelled(NamedTuple):
    """One image's share of a row."""

    shape: tuple[int, int]
    classes: NDArray[np.int32]
    lengths: NDArray[np.int32]
    png: bytes | None
    confidence: float
    statistics: ClassStatistics


Result = Labelled | ImageError
Label = Callable[[Iterable[tuple[int, ReadResult]]], Iterator[tuple[int, Result]]]
"""From encoded images to their outcomes, by index."""


class Segment:
    """Stage 2, on an actor that holds the model: from encoded images to rows of the label table.

    Args:
        make_predictor: builds the predictor, once per actor.
        share: what each actor of the pool may use; the threads for decoding, encoding and torch follow from it.
    """

    def __init__(self, work: Work, make_predictor: Callable[[], Predictor], share: Share) -> None:
        self.share, self.told = share, time.monotonic()
        threads = share.threads_here()
        torch.set_num_threads(threads)
        self.work = work
        self.predictor = self._load(make_predictor)
        self.files = self.predictor if isinstance(self.predictor, FileDecoder) else None
        self.room, self.turn, self.telling = SharedLock(), threading.Lock(), threading.Lock()
        self.pool = ThreadPoolExecutor(threads)
        self.depth, self.most = 4 * threads + 16, threads * AHEAD_BYTES
        self.names = pa.array(work.classes.names)
        self.wants_png = work.stamp.mask in ("png", "both")
        self.wants_rle = work.stamp.mask in ("rle", "both")
        self.told_cpu = time.process_time()

    def _load(self, make_predictor: Callable[[], Predictor]) -> Predictor:
        if self.work.coordinator.start() > ATTEMPTS:
            return Unloadable()
        predictor = make_predictor()
        self.work.coordinator.started()
        return predictor

    def __call__(self, row: ChunkRow) -> ChunkRow:
        """Replace ``payload`` by a ``MASKS`` table.

        Raises:
            ChunkFailed: too many attempts have ended in the death of the process.
        """
        encoded, watch = from_ipc(row["payload"]), Stopwatch()
        if not len(encoded):
            return row | self._segmented(encoded, (), watch)
        with contextlib.ExitStack() as room:
            attempt = self._begin(row["chunk"], room)
            done = self._segmented(encoded, self._outcomes(encoded, row["chunk"], attempt, watch), watch)
            self.work.coordinator.done(row["chunk"])
        return row | done

    def _begin(self, chunk: int, room: contextlib.ExitStack) -> int:
        """Which attempt this is, once the process has room for it: from the second on for it alone."""
        room.enter_context(self.room.shared())
        attempt = self.work.coordinator.begin(chunk)
        if attempt > 1:
            self.work.coordinator.withdraw(chunk)
            room.close()
            room.enter_context(self.room.alone())
            attempt = self.work.coordinator.begin(chunk)
        return attempt

    def _segmented(self, encoded: pa.Table, outcomes: Iterable[tuple[int, Result]], watch: Stopwatch) -> ChunkRow:
        """What segmenting adds to a chunk's row, or replaces in it."""
        reasons: dict[int, ImageError] = {}
        labelled: dict[int, Labelled] = {}
        for index, result in outcomes:
            if isinstance(result, ImageError):
                reasons[index] = result
            else:
                labelled[index] = result
        return {
            "payload": to_ipc(self._table(encoded, labelled, reasons)),
            "labelled": len(labelled),
            "errors": len(reasons),
            "kinds": " ".join(error.kind for error in reasons.values()),
            **self._spent(watch),
        }

    def _spent(self, watch: Stopwatch) -> dict[str, float]:
        """The watch's counters, and seconds of this actor, its GPUs and its CPUs since it told last, or was made.

        What chunks side by side have used of the process is told once, by the one that is done first.
        """
        with self.telling:
            watch.process, self.told_cpu = self.told_cpu, time.process_time()
            before, self.told = self.told, time.monotonic()
            seconds = self.told - before
            held = {"actor": 1.0, "gpu": self.share.gpus, "cpu": self.share.cpus}
            return watch.spent() | {f"held_{what}": seconds * each for what, each in held.items()}

    def _outcomes(self, encoded: pa.Table, chunk: int, attempt: int, watch: Stopwatch) -> Iterator[tuple[int, Result]]:
        """Each image's outcome, with its index; those that have ended processes are errors."""
        decodes = Decodes(lambda index: str(encoded["uri"][index]))
        label = partial(self._label, watch=watch, decodes=decodes)
        with decodes.watched():
            if attempt == 1:
                yield from label(enumerate(_encoded(encoded)))
                return
            deadly = self.work.coordinator.deadly(chunk)
            images = survivors(_without(deadly, _encoded(encoded)), pixels=self.work.pixels)
            if attempt < ALONE_FIRST:
                yield from label(enumerate(images))
            else:
                yield from self._outcomes_of_suspects(list(images), chunk, attempt, label)

    def _outcomes_of_suspects(
        self, images: Sequence[ReadResult], chunk: int, attempt: int, label: Label
    ) -> Iterator[tuple[int, Result]]:
        """As ``_outcomes``, once something else than decoding has ended the process.

        Who shares a forward pass with whom may change the last bits of a mask. So what images come to alone counts only
        where they cannot be together.
        """
        alone = self._alone(images, chunk, label)
        if attempt >= ALONE_ONLY:
            yield from alone
        else:
            collections.deque(alone, maxlen=0)
            yield from label(enumerate(images))

    def _alone(self, images: Sequence[ReadResult], chunk: int, label: Label) -> Iterator[tuple[int, Result]]:
        """Each image's outcome when nothing is in hand but this image, which the coordinator is told before."""
        collections.deque(self.predictor.predict([(0, self.predictor.prepare(PLAIN))]), maxlen=0)
        for index, image in enumerate(images):
            self.work.coordinator.announce(chunk, index)
            yield from label([(index, image)])
        self.work.coordinator.announce(chunk, None)

    def _label(
        self, images: Iterable[tuple[int, ReadResult]], watch: Stopwatch, decodes: Decodes
    ) -> Iterator[tuple[int, Result]]:
        """Each image's outcome, with the index that came with it."""
        bad: list[tuple[int, ImageError]] = []

        def opened() -> Iterator[tuple[int, ImageFile | ImageError]]:
            for index, data in images:
                with decodes.of(index):
                    file = self._open(data)
                yield index, file

        def decode(item: tuple[int, ImageFile | ImageError]) -> tuple[int, Prepared | ImageError]:
            index, file = item
            with decodes.of(index):
                return index, self._decode(file, watch)

        def prepared() -> Iterator[tuple[int, Prepared]]:
            for index, result in self._in_threads(decode, opened(), lambda item: _size(item[1])):
                if isinstance(result, ImageError):
                    bad.append((index, result))
                else:
                    yield index, result

        # Decoded before it is the chunk's turn, as far as the depth goes.
        with contextlib.closing(self._in_turn(_begun(prepared()))) as ready:
            outcomes = watch.waiting("predict", self.predictor.predict(watch.waiting("images", ready)))
            yield from self._in_threads(
                lambda item: (item[0], self._encode(item[1], watch)), outcomes, lambda item: _size(item[1])
            )
        yield from bad

    def _in_threads(self, function: Callable[[T], R], items: Iterable[T], size: Callable[[T], int]) -> Iterator[R]:
        """``map``, some images ahead."""
        return map_ahead(self.pool, function, items, depth=self.depth, weight=size, most=self.most)

    def _in_turn(self, items: Iterable[T]) -> Generator[T, None, None]:
        """The same items, one chunk's after the other's."""
        with self.turn:
            yield from items

    def _open(self, data: ReadResult) -> ImageFile | ImageError:
        """With its header read, which tells how much memory it will take."""
        try:
            return data if isinstance(data, ImageError) else open_image(data, max_pixels=self.work.pixels)
        except ImageError as error:
            return error

    def _decode(self, file: ImageFile | ImageError, watch: Stopwatch) -> Prepared | ImageError:
        start = Start.now()
        try:
            if isinstance(file, ImageError):
                return file
            if self.files:
                return self.files.decode(file)
            return self.predictor.prepare(decode_image(file))
        except ImageError as error:
            return error
        finally:
            watch.add("decode", start)

    def _encode(self, outcome: Outcome, watch: Stopwatch) -> Result:
        if isinstance(outcome, ImageError):
            return outcome
        start = Start.now()
        mask, confidence = outcome
        classes, lengths = run_lengths.encode(mask)
        labelled = Labelled(
            (mask.shape[0], mask.shape[1]),
            classes,
            lengths,
            to_png(mask, self.work.classes.palette(), classes=len(self.work.classes)) if self.wants_png else None,
            image_confidence(confidence),
            class_statistics(classes, lengths, confidence),
        )
        watch.add("encode", start)
        return labelled

    def _table(self, encoded: pa.Table, labelled: dict[int, Labelled], reasons: dict[int, ImageError]) -> pa.Table:
        """The chunk's rows of the label table, in the order of the plan."""
        count = len(encoded)
        rows = [labelled.get(index) for index in range(count)]
        stamp = self.work.stamp
        columns = {name: encoded[name] for name in LISTING.names} | {
            "width": [row and row.shape[1] for row in rows],
            "height": [row and row.shape[0] for row in rows],
            "status": ["ok" if row else "error" for row in rows],
            "error": [str(reasons[index]) if index in reasons else None for index in range(count)],
            "mask_classes": _lists([row and row.classes for row in rows], pa.int32(), keep=self.wants_rle),
            "mask_lengths": _lists([row and row.lengths for row in rows], pa.int32(), keep=self.wants_rle),
            "mask_png": [row and row.png for row in rows],
            "confidence": [row and row.confidence for row in rows],
            "class_stats": self._statistics([row and row.statistics for row in rows]),
            "run_id": [stamp.run_id] * count,
            "labelled_at": [stamp.made] * count,
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


def _size(item: ImageFile | Outcome) -> int:
    """Bytes of an image, once it is decoded, or of a prediction."""
    if isinstance(item, Prediction):
        return item.mask.nbytes + item.confidence.nbytes
    return item.nbytes if isinstance(item, ImageFile) else 0


def _begun(items: Iterator[T]) -> Iterator[T]:
    """The same items; the first is asked for now."""
    return itertools.chain(list(itertools.islice(items, 1)), items)


def _without(deadly: Collection[int], images: Iterable[ReadResult]) -> Iterator[ReadResult]:
    """The same images; those that have ended processes are errors."""
    for index, image in enumerate(images):
        yield ImageError("Crashed", "labelling it alone ends the process") if index in deadly else image


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

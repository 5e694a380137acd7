"""Stage 2, on an actor that holds the model: from encoded images to rows of the label table. Pixels live here only.

The walk of an image, which keeps its index in the chunk all the way: read the header -> decode in threads -> predict
in batches -> run lengths and statistics in threads -> a row.

An actor has two chunks under way: while one is with the network, the other one's images are decoded, or its last masks
encoded and its table built, so that the network does not wait between chunks. It takes one chunk's images after the
other's.

A process that dies with a chunk is started again, with the same chunk; ``coordinator`` has the rules.
"""

import collections
import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch

from pipelines.cluster.machine import LocalResources
from pipelines.labelling.report.totals import Totals
from pipelines.labelling.stages.chunks import Chunk, RunContext
from pipelines.labelling.stages.clocks import Start, Stopwatch
from pipelines.labelling.stages.coordinator import ATTEMPTS, Attempt
from pipelines.labelling.stages.predictor import FileDecoder, Predictor, Unloadable
from pipelines.labelling.stages.quarantine import DecodeWatch, QuarantineFailed, end_process, survivors
from pipelines.labelling.stages.rows import Labelled, RowMaker
from pipelines.sources import ReadResult
from pspnet_core.errors import ImageError
from pspnet_core.images.decoding import ImageFile, decode_image, open_image
from pspnet_core.inference.inputs import Prepared
from pspnet_core.inference.segmenter import Outcome, Prediction
from pspnet_core.threads import SharedLock, map_ahead

T = TypeVar("T")
R = TypeVar("R")
Result = Labelled | ImageError

AHEAD_BYTES = 2**28
"""Decoded images that wait, or predictions, for each thread of an actor and chunk under way; one alone may be more."""

PLAIN = np.full((64, 64, 3), 128, np.uint8)
"""A grey image, predicted before others are tried alone: a process that it ends is no image's fault."""


class Segment:
    """Stage 2.

    Args:
        make_predictor: builds the predictor, once per actor.
        resources: what the actor may use; the threads for decoding, encoding and torch follow from it.
    """

    def __init__(self, context: RunContext, make_predictor: Callable[[], Predictor], resources: LocalResources) -> None:
        self.resources, self.told = resources, time.monotonic()
        torch.set_num_threads(resources.threads)
        self.context = context
        self.rows = RowMaker(provenance=context.provenance, classes=context.classes)
        self.predictor = self._load(make_predictor)
        self.files = self.predictor if isinstance(self.predictor, FileDecoder) else None
        self.room, self.turn, self.telling = SharedLock(), threading.Lock(), threading.Lock()
        self.pool = ThreadPoolExecutor(resources.threads)
        self.depth, self.most = 4 * resources.threads + 16, resources.threads * AHEAD_BYTES
        self.told_cpu = time.process_time()

    def _load(self, make_predictor: Callable[[], Predictor]) -> Predictor:
        if self.context.coordinator.start() > ATTEMPTS:
            return Unloadable()
        predictor = make_predictor()
        self.context.coordinator.started()
        return predictor

    def __call__(self, chunk: Chunk) -> Chunk:
        """Replace the ``ENCODED`` table by a ``MASKS`` table."""
        watch = Stopwatch()
        if not len(chunk.table):
            return replace(chunk, table=self.rows.table(chunk.table, {}), totals=chunk.totals + self._spent(watch))
        with self._attempt(chunk.number) as attempt:
            try:
                results = dict(self._results(chunk, attempt, watch))
            except QuarantineFailed as error:  # attempts are counted by the deaths of processes, and bounded
                self.context.coordinator.explain(chunk.number, f"{error}")
                end_process(f"{error}")
                raise
            table = self.rows.table(chunk.table, results)
            self.context.coordinator.done(chunk.number)
        errors = Counter(result.kind for result in results.values() if isinstance(result, ImageError))
        labelled = len(results) - errors.total()
        gave_up = attempt.gives_up or (attempt.is_alone and not labelled)
        counted = Totals(labelled=labelled, kinds=errors, given_up=int(gave_up))
        return replace(chunk, table=table, totals=chunk.totals + counted + self._spent(watch))

    @contextlib.contextmanager
    def _attempt(self, chunk: int) -> Iterator[Attempt]:
        """An attempt at a chunk; one that has failed before waits until it has the process to itself."""
        failed = self.context.coordinator.has_failed(chunk)
        with self.room.alone() if failed else self.room.shared():
            yield self.context.coordinator.begin(chunk)

    def _results(self, chunk: Chunk, attempt: Attempt, watch: Stopwatch) -> Iterator[tuple[int, Result]]:
        """What becomes of each image, by its index."""
        images = enumerate(_encoded(chunk.table))
        with DecodeWatch(lambda index: str(chunk.table["uri"][index])).running() as decodes:
            if attempt.number == 1:
                yield from self._label(images, watch, decodes)
                return
            # Of the last attempt at most those are left that have been decoded and labelled before.
            tried = images if attempt.gives_up else survivors(images, max_pixels=self.context.max_pixels)
            if attempt.is_alone:
                yield from self._label_alone(chunk.number, tried, attempt, watch, decodes)
            else:
                yield from self._label(tried, watch, decodes)

    def _label_alone(
        self,
        chunk: int,
        images: Iterable[tuple[int, ReadResult]],
        attempt: Attempt,
        watch: Stopwatch,
        decodes: DecodeWatch,
    ) -> Iterator[tuple[int, Result]]:
        """As ``_label``, one image at a time, announced before; images that have not survived yet come first."""
        tried = []
        for index, image in sorted(images, key=lambda item: item[0] in attempt.good):
            if isinstance(image, ImageError):
                yield index, image
            elif reason := _refused(index, attempt):
                yield index, ImageError("Crashed", reason)
            else:
                tried.append((index, image))
        if tried:
            collections.deque(self.predictor.predict([(0, self.predictor.prepare(PLAIN))]), maxlen=0)
        for index, image in tried:
            self.context.coordinator.announce(chunk, index)
            yield from self._label([(index, image)], watch, decodes)
        self.context.coordinator.announce(chunk, None)

    def _label(
        self, images: Iterable[tuple[int, ReadResult]], watch: Stopwatch, decodes: DecodeWatch
    ) -> Iterator[tuple[int, Result]]:
        """The outcome of each image, by its index; images share forward passes."""
        failed: list[tuple[int, ImageError]] = []

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
            for index, result in self._in_threads(decode, opened()):
                if isinstance(result, ImageError):
                    failed.append((index, result))
                else:
                    yield index, result

        # Before the chunk's turn its first image is decoded, and as many others as the depth allows.
        with contextlib.closing(self._in_turn(_begun(prepared()))) as ready:
            outcomes = watch.waiting("predict", self.predictor.predict(watch.waiting("images", ready)))
            yield from self._in_threads(lambda item: (item[0], self._encode(item[1], watch)), outcomes)
        yield from failed

    def _in_threads(
        self, function: Callable[[tuple[int, T]], tuple[int, R]], items: Iterable[tuple[int, T]]
    ) -> Iterator[tuple[int, R]]:
        """``map``, some images ahead."""
        return map_ahead(
            self.pool, function, items, depth=self.depth, weight=lambda item: _size(item[1]), most=self.most
        )

    def _in_turn(self, items: Iterable[T]) -> Generator[T, None, None]:
        """The same items, one chunk's after the other's."""
        with self.turn:
            yield from items

    def _open(self, data: ReadResult) -> ImageFile | ImageError:
        """The image with its header read, which gives its size in memory."""
        try:
            return data if isinstance(data, ImageError) else open_image(data, max_pixels=self.context.max_pixels)
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
        labelled = self.rows.label(outcome)
        watch.add("encode", start)
        return labelled

    def _spent(self, watch: Stopwatch) -> Totals:
        """The watch's seconds, and those of this actor, its GPUs and its CPUs since it told last, or was made.

        Of chunks side by side the one that is done first reports what both have used of the process.
        """
        with self.telling:
            watch.process, self.told_cpu = self.told_cpu, time.process_time()
            before, self.told = self.told, time.monotonic()
            seconds = self.told - before
            held = {"actor": 1.0, "gpu": self.resources.gpus, "cpu": self.resources.cpus}
            return watch.spent() + Totals(held=Counter({what: seconds * each for what, each in held.items()}))


def _refused(index: int, attempt: Attempt) -> str:
    """Why an image is not tried alone (any more); nothing where it is."""
    if index in attempt.deadly:
        return "labelling it alone ends the process"
    if attempt.gives_up and index not in attempt.good:
        reason = attempt.reason or "which may be another's fault"
        return f"its chunk ended the process that labels it {attempt.number - 1} times, {reason}"
    return ""


def _size(item: object) -> int:
    """Bytes of an image, once it is decoded, or of a prediction."""
    if isinstance(item, Prediction):
        return item.mask.nbytes + item.confidence.nbytes
    return item.nbytes if isinstance(item, ImageFile) else 0


def _begun(items: Iterator[T]) -> Iterator[T]:
    """The same items; the first is asked for now."""
    return itertools.chain(list(itertools.islice(items, 1)), items)


def _encoded(table: pa.Table) -> Iterator[ReadResult]:
    for data, error in zip(table["data"], table["error"], strict=True):
        if error.is_valid:
            kind, _, message = error.as_py().partition(": ")
            yield ImageError(kind, message)
        else:
            yield data.as_py()

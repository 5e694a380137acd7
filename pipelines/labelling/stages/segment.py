"""Stage 2, on an actor that holds the model: from encoded images to rows of the label table. Pixels live here only.

The walk of an image, which keeps its index in the chunk all the way: read the header -> decode in threads -> predict
in batches -> run lengths and statistics in threads -> a row.

An actor has two chunks under way: while one is with the network, the other one's images are decoded, or its last masks
encoded and its table built, so that the network does not wait between chunks. It takes one chunk's images after the
other's.

A process that dies with a chunk is started again, with the same chunk; ``coordinator`` has the rules. Where the model
raises an error, its images are labelled one at a time, and an image of which it raises one alone is an error row. Where
the model then cannot label a plain image either, the process ends, as after an error that a GPU does not get over.
"""

import contextlib
import itertools
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NoReturn, TypeVar

import numpy as np
import pyarrow as pa
import torch

from pipelines.cluster.machine import LocalResources
from pipelines.labelling.report.totals import Totals
from pipelines.labelling.stages.chunks import Chunk, RunContext
from pipelines.labelling.stages.clocks import Start, Stopwatch
from pipelines.labelling.stages.coordinator import ATTEMPTS, Attempt, LoadingFailed
from pipelines.labelling.stages.predictor import FileDecoder, Predictor, Unloadable
from pipelines.labelling.stages.quarantine import QuarantineFailed, survivors
from pipelines.labelling.stages.rows import Labelled, RowMaker
from pipelines.labelling.stages.watchdog import Passing, Watchdog, end_process
from pspnet_core.errors import ImageError, PspnetError, as_image_error
from pspnet_core.images.decoding import ImageFile, decode_image, open_image
from pspnet_core.inference.inputs import Prepared
from pspnet_core.inference.segmenter import Outcome, Prediction
from pspnet_core.threads import SharedLock, map_ahead

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")
Encoded = bytes | ImageError
Result = Labelled | ImageError

AHEAD_BYTES = 2**28
"""Decoded images that wait, or predictions, for each thread of an actor and chunk under way; one alone may be more."""

PLAIN = np.full((64, 64, 3), 128, np.uint8)
"""A grey image, predicted before others are tried again: what it does to a new process is no image's fault."""


class ModelFailed(PspnetError):
    """The model labels nothing."""


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
        self.watchdogs: set[Watchdog] = set()  # of the chunks under way
        if isinstance(self.predictor, Passing):
            self.predictor.on_pass = self._on_pass
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
            results = self._results(chunk, attempt, watch)
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

    def _results(self, chunk: Chunk, attempt: Attempt, watch: Stopwatch) -> dict[int, Result]:
        """What becomes of each image, by its index."""
        label = self._label_alone if attempt.is_alone else self._label_together
        with self._watched(chunk, attempt) as dog:
            if attempt.number > 1 and not attempt.gives_up:
                self._check_new_process(dog)
            try:
                return dict(label(chunk, attempt, watch, dog))
            except QuarantineFailed as error:
                self._end_process(chunk.number, error)

    @contextlib.contextmanager
    def _watched(self, chunk: Chunk, attempt: Attempt) -> Iterator[Watchdog]:
        """A watchdog over a chunk; what the quarantine lets pass may take longer in here than in there."""
        dog = Watchdog(
            lambda index: str(chunk.table["uri"][index]),
            lambda reason: self._explain_and_end(chunk.number, reason),
            slack=1 if attempt.number == 1 else 2,
        )
        self.watchdogs.add(dog)
        try:
            with dog.running():
                yield dog
        finally:
            self.watchdogs.remove(dog)

    def _on_pass(self, pixels: int) -> None:
        for dog in self.watchdogs.copy():
            dog.on_pass(pixels)

    def _tried(self, chunk: Chunk, attempt: Attempt) -> Iterator[tuple[int, Encoded]]:
        """The chunk's images with their indices; from the second attempt on those that survive their decoding."""
        images = ((index, attempt.to_blame.get(index, image)) for index, image in enumerate(_encoded(chunk.table)))
        # Of the last attempt at most those are left that have been decoded and labelled before.
        if attempt.number == 1 or attempt.gives_up:
            yield from images
            return
        for index, image in survivors(images, max_pixels=self.context.max_pixels, threads=self.resources.threads):
            if isinstance(image, ImageError):
                self.context.coordinator.blame(chunk.number, index, image)
            yield index, image

    def _label_together(
        self, chunk: Chunk, attempt: Attempt, watch: Stopwatch, dog: Watchdog
    ) -> Iterator[tuple[int, Result]]:
        """The outcome of each image; images share forward passes, unless the model raises an error of one."""
        try:
            yield from list(self._label(self._tried(chunk, attempt), watch, dog))
        except PspnetError:
            raise
        except Exception as error:
            log.warning("%r while a chunk's images are labelled together; now they are labelled one at a time", error)
            self._check_model(chunk.number, error, dog)
            for index, image in self._tried(chunk, attempt):
                yield index, self._label_one(chunk.number, (index, image), watch, dog)

    def _label_alone(
        self, chunk: Chunk, attempt: Attempt, watch: Stopwatch, dog: Watchdog
    ) -> Iterator[tuple[int, Result]]:
        """The outcome of each image, one at a time, announced before; those that have not survived yet come first."""
        tried = []
        for index, image in sorted(self._tried(chunk, attempt), key=lambda item: item[0] in attempt.good):
            if isinstance(image, ImageError):
                yield index, image
            elif attempt.gives_up and index not in attempt.good:
                yield index, _given_up(attempt)
            else:
                tried.append((index, image))
        for index, image in tried:
            self.context.coordinator.announce(chunk.number, index)
            yield index, self._label_one(chunk.number, (index, image), watch, dog)
        self.context.coordinator.announce(chunk.number, None)

    def _label_one(self, chunk: int, image: tuple[int, Encoded], watch: Stopwatch, dog: Watchdog) -> Result:
        """The outcome of one image; an error that it raises is its own."""
        try:
            ((_, result),) = self._label([image], watch, dog)
            return result
        except PspnetError:
            raise
        except Exception as error:
            self._check_model(chunk, error, dog)
            return as_image_error(error)

    def _predict_plain(self, dog: Watchdog) -> None:
        """Raise what keeps the model from labelling a plain image."""
        for _, outcome in dog.outcomes(self.predictor.predict([(0, self.predictor.prepare(PLAIN))])):
            if isinstance(outcome, ImageError):
                raise outcome

    def _check_new_process(self, dog: Watchdog) -> None:
        """Raise ModelFailed where the model labels nothing even now that it has been loaded anew."""
        try:
            self._predict_plain(dog)
        except LoadingFailed:
            raise
        except Exception as error:
            raise ModelFailed(
                f"the model labels no image, in a new process either ({as_image_error(error).message}): look for the "
                "reason in the workers' logs (too little memory? --batch 1 needs the least)"
            ) from error

    def _check_model(self, chunk: int, error: Exception, dog: Watchdog) -> None:
        """End the process where, after an error, the model cannot label a plain image any more."""
        try:
            self._predict_plain(dog)
        except Exception:
            self._end_process(chunk, error)

    def _end_process(self, chunk: int, error: Exception) -> NoReturn:
        """End the process because of an error; the deaths of processes are a chunk's attempts, which are bounded."""
        reason = str(error) if isinstance(error, PspnetError) else as_image_error(error).message
        self._explain_and_end(chunk, ImageError("Crashed", reason))
        raise error

    def _explain_and_end(self, chunk: int, reason: ImageError) -> None:
        try:
            self.context.coordinator.explain(chunk, reason)
        finally:  # nobody may be there to hear it
            end_process(reason.message)

    def _label(
        self, images: Iterable[tuple[int, Encoded]], watch: Stopwatch, dog: Watchdog
    ) -> Iterator[tuple[int, Result]]:
        """The outcome of each image, by its index; images share forward passes."""
        failed: list[tuple[int, ImageError]] = []

        def opened() -> Iterator[tuple[int, ImageFile | ImageError]]:
            for index, data in images:
                with dog.decoding(index):
                    file = self._open(data)
                yield index, file

        def decode(item: tuple[int, ImageFile | ImageError]) -> tuple[int, Prepared | ImageError]:
            index, file = item
            with dog.decoding(index):
                return index, self._decode(file, watch)

        def prepared() -> Iterator[tuple[int, Prepared]]:
            for index, result in self._in_threads(decode, opened()):
                if isinstance(result, ImageError):
                    failed.append((index, result))
                else:
                    yield index, result

        # Before the chunk's turn its first image is decoded, and as many others as the depth allows.
        with contextlib.closing(self._in_turn(_begun(prepared()))) as ready:
            asked = dog.images(watch.waiting("images", ready))
            outcomes = watch.waiting("predict", dog.outcomes(self.predictor.predict(asked)))
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

    def _open(self, data: Encoded) -> ImageFile | ImageError:
        """The image with its header read, which gives its size in memory."""
        try:
            return data if isinstance(data, ImageError) else open_image(data, max_pixels=self.context.max_pixels)
        except Exception as error:
            return _as_its_own(error)

    def _decode(self, file: ImageFile | ImageError, watch: Stopwatch) -> Prepared | ImageError:
        start = Start.now()
        try:
            if isinstance(file, ImageError):
                return file
            if self.files:
                return self.files.decode(file)
            return self.predictor.prepare(decode_image(file))
        except Exception as error:
            return _as_its_own(error)
        finally:
            watch.add("decode", start)

    def _encode(self, outcome: Outcome, watch: Stopwatch) -> Result:
        if isinstance(outcome, ImageError):
            return outcome
        start = Start.now()
        try:
            if not math.isfinite(outcome.confidence.max()):  # which is NaN where one of them is
                return ImageError("NotFinite", "the network's answer holds what is no number")
            return self.rows.label(outcome)
        except Exception as error:
            return _as_its_own(error)
        finally:
            watch.add("encode", start)

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


def _as_its_own(error: Exception) -> ImageError:
    """An error that one image has raised as its own, unless it is known to be another's."""
    if isinstance(error, PspnetError) and not isinstance(error, ImageError):
        raise error
    return as_image_error(error)


def _given_up(attempt: Attempt) -> ImageError:
    """What is said of an image that is not tried any more."""
    reason = attempt.reason or "which may be another's fault"
    return ImageError("Crashed", f"its chunk ended the process that labels it {attempt.number - 1} times, {reason}")


def _size(item: object) -> int:
    """Bytes of an image, once it is decoded, or of a prediction."""
    if isinstance(item, Prediction):
        return item.mask.nbytes + item.confidence.nbytes
    return item.nbytes if isinstance(item, ImageFile) else 0


def _begun(items: Iterator[T]) -> Iterator[T]:
    """The same items; the first is asked for now."""
    return itertools.chain(list(itertools.islice(items, 1)), items)


def _encoded(table: pa.Table) -> Iterator[Encoded]:
    for data, error in zip(table["data"], table["error"], strict=True):
        if error.is_valid:
            kind, _, message = error.as_py().partition(": ")
            yield ImageError(kind, message)
        else:
            yield data.as_py()

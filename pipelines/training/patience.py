"""Waiting for storage that is away for longer than a request's own retries last, as training does.

A training run holds what hours have made: rather than fail, its workers wait for their data to come back.
"""

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import tenacity

from pipelines.datasets.dataset import Dataset, Pair, Reader, Sample
from pipelines.storage import Store, TransientStorageError

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE_S = 600.0
"""How long training waits for a storage that does not answer."""


class Patience:
    """Repeats what storage does not answer, until it does or the outage has lasted too long.

    An outage begins with a call that fails and ends with the next one that succeeds, whichever threads make them; each
    of the two is told once. Safe to share between threads; a copy in another process starts afresh.

    Args:
        seconds: how long an outage may last.
    """

    def __init__(self, seconds: float = PATIENCE_S) -> None:
        self.seconds = seconds
        self._since = math.inf
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.seconds,)

    def outlast(self, action: Callable[[], T]) -> T:
        """``action()``, which must bear being repeated.

        Raises:
            TransientStorageError: the outage has lasted too long.
        """

        def attempt() -> T:
            try:
                result = action()
            except TransientStorageError as error:
                self._begun(error)
                raise
            self._ended()
            return result

        retrying = tenacity.Retrying(
            # Of this call, and of the outage: a call that comes late has no patience of its own.
            stop=lambda state: max(state.seconds_since_start or 0.0, self._lasted) >= self.seconds,
            wait=tenacity.wait_exponential(multiplier=1, max=15) + tenacity.wait_random(0, 1),
            retry=tenacity.retry_if_exception_type(TransientStorageError),
            reraise=True,
        )
        return retrying(attempt)

    @property
    def _lasted(self) -> float:
        """Seconds since the outage began; minus infinity when there is none."""
        return time.monotonic() - self._since

    def _begun(self, error: TransientStorageError) -> None:
        with self._lock:
            if self._since == math.inf:
                self._since = time.monotonic()
                log.warning("storage does not answer, training waits for up to %g s: %s", self.seconds, error)

    def _ended(self) -> None:
        with self._lock:
            if self._since < math.inf:
                log.warning("storage answers again after %.0f s", self._lasted)
                self._since = math.inf


class _PatientReader:
    """Another reader, with patience."""

    def __init__(self, reader: Reader, patience: Patience) -> None:
        self._reader, self._patience = reader, patience

    def fetch(self, store: Store, pair: Pair) -> Sample:
        """As ``Reader.fetch``."""
        return self._patience.outlast(lambda: self._reader.fetch(store, pair))

    def block(self, pair: Pair) -> str:
        """As ``Reader.block``."""
        return self._reader.block(pair)


def patient(dataset: Dataset, *, seconds: float = PATIENCE_S) -> Dataset:
    """The same data set, of which ``read`` and ``fetch`` outlast an outage of so many seconds."""
    return dataclasses.replace(dataset, reader=_PatientReader(dataset.reader, Patience(seconds)))

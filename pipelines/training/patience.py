"""Training data in storage that is away for longer than a request's own retries last.

A training run holds what hours have made: rather than fail, its workers wait for their data to come back.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from pipelines.datasets.dataset import Dataset, Pair, Reader, Sample
from pipelines.process.retrying import Outage, Retries
from pipelines.storage import Store
from pipelines.storage.base import is_transient

T = TypeVar("T")

PATIENCE_S = 600.0
"""How long training waits for a storage that does not answer."""


class Patience:
    """Repeats calls that storage does not answer, until it does or the outage has lasted too long.

    An outage is that of all threads: a call that comes late in it has no patience of its own. Safe to share between
    threads; a copy in another process starts afresh.

    Args:
        seconds: how long an outage may last.
    """

    def __init__(self, seconds: float = PATIENCE_S) -> None:
        self.seconds = seconds
        self._outage = Outage("storage", f"training waits for up to {seconds:g} s")
        self._retries = Retries(attempts=0, seconds=seconds, longest_wait=15.0)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.seconds,)

    def outlast(self, action: Callable[[], T]) -> T:
        """Call ``action``, which must bear being repeated, until storage answers.

        Raises:
            TransientStorageError: the outage has lasted too long.
        """
        return self._retries.call(action, is_transient, outage=self._outage)


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
    """Let a data set's ``read`` and ``fetch`` outlast an outage of so many seconds."""
    return dataclasses.replace(dataset, reader=_PatientReader(dataset.reader, Patience(seconds)))

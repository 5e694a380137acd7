"""What carries chunks through the stages: the face that both executors have."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipelines.labelling.report.totals import Totals
from pipelines.labelling.stages.chunks import Chunk, RunContext
from pipelines.labelling.stages.coordinator import Coordinator


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What a chunk goes through besides segmenting."""

    context: RunContext
    read: Callable[[int], Chunk]
    write: Callable[[Chunk], Chunk]


class Executor(Protocol):
    """Carries chunks through the stages."""

    def start(self) -> Coordinator:
        """Be ready for ``execute``; may be called again. Returns what the stages ask."""

    def execute(
        self, walk: Walk, chunks: Sequence[int], stopped: Callable[[], bool]
    ) -> Generator[tuple[int, Totals], None, None]:
        """Carry chunks through; yields each one's number and totals as it is done, in no fixed order.

        Args:
            stopped: whether no more chunks are to begin; asked after each that is done.
        """

    def stop(self) -> None:
        """Begin no more chunks; those under way are finished. Called in any thread."""

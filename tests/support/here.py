"""An executor that runs the stages in the calling process: for tests of the driver, which no image is to end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from pipelines.cluster.machine import LocalResources
from pipelines.labelling.report.totals import Totals
from pipelines.labelling.stages.coordinator import ChunkStates, Coordinator, DirectLine
from pipelines.labelling.stages.predictor import ModelToLoad
from pipelines.labelling.stages.segment import Segment
from pipelines.labelling.stages.walk import Walk


class Here:
    """An ``Executor``, one chunk after another; ``tests/pipelines/labelling/test_executors.py`` tests the real ones."""

    def __init__(self, model: ModelToLoad) -> None:
        self.make_predictor = model.maker(lambda: model.checkpoint, LocalResources.of_machine)
        self.states = ChunkStates()

    def start(self) -> Coordinator:
        return Coordinator(DirectLine(self.states))

    def execute(
        self, walk: Walk, chunks: Sequence[int], stopped: Callable[[], bool]
    ) -> Generator[tuple[int, Totals], None, None]:
        self.states.renew()
        segment = Segment(walk.context, self.make_predictor, LocalResources.of_machine())
        for number in chunks:
            if stopped():
                return
            yield number, walk.write(segment(walk.read(number))).totals

    def stop(self) -> None:
        self.states.close()

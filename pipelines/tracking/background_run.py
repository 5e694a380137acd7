"""An MLflow run that a thread writes, so that the work neither waits for the server nor fails with it."""

import contextlib
import logging
import queue
from collections.abc import Callable, Iterator

from pipelines.process.background import Worker
from pipelines.tracking.runs import Run, start_run, status_after
from pipelines.tracking.server import HASTE_S, Server

log = logging.getLogger(__name__)

AWAY_S = 86_400.0
"""Seconds that the thread tries to reach a server, as long as there is other work to do."""

END_S = 30.0
"""Seconds that the end of the work waits for what is not logged yet."""

Action = Callable[[Run], None]


class BackgroundRun:
    """A run that is begun, written and closed by a thread of its own, one action after the other.

    It begins with the first action; without any there is no run.

    Args:
        experiment, name: as for ``start_run``.
    """

    def __init__(self, experiment: str, name: str) -> None:
        self.experiment, self.name = experiment, name
        self.server = Server(patience=AWAY_S)
        self._actions: queue.SimpleQueue[Action | None] = queue.SimpleQueue()
        self._worker: Worker | None = None
        self._run: Run | None = None

    def log(self, action: Action) -> None:
        """Queue an action and return at once; one that fails leaves a line in the log."""
        self._actions.put(action)
        if self._worker is None:
            self._worker = Worker(self._turn, name="mlflow-run")

    def close(self, status: str, seconds: float) -> None:
        """Close the run, as ``FINISHED``, ``FAILED`` or ``KILLED``, and wait so many seconds for all to be logged."""
        if self._worker is None:
            return
        self._actions.put(lambda run: run.finish(status))
        self._actions.put(None)
        if not self._worker.join(seconds):  # it is a daemon, and ends with the process
            log.warning("MLflow did not answer for %g s: this run is not there, or not all of it", seconds)

    def _turn(self) -> float | None:
        """Do the next action; None at the end, and where the run cannot be begun."""
        if self._run is None:
            try:
                self._run = start_run(self.experiment, self.name, server=self.server, patience=AWAY_S)
            except Exception as error:  # of any kind, because the work itself goes on
                log.warning("this run is not logged: %s", error)
                return None
        action = self._actions.get()
        if action is None:
            return None
        try:
            action(self._run)
        except Exception as error:  # of any kind, because the work itself goes on
            log.warning("not logged: %s", error)
        return 0.0


@contextlib.contextmanager
def background_run(experiment: str, name: str) -> Iterator[BackgroundRun]:
    """Close the run when the context is left, after an error with less patience."""
    run = BackgroundRun(experiment, name)
    try:
        yield run
    except BaseException as error:
        run.close(status_after(error), HASTE_S)
        raise
    run.close("FINISHED", END_S)

"""An MLflow run that a thread writes: whoever logs to it neither waits for the server nor fails with it."""

import contextlib
import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Iterator

from pipelines.tracking.runs import Run, start_run
from pipelines.tracking.server import HASTE_S, patiently, tracking_uri
from pspnet_core.errors import PspnetError, Terminated

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
        self.experiment, self.name, self.uri = experiment, name, tracking_uri()
        self._actions: queue.SimpleQueue[Action | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mlflow-run", daemon=True)
        self._begun = False

    def log(self, action: Action) -> None:
        """Do something with the run, some time. Returns at once; what goes wrong is told in one line."""
        self._actions.put(action)
        if not self._begun:
            self._begun = True
            self._thread.start()

    def close(self, status: str, seconds: float) -> None:
        """Close the run, as ``FINISHED``, ``FAILED`` or ``KILLED``, and wait so many seconds for all to be logged."""
        if not self._begun:
            return
        self._actions.put(lambda run: run.finish(status))
        self._actions.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():  # it is a daemon, and ends with the process
            log.warning("MLflow did not answer for %g s: this run is not there, or not all of it", seconds)

    def _work(self) -> None:
        try:
            run = patiently(self.uri, lambda: start_run(self.experiment, self.name, uri=self.uri), seconds=AWAY_S)
        except PspnetError as error:
            log.warning("this run is not logged: %s", error)
            return
        run = dataclasses.replace(run, patience=AWAY_S)
        while (action := self._actions.get()) is not None:
            try:
                action(run)
            except Exception as error:  # whatever it is, the work itself goes on
                log.warning("not logged: %s", error)


@contextlib.contextmanager
def background_run(experiment: str, name: str, *, wanted: bool) -> Iterator[BackgroundRun | None]:
    """A run that ends as the context does; None if not ``wanted``.

    After an error it waits less. Where the process was told to end, the run is ``KILLED``.
    """
    if not wanted:
        yield None
        return
    run = BackgroundRun(experiment, name)
    try:
        yield run
    except (KeyboardInterrupt, SystemExit, Terminated):
        run.close("KILLED", HASTE_S)
        raise
    except BaseException:
        run.close("FAILED", HASTE_S)
        raise
    run.close("FINISHED", END_S)

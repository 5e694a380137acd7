"""The MLflow server: where it is, calls that wait for it, and errors that name a remedy."""

import contextlib
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mlflow.tracking import MlflowClient

from pipelines.process.environment import data_folder
from pipelines.process.redaction import first_line, redacted
from pipelines.process.retrying import Outage, Retries
from pipelines.tracking.answers import may_pass, reason_of, remedy_of
from pspnet_core.errors import PspnetError

T = TypeVar("T")
SQLITE = "sqlite:///"

START_S = 2.0
"""How long the start of a job waits: for a connection that has gone stale, not for an outage."""

PATIENCE_S = 600.0
"""Seconds that the end of a run waits for a server that does not answer, so that no outage costs hours of work."""

HASTE_S = 10.0
"""The same after an error, so that the error is shown soon."""

REQUEST_TAG = "request_id"
"""Tag of runs and logged models: which request made them."""


class TrackingError(PspnetError):
    """The MLflow server cannot be used."""


def tracking_uri() -> str:
    """The tracking server: ``MLFLOW_TRACKING_URI``, else ``~/.pspnet/mlflow.db``."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return given
    return f"{SQLITE}{data_folder() / 'mlflow.db'}"


@contextlib.contextmanager
def local_tracking(folder: Path) -> Iterator[None]:
    """Track in an SQLite file in ``folder`` within the context, also where the environment names a server."""
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = f"{SQLITE}{folder.resolve() / 'mlflow.db'}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_URI"]
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before


@dataclass(frozen=True, kw_only=True)
class Server:
    """An MLflow server and how long to wait for it; small and picklable.

    Attributes:
        uri: where it is; by default ``tracking_uri()``. It may hold a password: ``str`` hides that.
        patience: seconds that a call waits for a server that does not answer.
    """

    uri: str = field(default_factory=tracking_uri, repr=False)
    patience: float = PATIENCE_S

    def __str__(self) -> str:
        return f"MLflow at {redacted(self.uri)}"

    @property
    def client(self) -> MlflowClient:
        """A client of this server."""
        # MLflow's own repetitions would send a lost request to create something a second time, without a look whether
        # the first one was done; and they take minutes in which no line reports the outage and no caller can give up.
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        if not sys.stderr.isatty():
            os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        return MlflowClient(self.uri)

    def call(self, action: Callable[[MlflowClient], T]) -> T:
        """``action(client)``, repeated while the server does not answer; it must bear being repeated.

        Raises:
            TrackingError: the server did not answer within the patience, or refused.
        """
        outage = Outage(str(self), f"trying for {self.patience:g} s more")
        retries = Retries(attempts=0, seconds=self.patience, first_wait=0.5, longest_wait=15.0)
        try:
            return retries.call(lambda: action(self.client), may_pass, outage=outage)
        except PspnetError:
            raise
        except Exception as error:
            # MLflow lets through what HTTP, SQL and object-store clients raise, each of its own kind.
            raise self.explain(error) from error

    def create(
        self, make: Callable[[MlflowClient, dict[str, str]], T], find: Callable[[MlflowClient, str], list[T]]
    ) -> T:
        """Create something once: an attempt whose answer was lost may have done it, so the next one looks first.

        Args:
            make: creates it with these tags, which no other has.
            find: searches for what matches a filter on them.

        Raises:
            TrackingError: as ``call``.
        """
        tags = {REQUEST_TAG: uuid.uuid4().hex}
        attempts = 0

        def attempt(client: MlflowClient) -> T:
            nonlocal attempts
            attempts += 1
            found = find(client, f"tags.{REQUEST_TAG} = '{tags[REQUEST_TAG]}'") if attempts > 1 else []
            return found[0] if found else make(client, tags)

        return self.call(attempt)

    def explain(self, error: BaseException) -> TrackingError:
        """The error that says in one line what went wrong, with a remedy."""
        return TrackingError(f"{self} cannot be used ({first_line(reason_of(error))}); {remedy_of(error)}")

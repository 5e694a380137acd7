"""The MLflow server: which one it is, what is said when it cannot be used, and how long one waits for it."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import tenacity
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipelines.process.redaction import redacted
from pspnet_core.errors import ConfigError, PspnetError

log = logging.getLogger(__name__)
T = TypeVar("T")
HOME = Path.home() / ".pspnet"
SQLITE = "sqlite:///"
EXISTS = "RESOURCE_ALREADY_EXISTS"
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow's codes for what is not there

PATIENCE_S = 600.0
"""How long the end of a run waits for a server that does not answer: work of hours is not lost to a short outage."""


HASTE_S = 10.0
"""The same after an error, which is to be told soon."""


class TrackingError(PspnetError):
    """The MLflow server cannot be used."""


def tracking_uri() -> str:
    """The tracking server: ``MLFLOW_TRACKING_URI``, else ``~/.pspnet/mlflow.db``."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return given
    HOME.mkdir(parents=True, exist_ok=True)
    return f"{SQLITE}{HOME / 'mlflow.db'}"


@contextlib.contextmanager
def local_tracking(folder: Path) -> Iterator[None]:
    """Track in an SQLite file in ``folder`` meanwhile, whatever the environment says."""
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


def client_of(uri: str) -> MlflowClient:
    """A client of the server at ``uri``."""
    # One repetition, at once, for a connection that has gone stale. MLflow's seven take four minutes in which nobody
    # hears of the outage or can give up; the patience here says so and can be set.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    return MlflowClient(uri)


def refused(error: BaseException) -> bool:
    """Whether the server has answered, and would answer the same again."""
    return isinstance(error, MlflowException) and error.error_code in (EXISTS, *ABSENT)


@contextlib.contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Tell in one line what went wrong with the server, as a TrackingError."""
    try:
        yield
    except PspnetError:
        raise
    except Exception as error:
        # MLflow lets through what HTTP, SQL and object-store clients raise, each of its own kind.
        remedy = "start it, or set MLFLOW_TRACKING_URI to another"
        reason = f"MLflow at {redacted(uri)} cannot be used ({first_line(error)})"
        raise TrackingError(f"{reason}; {remedy}") from error


def patiently(uri: str, action: Callable[[], T], *, seconds: float) -> T:
    """``action()``, repeated for up to ``seconds`` while the server does not answer; it must bear being repeated.

    Raises:
        TrackingError: it did not answer, or refused.
    """

    def tell(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            reason = first_line(state.outcome.exception())
            log.warning("MLflow at %s does not answer (%s); trying for %g s more", redacted(uri), reason, seconds)

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_delay(seconds),
        wait=tenacity.wait_exponential(multiplier=0.5, max=15) + tenacity.wait_random(0, 1),
        retry=tenacity.retry_if_exception(_may_pass),
        before_sleep=tell,
        reraise=True,
    )
    with reaching(uri):
        result = retrying(action)
        if retrying.statistics["attempt_number"] > 1:
            log.warning("MLflow at %s answers again", redacted(uri))
        return result


def _may_pass(error: BaseException | None) -> bool:
    """Whether another attempt may go better: not after a refusal, nor after a mistake of the program."""
    if isinstance(error, TrackingError):
        return _may_pass(error.__cause__)
    mistakes = (ConfigError, TypeError, ValueError, AttributeError, LookupError, FileNotFoundError)
    return isinstance(error, Exception) and not refused(error) and not isinstance(error, mistakes)


def first_line(error: BaseException | None) -> str:
    """The first line of an error's text, without credentials."""
    return redacted((str(error).splitlines() or [type(error).__name__])[0])

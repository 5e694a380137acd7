"""Errors of Ray as one plain line each, and errors of ours that travelled inside one of Ray's as themselves."""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping

from ray import exceptions
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayActorError, RayError, RayTaskError

from pipelines.process.redaction import redacted
from pspnet_core.errors import PspnetError

log = logging.getLogger(__name__)

AGAIN = "run the same command again"
REASONS: Mapping[type[Exception], str] = {
    exceptions.OutOfMemoryError: "a node ran out of memory: ask for fewer --workers, or a smaller --batch",
    exceptions.OutOfDiskError: "the disk that Ray spills to is full: make room, or set RAY_TMPDIR to another",
    exceptions.ObjectStoreFullError: "Ray's object store is full: ask for fewer --workers, or enlarge /dev/shm",
    exceptions.WorkerCrashedError: f"a worker process ended unexpectedly, perhaps for want of memory; {AGAIN}",
    exceptions.ActorUnavailableError: f"a worker does not answer; {AGAIN}",
    exceptions.RayActorError: f"a worker, or the node under it, ended unexpectedly; {AGAIN}",
    exceptions.NodeDiedError: f"a node ended unexpectedly; {AGAIN}",
    exceptions.LocalRayletDiedError: f"Ray on this machine ended unexpectedly; {AGAIN}",
    exceptions.ObjectLostError: f"a node that held results ended unexpectedly; {AGAIN}",
    exceptions.TaskUnschedulableError: f"the node that a task is bound to is gone; {AGAIN}",
    exceptions.ActorUnschedulableError: f"the node that a worker is bound to is gone; {AGAIN}",
    exceptions.RuntimeEnvSetupError: "a node cannot set up the job's environment: compare what is installed there",
    exceptions.AuthenticationError: "the cluster refuses the token: set RAY_AUTH_TOKEN to that of the cluster",
    exceptions.GetTimeoutError: f"the cluster does not answer in time; {AGAIN}",
    ExecutionTimeoutError: f"no result for hours: something on the cluster is stuck; {AGAIN}",
}
"""What an error of Ray's means; the first kind that fits counts."""

_REFUSALS: Mapping[re.Pattern[str], str] = {
    re.compile(r"(?i)token|unauthenticated"): "it asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to its",
    re.compile(r"(?i)version mismatch"): "install the cluster's versions of Ray and Python on this machine",
}
"""What to do about the text of a refusal to let a job in, where its class says nothing; the first that fits counts."""

_ADVICE = re.compile(r"\nFailed to [^\n]* after \d+/\d+ attempts \(total backoff .*", re.DOTALL)
"""What Ray Data appends to the text of what a stage raises."""


class ClusterFailed(PspnetError):
    """Ray failed, or the program on one of its workers."""


@contextlib.contextmanager
def in_plain_words() -> Iterator[None]:
    """Raise what ``plain`` makes of an error of Ray's in the context."""
    try:
        yield
    except (RayError, ExecutionTimeoutError) as error:
        raise plain(error) from error


def plain(error: BaseException) -> PspnetError:
    """The error of ours that travelled inside one of Ray's, or else a ``ClusterFailed`` of one line.

    A fault of the program on a worker leaves its traceback in the log.
    """
    cause = _cause(error)
    cause.args = tuple(_ADVICE.sub("", each) if isinstance(each, str) else each for each in cause.args)
    if isinstance(cause, PspnetError):
        return cause
    reason = _reason(cause)
    if reason and not _says_more(cause):
        return ClusterFailed(reason)
    log.error("the program failed on a worker", exc_info=error)
    return ClusterFailed(f"the program failed on a worker: {_last_line(cause)}")


def refusal(error: BaseException) -> str:
    """Why a cluster lets a job not in, and what to do; empty where the error tells of no refusal."""
    if reason := _reason(error):
        return reason
    text = str(error)
    return next((f"{redacted(text)}; {remedy}" for known, remedy in _REFUSALS.items() if known.search(text)), "")


def _reason(error: BaseException) -> str | None:
    return next((reason for kind, reason in REASONS.items() if isinstance(error, kind)), None)


def _cause(error: BaseException) -> BaseException:
    """The innermost error that Ray has wrapped."""
    inside = error.cause if isinstance(error, RayTaskError) else None
    if isinstance(error, exceptions.UserCodeException):
        inside = error.__cause__
    return error if inside is None else _cause(inside)


def _says_more(error: BaseException) -> bool:
    """Whether an actor's error is one that its constructor raised, of which there is only the text."""
    return isinstance(error, RayActorError) and error.actor_init_failed


def _last_line(error: BaseException) -> str:
    """What Python would say last of an error, or of the error whose traceback is its text."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1] if isinstance(error, RayError) else f"{type(error).__name__}: {text}"

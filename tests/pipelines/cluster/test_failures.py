"""Whatever Ray raises, a job ends with one plain line without Ray's advice."""

from typing import Any

import pytest
from ray import exceptions
from ray.data.exceptions import ExecutionTimeoutError, RayDataUserCodeException

from pipelines.cluster.failures import REASONS, ClusterFailed, in_plain_words, plain
from pspnet_core.errors import ConfigError, ImageError, PspnetError

ADVICE = (
    "\nFailed to apply UDF transform after 1/1 attempts (total backoff 0.0s).\nTo change retry attempts, configure "
    "`ray.data.DataContext.get_current()` if you believe this to be transient."
)
TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\nZeroDivisionError: division by zero'


def raised(cause: Exception) -> exceptions.RayTaskError:
    return exceptions.RayTaskError("f", TRACEBACK, cause, "f", 1, "127.0.0.1")


def task_error(cause: Exception) -> Any:
    return raised(cause).as_instanceof_cause()


def advised(error: Exception) -> Exception:
    """As Ray Data hands it on."""
    error.args = (f"{error.args[0]}{ADVICE}", *error.args[1:])
    return error


def wrapped(cause: Exception) -> Exception:
    error = RayDataUserCodeException("UDF failed")
    error.__cause__ = cause
    return error


ERRORS: list[tuple[Exception, str]] = [
    (exceptions.WorkerCrashedError(), "a worker process ended unexpectedly, perhaps for want of memory; "),
    (task_error(exceptions.WorkerCrashedError()), "a worker process ended unexpectedly, "),
    (exceptions.ActorDiedError(), "a worker, or the node under it, ended unexpectedly; run the same command again"),
    (exceptions.ActorDiedError(raised(ZeroDivisionError("x"))), "on a worker: ZeroDivisionError: division by zero"),
    (exceptions.ActorUnavailableError("RPC error", None), "a worker does not answer; "),
    (exceptions.ObjectStoreFullError("full"), "Ray's object store is full: "),
    (exceptions.OutOfMemoryError("killed\nsee docs"), "a node ran out of memory: ask for fewer --workers"),
    (exceptions.OutOfDiskError("full"), "the disk that Ray spills to is full: "),
    (exceptions.NodeDiedError("gone"), "a node ended unexpectedly; "),
    (exceptions.LocalRayletDiedError(), "Ray on this machine ended unexpectedly; "),
    (exceptions.TaskUnschedulableError("no node"), "the node that a task is bound to is gone; "),
    (exceptions.ActorUnschedulableError("no node"), "the node that a worker is bound to is gone; "),
    (exceptions.RuntimeEnvSetupError("pip"), "a node cannot set up the job's environment: "),
    (exceptions.AuthenticationError("refused"), "the cluster refuses the token: set RAY_AUTH_TOKEN"),
    (exceptions.GetTimeoutError("timed out"), "the cluster does not answer in time; "),
    (exceptions.ObjectFreedError("ff" * 28, b"", ""), "a node that held results ended unexpectedly; "),
    (ExecutionTimeoutError("set `DataContext.x`"), "no result for hours: "),
    (exceptions.RaySystemError("broken\npipe"), "on a worker: pipe"),
    (task_error(ZeroDivisionError("division by zero")), "on a worker: ZeroDivisionError: division by zero"),
    (task_error(advised(KeyError("x"))), "on a worker: KeyError: "),
    (wrapped(ZeroDivisionError("division by zero")), "on a worker: ZeroDivisionError: division by zero"),
]


@pytest.mark.parametrize(("error", "text"), ERRORS, ids=[f"{type(error).__name__}" for error, _ in ERRORS])
def test_an_error_of_ray_is_one_plain_line(error: Exception, text: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ClusterFailed) as caught, in_plain_words():
        raise error
    line = str(caught.value)
    assert text in line
    assert not any(word in line for word in ("\n", "DataContext", "Traceback", "docs", "Failed to apply"))
    is_fault = line.startswith("the program failed on a worker: ")
    assert bool(caplog.records) == is_fault  # its traceback


def test_every_reason_is_reached() -> None:
    reached = {str(plain(error)) for error, _ in ERRORS}
    assert set(REASONS.values()) <= reached


@pytest.mark.parametrize(
    "error",
    [PspnetError("no answer"), ConfigError("model", "x", "no such folder"), ImageError("Empty", "no bytes")],
)
def test_an_error_of_ours_comes_out_as_itself(error: Any) -> None:
    """Ray raises it as of both classes, with the worker's traceback for a text, and Ray Data adds advice to that."""
    text = str(error)
    for inside in (task_error(advised(error)), task_error(task_error(error)), wrapped(error)):
        found = plain(inside)
        assert (type(found), str(found), found.args[0]) == (type(error), text, text.partition("=")[0].partition(":")[0])

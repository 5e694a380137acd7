"""Errors of MLflow: outages, which pass, and refusals, which do not, with a remedy for each."""

import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager

from mlflow.exceptions import MlflowException

from pspnet_core.errors import PspnetError

EXISTS = "RESOURCE_ALREADY_EXISTS"
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes for what is not there."""

_MAY_PASS = {408, 409, 425, 429}
"""Answers 4xx that another attempt may not get: time-outs, conflicts, too many requests."""

_MISTAKES = (PspnetError, TypeError, ValueError, AttributeError, LookupError, FileNotFoundError)
"""Errors of the program or its user; a ``PspnetError`` has been explained already."""

_CLIENTS = {"mlflow", "requests", "urllib3", "botocore", "sqlalchemy"}
"""Packages whose errors are raised while they handle those of what they use."""

_UNKNOWN = "INTERNAL_ERROR"
_REMEDIES: dict[int | None, str] = {
    400: "it takes no such request; check what is logged, and that MLFLOW_TRACKING_URI is an MLflow server",
    401: "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    403: "let this user do that; if it refuses the Host header, start it with --allowed-hosts",
    404: "check MLFLOW_TRACKING_URI, and that the server is MLflow 3 or later",
    413: "let the proxy before it take larger requests (nginx: client_max_body_size)",
}


class Suppress(AbstractContextManager["Suppress"]):
    """Suppress MLflow's errors of some codes, as ``contextlib.suppress`` does errors of some classes."""

    def __init__(self, *codes: str) -> None:
        self.codes = codes

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, MlflowException) and error.error_code in self.codes


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may go better: not after a refusal, nor after a mistake of the program."""
    if not isinstance(error, Exception) or isinstance(error, _MISTAKES) or _missing_module(error):
        return False
    status = status_of(error)
    return status is None or status in _MAY_PASS or (status >= 500 and status != 501)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of MLflow, or of what it uses, stands for; None where nothing was answered."""
    return next((status for cause in _causes(error) if (status := _own_status(cause))), None)


def remedy_of(error: BaseException) -> str:
    """What a user may do about it."""
    if missing := _missing_module(error):
        return f"install {missing.name or 'what is missing'} on this machine"
    return _REMEDIES.get(status_of(error), "start it, or set MLFLOW_TRACKING_URI to another")


def _missing_module(error: BaseException) -> ImportError | None:
    return next((cause for cause in _causes(error) if isinstance(cause, ImportError)), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised for, outermost first; not what its caller was handling when the call began."""
    while error is not None:
        yield error
        is_of_client = type(error).__module__.partition(".")[0] in _CLIENTS and not error.__suppress_context__
        error = error.__cause__ or (error.__context__ if is_of_client else None)


def _own_status(error: BaseException) -> int | None:
    if isinstance(error, MlflowException) and error.error_code != _UNKNOWN:
        return int(error.get_http_status_code())
    if isinstance(answer := getattr(error, "response", None), dict):  # botocore's ClientError
        return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
    # An answer without a code that MLflow knows, such as a proxy's: its status is not in the error.
    answers = [answer, *(frame.f_locals.get("response") for frame, _ in traceback.walk_tb(error.__traceback__))]
    return next((code for answer in answers if isinstance(code := getattr(answer, "status_code", None), int)), None)

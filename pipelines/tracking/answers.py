"""Errors of MLflow: outages, which pass, and refusals, which do not, with a remedy for each."""

import errno
import re
import socket
import ssl
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

from mlflow.exceptions import MlflowException

from pspnet_core.errors import PspnetError

EXISTS = "RESOURCE_ALREADY_EXISTS"
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes for what is not there."""

_MAY_PASS = {408, 409, 425, 429}
"""Answers 4xx that another attempt may not get: time-outs, conflicts, too many requests."""

_REFUSED = {*range(300, 500)} - _MAY_PASS

_MISTAKES = (PspnetError, TypeError, ValueError, AttributeError, LookupError, FileNotFoundError)
"""Errors of the program or its user; a ``PspnetError`` has been explained already."""

_STORES = {"botocore", "boto3", "s3transfer"}
"""Packages that send files to an object store by themselves, without the server."""

_CLIENTS = {"mlflow", "requests", "urllib3", "sqlalchemy", *_STORES}
"""Packages whose errors are raised while they handle those of what they use."""

_UNKNOWN = "INTERNAL_ERROR"
_TOO_MANY = re.compile(r"too many (\d{3}) error responses")
"""How urllib3 tells of an answer that it would have repeated the request after."""


@dataclass(frozen=True)
class Failure:
    """An error of MLflow as the kinds look at it.

    Attributes:
        status: HTTP status that was answered, or that the error stands for; None where nothing was.
        text: of the error, with the beginning of the answer's body.
        causes: the error and those that it was raised for, outermost first.
    """

    status: int | None
    text: str
    causes: tuple[BaseException, ...]

    def has(self, kind: type[BaseException]) -> bool:
        """Whether an error of this class is among the causes."""
        return any(isinstance(cause, kind) for cause in self.causes)

    def says(self, pattern: str) -> bool:
        """Whether one of the causes has such a text."""
        return any(re.search(pattern, str(cause)) for cause in self.causes)

    def is_of_store(self) -> bool:
        """Whether an object store, and not the server, has failed or refused."""
        return any(_package(cause) in _STORES for cause in self.causes)

    def lacks_credentials(self) -> bool:
        """Whether an object store's client has found no credentials, or none that it can use."""
        return any(_CREDENTIALS.search(type(cause).__name__) for cause in self.causes)

    def is_of_file(self, *codes: int) -> bool:
        """Whether a file or folder here has failed so, not a socket."""
        return any(isinstance(each, OSError) and each.errno in codes and each.filename for each in self.causes)


class Kind(NamedTuple):
    """A kind of failure: how it is known, what a user may do, and whether another attempt may go better."""

    fits: Callable[[Failure], bool]
    remedy: str
    passes: bool = False


def _answered(*statuses: int) -> Callable[[Failure], bool]:
    return lambda failure: failure.status in statuses


_CREDENTIALS = re.compile("Credential|ProfileNotFound|(?:Auth|SSO|Login)Token|TokenRetrieval")
"""In the names of classes of errors, of S3's clients and others."""

_STORE = "or start the server with --artifacts-destination, so that it sends the files itself"

KINDS: tuple[Kind, ...] = (
    Kind(lambda failure: failure.has(ImportError), "install {missing} on this machine"),
    Kind(
        lambda failure: failure.says(
            r"certificate (?:has expired|is not yet valid)|certificate is not valid for|hostname .* doesn't match"
        ),
        "renew its certificate, or reach it by the name that the certificate was made for",
    ),
    Kind(
        lambda failure: "CERTIFICATE_VERIFY_FAILED" in failure.text or failure.has(ssl.SSLCertVerificationError),
        "its certificate cannot be verified: set REQUESTS_CA_BUNDLE, or MLFLOW_TRACKING_SERVER_CERT_PATH for MLflow "
        "alone, to the file of its authority",
    ),
    Kind(lambda failure: "WRONG_VERSION_NUMBER" in failure.text, "it speaks no TLS: give MLFLOW_TRACKING_URI http://"),
    Kind(
        lambda failure: "Invalid url" in failure.text or "unsupported URI" in failure.text,
        "check MLFLOW_TRACKING_URI: it is no address of a server or database",
    ),
    Kind(
        lambda failure: failure.lacks_credentials(),
        f"give this machine credentials of the artifact store (AWS_PROFILE, AWS_ACCESS_KEY_ID and so on), {_STORE}",
    ),
    Kind(
        lambda failure: failure.is_of_store() and failure.status == 404,
        f"there is no such bucket: correct the experiment's artifact location, {_STORE}",
    ),
    Kind(
        lambda failure: failure.is_of_store() and failure.status in _REFUSED,
        f"the artifact store refuses it: let these credentials write there, or give others, {_STORE}",
    ),
    Kind(
        lambda failure: failure.is_of_store() and failure.status is None,
        f"the artifact store does not answer: check MLFLOW_S3_ENDPOINT_URL, {_STORE}",
        True,
    ),
    Kind(
        lambda failure: failure.says("No space left on device|Disk quota exceeded|database or disk is full"),
        "make room on that disk",
        True,
    ),
    Kind(
        lambda failure: (
            failure.is_of_file(errno.EACCES, errno.EPERM, errno.EROFS)
            or failure.says("readonly database|unable to open database file")
        ),
        "let this user write there, or set MLFLOW_TRACKING_URI to another place",
    ),
    Kind(
        lambda failure: failure.status == 407 or failure.says("Tunnel connection failed: 40[37]"),
        "the proxy refuses to lead there: put its user and password into https_proxy, or set NO_PROXY to this host",
    ),
    Kind(
        lambda failure: "ProxyError" in failure.text, "the proxy does not lead there: set NO_PROXY to this host", True
    ),
    Kind(lambda failure: failure.has(socket.gaierror), "no such host: correct the name in MLFLOW_TRACKING_URI", True),
    Kind(
        lambda failure: failure.has(ConnectionRefusedError), "nobody listens there: start it, or correct the port", True
    ),
    Kind(
        lambda failure: failure.status == 403 and "Invalid Host header" in failure.text,
        "start the server with --allowed-hosts and the name by which it is reached (docs/mlflow.md)",
    ),
    Kind(_answered(401), "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"),
    Kind(
        _answered(403),
        "let this user do that, or give the credentials of another: MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    ),
    Kind(
        lambda failure: "not in a valid JSON format" in failure.text,
        "that is no answer of MLflow's, perhaps a proxy's page: check MLFLOW_TRACKING_URI",
    ),
    Kind(
        _answered(400),
        "it takes no such request; check what is logged, and that MLFLOW_TRACKING_URI is an MLflow server",
    ),
    Kind(_answered(404), "check MLFLOW_TRACKING_URI, and that the server is MLflow 3 or later"),
    Kind(_answered(413), "let the proxy before it take larger requests (nginx: client_max_body_size)"),
    Kind(_answered(*_MAY_PASS, 502, 503, 504), "it is busy, or starts: try again later", True),
    Kind(_answered(*range(300, 500), 501), "check MLFLOW_TRACKING_URI"),
    Kind(lambda failure: failure.status is not None, "it is out of order: look into its log", True),
    Kind(lambda failure: True, "start it, or set MLFLOW_TRACKING_URI to another", True),
)
"""Of an error the first kind that fits counts."""


class Suppress(AbstractContextManager["Suppress"]):
    """Suppress MLflow's errors of some codes, as ``contextlib.suppress`` does errors of some classes."""

    def __init__(self, *codes: str) -> None:
        self.codes = codes

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, MlflowException) and error.error_code in self.codes


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may go better: not after a refusal, nor after a mistake of the program."""
    if not isinstance(error, Exception) or isinstance(error, _MISTAKES):
        return False
    return _kind_of(_failure(error)).passes


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of MLflow, or of what it uses, stands for; None where nothing was answered."""
    return next((status for cause in _causes(error) if (status := _own_status(cause))), None)


def remedy_of(error: BaseException) -> str:
    """What a user may do about it."""
    failure = _failure(error)
    missing = next((cause.name for cause in failure.causes if isinstance(cause, ImportError)), None)
    return _kind_of(failure).remedy.format(missing=missing or "what is missing")


def reason_of(error: BaseException) -> BaseException:
    """The error that says most shortly what happened: the system's own where there was no answer."""
    *_, innermost = _causes(error)
    return innermost if isinstance(innermost, OSError) and status_of(error) is None else error


def _failure(error: BaseException) -> Failure:
    return Failure(status=status_of(error), text=str(error), causes=tuple(_causes(error)))


def _kind_of(failure: Failure) -> Kind:
    return next(kind for kind in KINDS if kind.fits(failure))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised for, outermost first; not what its caller was handling when the call began."""
    while error is not None:
        yield error
        is_of_client = _package(error) in _CLIENTS and not error.__suppress_context__
        error = error.__cause__ or (error.__context__ if is_of_client else None)


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _own_status(error: BaseException) -> int | None:
    if isinstance(error, MlflowException) and error.error_code != _UNKNOWN:
        return int(error.get_http_status_code())
    if isinstance(answer := getattr(error, "response", None), dict):  # botocore's ClientError
        return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
    if found := _TOO_MANY.search(str(error)):
        return int(found[1])
    # An answer without a code that MLflow knows, such as a proxy's: its status is not in the error.
    answers = [answer, *(frame.f_locals.get("response") for frame, _ in traceback.walk_tb(error.__traceback__))]
    return next((code for answer in answers if isinstance(code := getattr(answer, "status_code", None), int)), None)

"""Errors of a server: a refusal ends the call at once, in one line with a remedy; only an outage is waited for."""

import errno
import json
import os
import pkgutil
import ssl
import uuid
from collections.abc import Iterator

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, PartialCredentialsError
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from pipelines.tracking import background_run as background_module
from pipelines.tracking.answers import may_pass, remedy_of, status_of
from pipelines.tracking.background_run import background_run
from pipelines.tracking.metrics_log import MetricsLog
from pipelines.tracking.runs import Run, upload
from pipelines.tracking.server import PATIENCE_S, Server, TrackingError
from tests.support.faultproxy import FaultProxy, Rule, answer
from tests.support.webserver import Answers, serving, untrusted

# What libraries of MLflow's raise, which this project does not use itself.
S3UploadFailedError = pkgutil.resolve_name("boto3.exceptions:S3UploadFailedError")
OperationalError = pkgutil.resolve_name("sqlalchemy.exc:OperationalError")
ProxyError, SSLError = (pkgutil.resolve_name(f"requests.exceptions:{name}") for name in ("ProxyError", "SSLError"))

SECONDS = 60.0  # a busy machine takes long
RUN = "0" * 32
REFUSALS = [
    pytest.param(400, b"<html>Bad Request</html>", "that MLFLOW_TRACKING_URI is an MLflow server", id="400"),
    pytest.param(401, b"You are not authenticated.", "set MLFLOW_TRACKING_USERNAME and", id="401"),
    pytest.param(401, json.dumps({"message": "Unauthorized"}).encode(), "set MLFLOW_TRACKING_USERNAME", id="401 JSON"),
    pytest.param(403, b"Invalid Host header - possible", "start the server with --allowed-hosts", id="403 host"),
    pytest.param(403, json.dumps({"error_code": "PERMISSION_DENIED"}).encode(), "let this user do that", id="403 code"),
    pytest.param(403, b"<html>Forbidden</html>", "give the credentials of another", id="403"),
    pytest.param(404, b"<html>Not Found</html>", "that the server is MLflow 3 or later", id="404"),
    pytest.param(413, b"<html>Request Entity Too Large</html>", "client_max_body_size", id="413"),
]


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    """Answers all by itself, as its rules say."""
    with FaultProxy("http://127.0.0.1:9") as proxy:
        yield proxy


@pytest.mark.parametrize(("status", "body", "remedy"), REFUSALS)
def test_a_refusal_ends_a_job_at_once(proxy: FaultProxy, status: int, body: bytes, remedy: str) -> None:
    rule = proxy.add(Rule(answer(status, body)))
    with pytest.raises(TrackingError) as caught:  # patience is ten minutes
        Server(uri=proxy.endpoint).call(lambda client: client.get_run(RUN))
    assert str(caught.value).startswith(f"MLflow at {proxy.endpoint} cannot be used (")
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(rule.hits) == 1


@pytest.mark.parametrize(
    ("status", "body", "remedy"), [(200, b"<html>Log in</html>", "perhaps a proxy's page"), (301, b"", "check MLFLOW_")]
)
def test_a_page_is_no_answer(proxy: FaultProxy, status: int, body: bytes, remedy: str) -> None:
    """What a proxy, or a server of another kind, says."""
    test_a_refusal_ends_a_job_at_once(proxy, status, body, remedy)


SILENT: list[tuple[str, str, str, bool]] = [
    ("http://127.0.0.1:9", "Connection refused", "nobody listens there: start it", True),
    ("http://mlflow.invalid:5000", "not known", "no such host: correct the name in MLFLOW_TRACKING_URI", True),
    ("{untrusted}", "self-signed certificate", "set REQUESTS_CA_BUNDLE, or MLFLOW_TRACKING_SERVER_CERT_PATH", False),
    ("{plain}", "WRONG_VERSION_NUMBER", "it speaks no TLS: give MLFLOW_TRACKING_URI http://", False),
    ("http://127.0.0.1:99999", "Invalid url", "it is no address of a server or database", False),
    ("ftp://127.0.0.1", "unsupported URI", "it is no address of a server or database", False),
]
"""Addresses without an answer, the reason and the remedy that are told, and whether to wait for one."""


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, str]]:
    with serving(Answers, untrusted()) as secure, serving(Answers) as plain:
        yield {"untrusted": secure, "plain": plain.replace("http:", "https:")}


@pytest.mark.parametrize(("uri", "reason", "remedy", "passes"), SILENT)
def test_an_address_without_an_answer(
    servers: dict[str, str], uri: str, reason: str, remedy: str, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    server = Server(uri=uri.format(**servers), patience=0.0 if passes else PATIENCE_S)
    with pytest.raises(TrackingError) as caught:
        server.call(lambda client: client.get_run(RUN))
    assert reason in str(caught.value)
    assert remedy in str(caught.value)
    assert caught.value.__cause__
    assert may_pass(caught.value.__cause__) == passes


def test_a_proxy_that_leads_nowhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "localhost")
    with pytest.raises(TrackingError, match="the proxy does not lead there: set NO_PROXY to this host"):
        Server(uri="http://mlflow.example:5000", patience=0.0).call(lambda client: client.get_run(RUN))


@pytest.mark.parametrize(("status", "body", "remedy"), REFUSALS)
def test_a_file_is_refused_at_once_too(proxy: FaultProxy, status: int, body: bytes, remedy: str) -> None:
    """The run is there, the artifacts are refused: they are sent by other calls, which raise other errors."""
    run = uuid.uuid4().hex  # MLflow remembers where the files of a run go
    found = {"run": {"info": {"run_id": run, "artifact_uri": f"mlflow-artifacts:/{run}", "status": "RUNNING"}}}
    proxy.add(Rule(answer(200, json.dumps(found).encode()), path="runs/get"))
    rule = proxy.add(Rule(answer(status, body)))
    with pytest.raises(TrackingError, match=remedy):
        Server(uri=proxy.endpoint).call(lambda client: upload(client, run, "a/b.png", b"png"))
    assert len(rule.hits) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_told_as_one(proxy: FaultProxy, status: int) -> None:
    proxy.add(Rule(answer(status, b"later")))
    with pytest.raises(TrackingError, match="it is busy, or starts: try again later"):
        Server(uri=proxy.endpoint, patience=0.0).call(lambda client: client.get_run(RUN))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_outage_is_waited_for(proxy: FaultProxy, status: int) -> None:
    rule = proxy.add(Rule(answer(status, b"later"), times=1))
    proxy.add(Rule(answer(200, b'{"experiments": []}')))
    Server(uri=proxy.endpoint).call(lambda client: client.search_experiments())
    assert len(rule.hits) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_metrics_end_and_are_kept(proxy: FaultProxy, status: int, caplog: pytest.LogCaptureFixture) -> None:
    rule = proxy.add(Rule(answer(status, b"no")))
    metrics = MetricsLog(Run(server=Server(uri=proxy.endpoint), run_id=RUN), every=0.01)
    metrics.add(1, {"loss": 1.0})
    assert not metrics.flush(SECONDS)
    metrics.add(2, {"loss": 0.5})
    metrics.close(SECONDS)
    assert [point[0] for point in metrics.pending()] == [1, 2]
    assert len(rule.hits) == 1
    assert caplog.text.count("metrics are not logged any more: MLflow at ") == 1


@pytest.mark.parametrize("status", [400, 413])
def test_a_request_that_is_refused_for_its_content_holds_up_no_other(
    proxy: FaultProxy, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    rule = proxy.add(Rule(answer(status, b"no"), times=2))  # all metrics together, then the first alone
    passed = proxy.add(Rule(answer(200, b"{}")))
    metrics = MetricsLog(Run(server=Server(uri=proxy.endpoint), run_id=RUN), every=0.01)
    metrics.add(1, {"huge": 1.0, "loss": 1.0, "rate": 1.0})
    metrics.close(SECONDS)
    assert metrics.pending() == []
    assert (len(rule.hits), len(passed.hits)) == (2, 2)
    assert caplog.text.count("metric huge is not logged: MLflow at ") == 1


def test_a_background_run_ends_at_once(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.endpoint)
    monkeypatch.setattr(background_module, "END_S", SECONDS)
    rule = proxy.add(Rule(answer(401, b"no")))
    with background_run("nights", "street") as run:
        run.log(lambda run: run.log_tags({"step": "one"}))
    assert len(rule.hits) == 1
    assert caplog.text.count("this run is not logged: MLflow at ") == 1


def test_a_module_that_is_missing_is_named() -> None:
    with pytest.raises(TrackingError, match="install pg8000 on this machine"):  # patience is ten minutes
        Server(uri="postgresql+pg8000://me:secret1@127.0.0.1:9/mlflow").call(lambda client: client.get_run(RUN))


def refused(status: int) -> ClientError:
    """By an object store."""
    answer = {"Error": {"Code": "x"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "PutObject")


def raised(error: Exception, *causes: Exception) -> Exception:
    """An error that was raised while the causes were handled, the innermost last."""
    if causes:
        error.__context__ = raised(*causes)
    return error


def of_system(code: int, file: str | None = "/mlflow/a.png") -> OSError:
    return OSError(code, os.strerror(code), file)


def of_database(text: str) -> Exception:
    """As MLflow's SQL store raises it."""
    error = MlflowException(text, error_code=TEMPORARILY_UNAVAILABLE)
    error.__cause__ = OperationalError("INSERT", {}, Exception(text))
    return error


def of_certificate(text: str) -> Exception:
    reason = ssl.SSLCertVerificationError(f"[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: {text}")
    return raised(SSLError(f"Max retries exceeded (Caused by SSLError({reason!r}))"), reason)


def of_proxy(status: int) -> Exception:
    reason = OSError(f"Tunnel connection failed: {status} Refused")
    return raised(ProxyError(f"Max retries exceeded (Caused by ProxyError({reason!r}))"), reason)


OF_STORE = "artifact store"
NO_ROOM, NOT_ALLOWED = "make room on that disk", "let this user write there"
OTHER_NAME, PROXY = "renew its certificate, or reach it by the name", "the proxy refuses to lead there: put its user"
OTHERS: list[tuple[Exception, str, bool]] = [
    (NoCredentialsError(), f"give this machine credentials of the {OF_STORE} (AWS_PROFILE", False),
    (PartialCredentialsError(provider="env", cred_var="x"), f"give this machine credentials of the {OF_STORE}", False),
    (refused(403), f"the {OF_STORE} refuses it: let these credentials write there", False),
    (raised(S3UploadFailedError("failed"), refused(403)), f"the {OF_STORE} refuses it: ", False),
    (raised(S3UploadFailedError("failed"), refused(404)), "there is no such bucket: ", False),
    (raised(S3UploadFailedError("failed"), refused(503)), "it is busy, or starts", True),
    (
        raised(EndpointConnectionError(endpoint_url="http://x"), ConnectionRefusedError("refused")),
        f"the {OF_STORE} does not answer: check MLFLOW_S3_ENDPOINT_URL",
        True,
    ),
    (of_system(errno.ENOSPC), NO_ROOM, True),
    (of_system(errno.EDQUOT), NO_ROOM, True),
    (of_database("database or disk is full"), NO_ROOM, True),
    (of_system(errno.EACCES), NOT_ALLOWED, False),
    (of_system(errno.EROFS), NOT_ALLOWED, False),
    (of_system(errno.EACCES, None), "start it, or set MLFLOW_TRACKING_URI to another", True),  # a firewall's
    (of_database("attempt to write a readonly database"), NOT_ALLOWED, False),
    (of_database("unable to open database file"), NOT_ALLOWED, False),
    (of_database("database is locked"), "it is busy, or starts", True),
    (of_certificate("certificate has expired"), OTHER_NAME, False),
    (of_certificate("certificate is not yet valid"), OTHER_NAME, False),
    (of_certificate("Hostname mismatch, certificate is not valid for 'mlflow'."), OTHER_NAME, False),
    (of_certificate("IP address mismatch, certificate is not valid for '10.0.0.1'."), OTHER_NAME, False),
    (of_certificate("self-signed certificate"), "its certificate cannot be verified: set", False),
    (of_proxy(407), PROXY, False),
    (of_proxy(403), PROXY, False),
    (of_proxy(502), "the proxy does not lead there: set NO_PROXY", True),
]
"""Errors that are not the server's: the remedy, and whether to wait."""


@pytest.mark.parametrize(("error", "remedy", "passes"), OTHERS, ids=[str(error)[-60:] for error, *_ in OTHERS])
def test_what_is_not_the_servers_has_a_remedy_of_its_own(error: Exception, remedy: str, passes: bool) -> None:
    assert remedy_of(error).startswith(remedy)
    assert may_pass(error) == passes
    assert status_of(refused(403)) == 403


def test_what_the_caller_was_handling_is_no_answer_of_the_servers() -> None:
    """A run is closed while its job's own error is on its way; the server is away, and may come back."""
    try:
        raise ModuleNotFoundError("no torch", name="torch")
    except ModuleNotFoundError:
        try:
            raise ConnectionRefusedError("nobody listens")
        except ConnectionRefusedError as error:
            assert error.__context__
            assert may_pass(error)
            assert "torch" not in remedy_of(error)

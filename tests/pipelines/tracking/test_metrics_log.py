"""Metrics on their way to MLflow: none is lost, sent twice for two, or waited for."""

import itertools
import json
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Metric

from pipelines.process.retrying import Retries
from pipelines.tracking import metrics_log
from pipelines.tracking.metrics_log import MetricsLog
from pipelines.tracking.runs import Run
from pipelines.tracking.server import Server
from pipelines.tracking.system_metrics import log_system_metrics

QUICK = Retries(first_wait=0.01, longest_wait=0.02, jitter=0)
SECONDS = 30.0  # for what takes milliseconds, on a machine that is busy otherwise


class FakeServer:
    """What MlflowClient does of what is needed here, and can be away, lose answers or hang."""

    def __init__(self) -> None:
        self.requests: list[list[Metric]] = []
        self.files: list[tuple[str | None, str, bytes]] = []
        self.away = self.deaf = False
        self.gate = threading.Event()
        self.gate.set()

    def log_batch(self, run_id: str, metrics: Sequence[Metric]) -> None:
        self.gate.wait(SECONDS)
        if self.away:
            raise ConnectionError("connection refused by http://me:password1@host.example")
        self.requests.append(list(metrics))
        if self.deaf:
            raise ConnectionError("connection reset before the answer")

    def log_artifact(self, run_id: str, local: str, folder: str | None) -> None:
        if self.away:
            raise ConnectionError("connection refused")
        self.files.append((folder, Path(local).name, Path(local).read_bytes()))

    def received(self) -> list[tuple[int, str, float]]:
        return [(metric.step, metric.key, metric.value) for request in self.requests for metric in request]


@dataclass(frozen=True, kw_only=True)
class Faked(Server):
    """A server that hands out a fake client."""

    fake: FakeServer

    @property
    def client(self) -> Any:
        return self.fake


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def metrics(server: FakeServer) -> Iterator[MetricsLog]:
    log = quick(server)
    yield log
    server.away = server.deaf = False
    server.gate.set()
    log.close(SECONDS)


def quick(server: FakeServer, **settings: Any) -> MetricsLog:
    run = Run(server=Faked(uri="http://me:password1@host.example", fake=server), run_id="0")
    return MetricsLog(run, every=0.01, retries=QUICK, **settings)


def test_every_point_arrives_once_and_in_order(server: FakeServer, metrics: MetricsLog) -> None:
    names = [f"m{index}" for index in range(7)]
    for step in range(500):
        metrics.add(step, {name: step + index for index, name in enumerate(names)})
    metrics.close(SECONDS)
    expected = [(step, name, step + index) for step in range(500) for index, name in enumerate(names)]
    assert server.received() == expected
    assert max(len(request) for request in server.requests) <= 1000
    assert metrics.pending() == []


def test_a_point_of_more_metrics_than_a_request_takes(server: FakeServer, metrics: MetricsLog) -> None:
    metrics.add(1, {f"iou_{index:04d}": index / 2500 for index in range(2500)})
    metrics.close(SECONDS)
    assert [len(request) for request in server.requests] == [1000, 1000, 500]
    assert len(server.received()) == len(set(server.received())) == 2500


def test_a_server_that_hangs_holds_up_nobody(server: FakeServer, metrics: MetricsLog) -> None:
    server.gate.clear()
    for step in range(3000):
        metrics.add(step, {"loss": 1.0})
    assert [point[0] for point in metrics.pending()] == list(range(3000))
    assert server.requests == []
    server.gate.set()
    assert metrics.flush(SECONDS)
    assert [step for step, _, _ in server.received()] == list(range(3000))


def test_an_outage_loses_nothing_and_is_reported_once(
    server: FakeServer, metrics: MetricsLog, caplog: pytest.LogCaptureFixture
) -> None:
    server.away = True
    for step in range(50):
        metrics.add(step, {"loss": step})
        assert not metrics.flush(0)
    while not caplog.messages:
        assert not metrics.flush(0.02)
    assert len(metrics.pending()) == 50
    server.away = False
    assert metrics.flush(SECONDS)
    assert [step for step, _, _ in server.received()] == list(range(50))
    metrics.close(SECONDS)
    gone, back = caplog.messages
    assert gone.startswith("MLflow at http://***@host.example does not answer (") and "password1" not in gone
    assert back.startswith("MLflow at http://***@host.example answers again after ")


def test_what_is_sent_again_is_the_same_point(server: FakeServer, metrics: MetricsLog) -> None:
    server.deaf = True
    metrics.add(7, {"loss": 0.5, "rate": 0.1})
    while len(server.requests) < 2:
        assert not metrics.flush(0.02)
    server.deaf = False
    assert metrics.flush(SECONDS)
    sent = {(one.timestamp, one.step, one.key, one.value) for request in server.requests for one in request}
    assert {point[1:] for point in sent} == {(7, "loss", 0.5), (7, "rate", 0.1)}
    assert len(sent) == 2


def test_an_endless_outage_halves_the_resolution(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    server.gate.clear()
    metrics = quick(server, limit=100)
    for step in range(1000):
        metrics.add(step, {"loss": step})
        assert len(metrics.pending()) <= 100 + 1000  # those on their way are a request at most
    server.gate.set()
    metrics.close(SECONDS)
    steps = [step for step, _, _ in server.received()]
    assert steps == sorted(set(steps))
    assert 32 <= len(steps) < 1000
    # One of 16 fits, wherever on the curve.
    assert max(later - earlier for earlier, later in itertools.pairwise([*steps, 999])) <= 32
    assert any("of unsent points every 2. one is kept" in line for line in caplog.messages)


def test_a_buffer_that_was_emptied_keeps_every_point_again(server: FakeServer) -> None:
    server.gate.clear()
    metrics = quick(server, limit=2)
    for step in range(5):
        metrics.add(step, {"loss": step})
    server.gate.set()
    assert metrics.flush(SECONDS)
    for step in range(5, 7):
        metrics.add(step, {"loss": step})
    metrics.close(SECONDS)
    assert [step for step, _, _ in server.received()][-2:] == [5, 6]


def test_unsent_points_travel_in_a_checkpoint(server: FakeServer, metrics: MetricsLog) -> None:
    server.away = True
    metrics.add(1, {"loss": 2.0, "broken": math.nan})
    metrics.add(2, {"loss": 1.0})
    carried = json.loads(json.dumps(metrics.pending()))
    elsewhere = FakeServer()
    successor = quick(elsewhere)
    successor.restore(carried)
    successor.close(SECONDS)
    received = elsewhere.received()
    assert [(step, name) for step, name, _ in received] == [(1, "loss"), (1, "broken"), (2, "loss")]
    assert [received[0][2], received[2][2]] == [2.0, 1.0] and math.isnan(received[1][2])
    times = [metric.timestamp for request in elsewhere.requests for metric in request]
    assert times == [carried[index][1] for index in (0, 0, 1)]


def test_closing_gives_up_after_its_patience(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    server.away = True
    metrics = quick(server)
    metrics.add(1, {"loss": 2.0})
    metrics.add_file("confusion/1.png", b"png")
    metrics.close(0.05)
    assert "1 points and 1 files did not reach MLflow within 0.05 s" in caplog.messages
    assert [point[0] for point in metrics.pending()] == [1]


def test_files_follow_the_metrics(server: FakeServer, metrics: MetricsLog) -> None:
    server.away = True
    metrics.add_file("confusion.png", b"old")
    metrics.add_file("overlays/a.png", b"a")
    metrics.add_file("confusion.png", b"new")
    server.away = False
    assert metrics.flush(SECONDS)
    assert server.files[-2:] == [("overlays", "a.png", b"a"), (None, "confusion.png", b"new")]


def test_files_that_wait_are_bounded(
    server: FakeServer, metrics: MetricsLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics_log, "MOST_BYTES", 10)
    server.away = True
    for name in ("a", "b", "c"):
        metrics.add_file(name, b"12345")
    server.away = False
    assert metrics.flush(SECONDS)
    assert [name for _, name, _ in server.files[-2:]] == ["b", "c"]
    assert "MLflow has been away for long: a is not logged" in caplog.messages


def test_system_metrics_go_the_same_way(server: FakeServer, metrics: MetricsLog) -> None:
    with log_system_metrics(metrics, every=0.01):
        while len(server.requests) < 2:
            metrics.flush(0.01)
    assert metrics.flush(SECONDS)
    found = {name: value for _, name, value in server.received()}
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= found.keys()
    assert 0 < found["system/system_memory_usage_percentage"] <= 100

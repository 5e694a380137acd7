"""Where chaos takes place: a bucket behind a proxy, a Ray cluster of several nodes, and a plan labelled undisturbed.

Every run of the plan writes below an output of its own, which holds nothing but the plan when it begins.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from PIL import Image
from ray.cluster_utils import Cluster

from pipelines.cluster.session import KEEP_IDLE
from pipelines.demo.scenes import SCENE_CLASSES, draw_scene
from pipelines.storage import Store, open_store
from pspnet_core.checkpoints.checkpoint import save_checkpoint
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig
from tests.conftest import s3_settings
from tests.support.faultproxy import FaultProxy
from tests.support.paths import ROOT
from tests.support.poisons import POISONS, Ground
from tests.support.s3server import S3Server
from tests.support.waiting import PATIENCE_S

SABOTAGE = Path(__file__).parent / "sabotage"
BUCKET = "chaos"

IMAGES = 18
KILLERS = {"07-killer.jpg": b"SEGFAULT", "15-killer.jpg": b"NOMEMORY"}
"""No images, as long as nothing is sabotaged; then they kill the process that opens them."""

FLAGS = {"chunk": 2, "gpus": 0.5, "date": "2026-01-31"}
NODE: Mapping[str, Any] = {"num_cpus": 4, "num_gpus": 1, "object_store_memory": 100 * 2**20}
NODES = 2


class Job:
    """``jobs/label.py`` as a process of its own.

    Attributes:
        expected: the exit code that it should end with.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.log, self.expected = log, 0
        with log.open("wb") as stderr, log.with_suffix(".out").open("wb") as stdout:
            self.process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=stdout, stderr=stderr)

    @property
    def runs(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    def signal(self, number: signal.Signals, expected: int = 0) -> None:
        """Send a signal, after which it is to end with that exit code."""
        assert self.runs, f"it has ended already:\n{self.tail()}"
        self.expected = expected
        self.process.send_signal(number)

    def code(self) -> int:
        """Wait until it ends, one way or another; returns its exit code."""
        return self.process.wait(PATIENCE_S)

    def end(self) -> None:
        """Wait until it ends, as it should."""
        code = self.code()
        assert code == self.expected, f"exit code {code} instead of {self.expected}:\n{self.tail()}"

    def tail(self) -> str:
        """The last of what it said."""
        return self.log.read_text(errors="replace")[-4000:]

    def line(self) -> str:
        """The last line of its standard output."""
        return self.log.with_suffix(".out").read_text().splitlines()[-1]


class Arena:
    """All parts together.

    Attributes:
        folder: for logs, the model and the switches of ``sabotage``.
        workers: model actors of each job.
        poisoned: patterns of the errors that images of ``POISONS`` leave, by key; they lie among the good ones.
        expected: content of each object that an undisturbed run of the plan leaves, by path below its output.
    """

    def __init__(self, folder: Path, proxy: FaultProxy, cluster: Cluster, workers: int) -> None:
        self.folder, self.proxy, self.cluster, self.workers = folder, proxy, cluster, workers
        self.input = open_store(f"s3://{BUCKET}/in", field="input")
        self.poisoned: dict[str, str] = {}
        self._outputs = 0
        self._fill()
        self.expected = self._undisturbed()

    def _fill(self) -> None:
        for index in range(IMAGES):
            self.input.put_if_absent(f"{index:02}.jpg", picture(index))
        for key, content in KILLERS.items():
            self.input.put_if_absent(key, content)
        for index, poison in enumerate(POISONS["images"].values()):
            place = open_store(f"{self.input.root}/{2 * index:02}", field="input")
            left = poison(Ground(store=place, server="")).rows
            self.poisoned |= {f"{2 * index:02}/{key}": error for key, error in left.items()}
        torch.manual_seed(0)
        network = PSPNet(PSPNetConfig(classes=len(SCENE_CLASSES), backbone="resnet18", output_stride=32))
        save_checkpoint(network, self.folder / "model", name="scenes", classes=SCENE_CLASSES)

    @property
    def keys(self) -> list[str]:
        """Of all images, sorted."""
        return sorted([*(f"{index:02}.jpg" for index in range(IMAGES)), *KILLERS, *self.poisoned])

    def _undisturbed(self) -> dict[str, bytes]:
        output = self._next_output()
        self.start(output).end()
        return contents(output)

    def planned_output(self) -> Store:
        """A fresh place for labels, which holds the plan."""
        output = self._next_output()
        for path, content in self.expected.items():
            if path.startswith("plans/"):
                output.put_if_absent(path, content)
        return output

    def overwrite(self, key: str, content: bytes) -> None:
        """Give an image another content."""
        found = self.input.stat(key)
        assert found is not None and self.input.put_if_match(key, content, found.etag)

    def _next_output(self) -> Store:
        self._outputs += 1
        return open_store(f"s3://{BUCKET}/out-{self._outputs}", field="output")

    def start(self, output: Store, **more: Any) -> Job:
        """Start labelling into an output, with more flags if need be."""
        flags = FLAGS | {"input": self.input.root, "output": output.root, "model": self.folder / "model"}
        flags |= {"workers": self.workers, **more}
        command = [sys.executable, str(ROOT / "jobs/label.py"), *(f"--{name}={value}" for name, value in flags.items())]
        name = f"job-{len(list(self.folder.glob('job-*.log')))}.log"
        return Job(command, os.environ | {"RAY_ADDRESS": self.cluster.address}, self.folder / name)

    @contextlib.contextmanager
    def switched_on(self, *names: str) -> Iterator[None]:
        """Have ``sabotage`` at work."""
        for name in names:
            (self.folder / name).touch()
        try:
            yield
        finally:
            for name in names:
                (self.folder / name).unlink(missing_ok=True)

    def processes(self, title: str, nodes: Iterable[Any] = ()) -> list[psutil.Process]:
        """Processes of Ray's workers that are at what their title says, on these nodes or on any."""
        among = list(nodes) or [self.cluster.head_node, *self.cluster.worker_nodes]
        raylets = [info.process.pid for node in among for info in node.all_processes["raylet"]]
        return [child for raylet in raylets for child in psutil.Process(raylet).children() if title in _title(child)]


@contextlib.contextmanager
def open_arena(folder: Path, server: S3Server, *, workers: int) -> Iterator[Arena]:
    """Build an arena, and leave nothing of it behind but the bucket."""
    server.create_bucket(BUCKET)
    with FaultProxy(server.endpoint) as proxy:
        settings = s3_settings(server) | {
            "AWS_ENDPOINT_URL": proxy.endpoint,
            "PYTHONPATH": f"{SABOTAGE}{os.pathsep}{ROOT}",
            "CHAOS_FOLDER": str(folder),
            "OMP_NUM_THREADS": "1",
            **dict([KEEP_IDLE]),
        }
        with environment(settings), running_cluster(**NODE) as cluster:
            yield Arena(folder, proxy, cluster, workers)


@contextlib.contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Let this process, and what it starts, have these variables, and no other storage, MLflow or cluster."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith(("AWS_", "MLFLOW_", "RAY_ADDRESS"))]:
        del os.environ[name]
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def running_cluster(**node: Any) -> Iterator[Cluster]:
    """A head for drivers alone, and nodes for the work."""
    # A node that is gone is noticed soon.
    health = {"health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 4}
    # Of a dashboard's port that is taken Ray would complain, although there is to be none.
    head = {"num_cpus": 0, "include_dashboard": False, "dashboard_port": 0, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(NODES):
            cluster.add_node(**node)
        yield cluster
    finally:
        cluster.shutdown()


def picture(seed: int) -> bytes:
    """A small JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(draw_scene(seed, width=64, height=48)[0]).save(buffer, "JPEG")
    return buffer.getvalue()


def contents(store: Store) -> dict[str, bytes]:
    """Every object below a store's root by path, hidden ones included."""
    root = store.path_of("")
    paths = [path.removeprefix(root).lstrip("/") for path in store.filesystem.find(root)]
    return {path: store.read(path) for path in paths}


def owner_of(port: int) -> psutil.Process:
    """The process that has connected from this port."""
    for connection in psutil.net_connections("tcp4"):
        if connection.laddr.port == port and connection.pid not in (None, os.getpid()):
            return psutil.Process(connection.pid)
    raise AssertionError(f"no process has connected from port {port}")


def until(condition: Callable[[], bool], job: Job) -> None:
    """Wait for a condition while a job runs."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert job.runs, f"it has ended already:\n{job.tail()}"
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s:\n{job.tail()}"
        time.sleep(0.05)  # between looks


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):  # ended meanwhile
        return ""

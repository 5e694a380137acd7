"""One MLflow run: parameters, metrics, files, its setting and its model; small enough to travel to every process.

Everything that is logged is redacted first (``redaction``). What is logged before and after the work waits patiently
for a server that does not answer; metrics of the work itself go through ``metrics_log``, which never makes it wait.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
import yaml
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.time import get_current_time_millis

from pipelines.process.environment import variables
from pipelines.process.redaction import redacted, redacted_values
from pipelines.tracking import registry
from pipelines.tracking.server import (
    EXISTS,
    HASTE_S,
    PATIENCE_S,
    SQLITE,
    TrackingError,
    client_of,
    patiently,
    reaching,
    refused,
    tracking_uri,
)
from pspnet_core import __version__

log = logging.getLogger(__name__)
T = TypeVar("T")
LONGEST_PARAM = 6000
LONGEST_TAG = 5000
BATCH = 100  # most parameters or tags of one request
_ROOMS = ("jobs", "pipelines", "pspnet_core")
PACKAGES = ("torch", "numpy", "pillow", "ray", "pyarrow", "mlflow")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One MLflow run; small and picklable, so that any process may log to it.

    Attributes:
        uri: the server's.
        run_id: MLflow's id of the run.
        patience: seconds that a call waits for a server that does not answer, ``log_metrics`` excepted.
    """

    uri: str = field(repr=False)  # may hold a password
    run_id: str
    patience: float = PATIENCE_S

    @property
    def client(self) -> MlflowClient:
        """A client of the run's server."""
        return client_of(self.uri)

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log parameters, None values included, each cut at MLflow's 6,000 characters."""
        texts = {name: _cut(str(value), LONGEST_PARAM) for name, value in redacted_values(params).items()}
        entities = [Param(name, text) for name, text in texts.items()]
        for start in range(0, len(entities), BATCH):
            some = entities[start : start + BATCH]
            self._patiently(lambda some=some: self.client.log_batch(self.run_id, params=some))  # type: ignore[misc]

    def log_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags of the run; a tag that is there already is replaced."""
        texts = {name: _cut(str(value), LONGEST_TAG) for name, value in redacted_values(tags).items()}
        entities = [RunTag(name, text) for name, text in texts.items()]
        self._patiently(lambda: self.client.log_batch(self.run_id, tags=entities))

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log the metrics of one step, with no patience; TrackingError when the server cannot be used."""
        now = get_current_time_millis()
        entities = [Metric(key, value, now, step) for key, value in metrics.items()]
        with reaching(self.uri):
            self.client.log_batch(self.run_id, entities)

    def log_text(self, name: str, text: str) -> None:
        """Log a text as the run's file ``name``, such as ``notes/setup.txt``."""
        self.log_file(name, redacted(text).encode())

    def log_json(self, name: str, value: Any) -> None:
        """Log plain data as the run's file ``name``."""
        self.log_file(name, (json.dumps(redacted_values(value), indent=1) + "\n").encode())

    def log_picture(self, name: str, png: bytes) -> None:
        """Log an encoded picture as the run's file ``name``, such as ``overlays/KEY.png``."""
        self.log_file(name, png)

    def log_file(self, name: str, data: bytes) -> None:
        """Log bytes as they are as the run's file ``name``, a path with ``/``; one of that name is replaced."""
        self._patiently(lambda: self.upload(name, data))

    def upload(self, name: str, data: bytes) -> None:
        """``log_file`` in one attempt, with MLflow's own errors."""
        path = PurePosixPath(name)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / path.name
            file.write_bytes(data)
            self.client.log_artifact(self.run_id, str(file), None if path.parent.name == "" else str(path.parent))

    def log_setting(self, config: Mapping[str, Any], *, card: Mapping[str, Any] | None = None) -> None:
        """What is to be known of a run before it starts.

        Args:
            config: every field; logged as parameters and as the file ``config.yaml``.
            card: what the data is like; the file ``data_card.json``.
        """
        self.log_params(config)
        self.log_file("config.yaml", yaml.safe_dump(redacted_values(config), sort_keys=False).encode())
        self.log_json("environment.json", environment())
        self.log_tags(code_version())
        if card is not None:
            self.log_json("data_card.json", card)

    def log_model(
        self,
        folder: Path,
        name: str,
        *,
        miou: float | None = None,
        data: str | None = None,
        step: int = 0,
    ) -> str:
        """Log a checkpoint folder as the run's model ``model`` and register it; returns ``models:/name/version``.

        Args:
            folder: a checkpoint.
            name: of the registered model.
            miou: its score, 0 to 1.
            data: fingerprint of what it was scored on: scores of the same data are compared as they are.
            step: the step that it is from.

        Raises:
            ConfigError: when the folder is no checkpoint.
            TrackingError: when the server cannot be used.
        """
        return registry.log_model(
            self.uri, self.run_id, folder, name, miou=miou, data=data, step=step, patience=self.patience
        )

    def finish(self, status: str) -> None:
        """Close the run: ``FINISHED``, ``FAILED`` or ``KILLED``.

        A failure waits for the server for a few seconds only, and raises nothing: another error is on its way then,
        which matters more.
        """
        if status != "FAILED":
            self._patiently(lambda: self.client.set_terminated(self.run_id, status))
            return
        try:
            soon = min(self.patience, HASTE_S)
            patiently(self.uri, lambda: self.client.set_terminated(self.run_id, status), seconds=soon)
        except TrackingError as error:
            log.warning("run %s stays open: %s", self.run_id, error)

    def _patiently(self, action: Callable[[], T]) -> T:
        return patiently(self.uri, action, seconds=self.patience)


def start_run(experiment: str, name: str, *, uri: str | None = None) -> Run:
    """Begin a run called ``name`` in ``experiment``, which is made if need be.

    Args:
        uri: the server; by default ``tracking_uri()``.

    Raises:
        TrackingError: when the server cannot be used.
    """
    uri = uri or tracking_uri()
    with reaching(uri):
        client = client_of(uri)
        run = client.create_run(_experiment_id(client, uri, experiment), run_name=redacted(name))
        return Run(uri=uri, run_id=run.info.run_id)


def resume_run(experiment: str, name: str, run_id: str | None) -> Run:
    """Take up the run ``run_id`` again, or begin one as ``start_run`` does where the server knows no such run.

    Raises:
        TrackingError: when the server cannot be used.
    """
    uri = tracking_uri()
    if run_id is not None:
        with reaching(uri):
            try:
                client_of(uri).update_run(run_id, status="RUNNING")
                return Run(uri=uri, run_id=run_id)
            except MlflowException as error:
                if not refused(error):
                    raise
    return start_run(experiment, name)


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        # Beside the SQLite file, not in the current folder as MLflow would have it: that one may be temporary.
        place = str(Path(uri.removeprefix(SQLITE)).parent / "mlartifacts" / name) if uri.startswith(SQLITE) else None
        try:
            return client.create_experiment(name, artifact_location=place)
        except MlflowException as error:
            if error.error_code != EXISTS:  # somebody else made it meanwhile
                raise
            found = client.get_experiment_by_name(name)
    assert found is not None
    return found.experiment_id


def environment() -> dict[str, Any]:
    """Interpreter, machine, devices and packages of this process."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def code_version() -> dict[str, str]:
    """Tags that say which code this is: version and contents of the packages and, in a git checkout, its commit."""
    root, git = Path(__file__).resolve().parents[2], shutil.which("git")
    tags = {"code.version": __version__, "code.sha256": _contents(root)}
    if git is None or not (root / ".git").exists():
        return tags
    command = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    said = subprocess.run(
        command, capture_output=True, text=True, check=False, env=variables() | {"GIT_OPTIONAL_LOCKS": "0"}
    )
    if said.returncode:  # such as a checkout of somebody else, which git will not read
        return tags
    commit = said.stdout.strip()
    tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
    tags["code.modified"] = str(commit.endswith("-dirty")).lower()
    return tags


def _contents(root: Path) -> str:
    """SHA-256 over names and contents of all modules: what ``ray job submit`` uploads has no commit to name."""
    digest = hashlib.sha256()
    for path in sorted(path for room in _ROOMS for path in (root / room).rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."

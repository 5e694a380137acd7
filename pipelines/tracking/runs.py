"""One MLflow run: parameters, metrics, files and its end; small enough to travel to every process.

Everything that is logged is redacted first (``redaction``). What is logged before and after the work waits patiently
for a server that does not answer; metrics of the work itself go through ``metrics_log``, which never makes it wait.
"""

import dataclasses
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from mlflow.entities import LifecycleStage, Metric, Param, RunTag
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags

from pipelines.process.redaction import redacted, redacted_values
from pipelines.tracking.answers import ABSENT, EXISTS, Suppress
from pipelines.tracking.model_uris import MLFLOW_SCHEMES, Origin
from pipelines.tracking.provenance import code_version, environment
from pipelines.tracking.server import HASTE_S, SQLITE, START_S, Server, TrackingError
from pspnet_core.errors import Terminated

log = logging.getLogger(__name__)
LONGEST_PARAM = 6000
LONGEST_TAG = 5000
BATCH = 100  # most parameters or tags of one request


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Whether and where a job on a model is logged."""

    track: bool | None = None
    """Whether the run is logged to MLflow; by default if MLFLOW_TRACKING_URI is set or the model is from there."""
    experiment: str | None = None
    """MLflow experiment of the run; by default pspnet-labelling or pspnet-evaluation, as the job is."""

    def wanted(self, model: str) -> bool:
        """Whether a job on this model is logged."""
        if self.track is None:
            return bool(os.environ.get("MLFLOW_TRACKING_URI")) or model.startswith(MLFLOW_SCHEMES)
        return self.track


@dataclass(frozen=True, kw_only=True)
class Run(AbstractContextManager["Run"]):
    """One MLflow run; picklable, so that any process may log to it. As a context it closes the run on leaving.

    Attributes:
        server: where it is, and how long its calls wait.
        run_id: MLflow's id of the run.
    """

    server: Server
    run_id: str

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.finish(status_after(error))

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log parameters, None values included, each cut at MLflow's 6,000 characters."""
        entities = [Param(name, text) for name, text in _texts(params, LONGEST_PARAM).items()]
        for start in range(0, len(entities), BATCH):
            self._log_batch(params=entities[start : start + BATCH])

    def log_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags of the run; a tag that is there already is replaced."""
        self._log_batch(tags=[RunTag(name, text) for name, text in _texts(tags, LONGEST_TAG).items()])

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log the metrics of one step."""
        now = round(1000 * time.time())
        self._log_batch(metrics=[Metric(key, value, now, step) for key, value in metrics.items()])

    def log_json(self, name: str, value: Any) -> None:
        """Log plain data as the run's file ``name``."""
        self.log_file(name, (json.dumps(redacted_values(value), indent=1) + "\n").encode())

    def log_file(self, name: str, data: bytes) -> None:
        """Log bytes as they are as the run's file ``name``, a path with ``/``; one of that name is replaced."""
        self.server.call(lambda client: upload(client, self.run_id, name, data))

    def log_setting(self, config: Mapping[str, Any], *, card: Mapping[str, Any] | None = None) -> None:
        """Log what is known of a run before its work begins.

        Args:
            config: every field; logged as parameters and as the file ``config.yaml``.
            card: what the data is like; the file ``data_card.json``.
        """
        self.log_params(config)
        self.log_file("config.yaml", yaml.safe_dump(redacted_values(config), sort_keys=False).encode())
        self.log_json("environment.json", environment())
        if card is not None:
            self.log_json("data_card.json", card)

    def log_origin(self, origin: Origin, *, tag: str) -> None:
        """Name the model's version, and the run that logged it, in this run, and this run in the version.

        Args:
            tag: name of the version's tag.
        """
        if origin.run_id:
            self.log_tags({"source_run_id": origin.run_id})
        if origin.version:
            self.log_tags({"model_version": origin.version})
            name, version = origin.version.removeprefix("models:/").rsplit("/", 1)
            self.server.call(lambda client: client.set_model_version_tag(name, version, tag, self.run_id))

    def finish(self, status: str) -> None:
        """Close the run: ``FINISHED``, ``FAILED`` or ``KILLED``.

        After an error it waits for the server for a few seconds only, and raises nothing: the error is on its way then,
        and matters more.
        """
        if status == "FINISHED":
            self.server.call(lambda client: client.set_terminated(self.run_id, status))
            return
        hasty = dataclasses.replace(self.server, patience=min(self.server.patience, HASTE_S))
        try:
            hasty.call(lambda client: client.set_terminated(self.run_id, status))
        except TrackingError as error:
            log.warning("run %s stays open: %s", self.run_id, error)

    def _log_batch(self, **entities: Any) -> None:
        self.server.call(lambda client: client.log_batch(self.run_id, **entities))


def status_after(error: BaseException | None) -> str:
    """How a run ends: ``FINISHED``, ``FAILED``, or ``KILLED`` after Ctrl-C or SIGTERM."""
    if error is None:
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit | Terminated) else "FAILED"


def upload(client: MlflowClient, run_id: str, name: str, data: bytes) -> None:
    """Log bytes as a run's file in one attempt, with MLflow's own errors."""
    path = PurePosixPath(name)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path.name
        file.write_bytes(data)
        client.log_artifact(run_id, str(file), None if path.parent.name == "" else str(path.parent))


def start_run(experiment: str, name: str, *, server: Server | None = None, patience: float = 0.0) -> Run:
    """Begin a run called ``name`` in ``experiment``, which is made if need be; its tags say who and what started it.

    Args:
        server: of the run; by default ``Server()``.
        patience: seconds to wait for it now, in place of the server's own, so that a job fails early without it.

    Raises:
        TrackingError: when the server cannot be used.
    """
    server = server or Server()
    now = dataclasses.replace(server, patience=patience)
    place = now.call(lambda client: experiment_id(client, server.uri, experiment))
    tags = _texts(resolve_tags(code_version()), LONGEST_TAG)
    run = now.create(
        lambda client, own: client.create_run(place, run_name=redacted(name), tags=tags | own),
        lambda client, own: list(client.search_runs([place], own)),
    )
    return Run(server=server, run_id=run.info.run_id)


def resume_run(experiment: str, name: str, run_id: str) -> Run:
    """Take up the run ``run_id`` again, or begin one as ``start_run`` does where the server knows no such run.

    Raises:
        TrackingError: when the server cannot be used.
    """
    if Server(patience=START_S).call(lambda client: _reopen(client, run_id)):
        return Run(server=Server(), run_id=run_id)
    return start_run(experiment, name)


def _reopen(client: MlflowClient, run_id: str) -> bool:
    with Suppress(*ABSENT):
        client.update_run(run_id, status="RUNNING")
        return True
    return False


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The id of an experiment, which is made if need be; TrackingError for one that was deleted."""
    found = client.get_experiment_by_name(name)
    if found is None:
        # Beside the SQLite file, not in the current folder as MLflow would have it: that one may be temporary.
        place = str(Path(uri.removeprefix(SQLITE)).parent / "mlartifacts" / name) if uri.startswith(SQLITE) else None
        with Suppress(EXISTS):  # another process made it meanwhile
            return client.create_experiment(name, artifact_location=place)
        found = client.get_experiment_by_name(name)
    assert found is not None
    if found.lifecycle_stage == LifecycleStage.DELETED:
        remedy = f"restore it (mlflow experiments restore --experiment-id {found.experiment_id}), or give another name"
        raise TrackingError(f"the experiment {name} of MLflow at {redacted(uri)} was deleted: {remedy}")
    return found.experiment_id


def _texts(values: Mapping[str, object], limit: int) -> dict[str, str]:
    """Values as MLflow takes them: redacted, and none longer than ``limit``."""
    texts = {name: str(value) for name, value in redacted_values(values).items()}
    return {name: text if len(text) <= limit else f"{text[: limit - 3]}..." for name, text in texts.items()}

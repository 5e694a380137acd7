"""Training: ``TrainConfig`` in, a registered model out. The driver's side; a worker's side is ``loop``.

Layout -> checked pairs -> ``TorchTrainer`` over the workers -> metrics and checkpoints by the first worker -> the best
checkpoint logged and registered in MLflow.
"""

import dataclasses
import functools
import os
from typing import Any

import pyarrow.fs
import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, UserCallback
from ray.train.torch import TorchTrainer

from pipelines.cluster.failures import plain
from pipelines.cluster.session import ray_session
from pipelines.process.config_tree import flatten
from pipelines.process.sigterm import own_sigint
from pipelines.storage import open_store
from pipelines.tracking.runs import Run
from pipelines.training.checkpointing import CheckpointFolder
from pipelines.training.config import TrainConfig
from pipelines.training.loop import train_loop
from pipelines.training.publishing import TrainingFailed, publish
from pipelines.training.resume import open_run
from pipelines.training.scaling import Scaling
from pipelines.training.setup import Setup, check_data, set_up
from pspnet_core.training.norms import check_norm

# How long workers wait for room: until the nodes of an autoscaler are up; but where fewer workers will do, only until
# the cluster knows that a node is gone.
START_TIMEOUT_S, ELASTIC_START_TIMEOUT_S = "600", "30"


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a model and register it.

    Returns:
        ``run_id``, ``model`` (``models:/name/version``), ``metrics`` (``miou``, ``macc``, ``aacc`` of the best epoch),
        ``images_per_second``, ``epoch`` (the best one), ``checkpoint`` (URI of its folder) and ``champion`` (whether
        the model got that alias).

    Raises:
        ConfigError: a mistake in the config or the data, found before the first step.
        TrainingFailed: the workers kept failing, or the loss was not a finite number.
    """
    dataset = config.dataset.open()
    card = check_data(config, dataset)
    setup = set_up(config, dataset, card)
    output = open_store(config.output, field="output")
    folder = CheckpointFolder(output, config.name)
    with ray_session():
        scaling = Scaling.of(config.scaling, config.workers())
        check_norm(config.step.norm, gpu=scaling.actor.gpus > 0)
        setup = dataclasses.replace(setup, loader_cpus=scaling.loader_cpus)
        output.check_writable_atomically()
        run, begun = open_run(setup, output)
        with run:
            if begun:
                run.log_setting(flatten(setup.config), card=card.to_json())
            _fit(setup, scaling, folder, run)
            return publish(setup, folder, run)


def _fit(setup: Setup, scaling: Scaling, folder: CheckpointFolder, run: Run) -> None:
    """Train to the last step; TrainingFailed names the reason and the last good checkpoint."""
    patience = ELASTIC_START_TIMEOUT_S if scaling.elastic else START_TIMEOUT_S
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", patience)
    try:
        with own_sigint():
            result: Any = _torch_trainer(setup, scaling, folder, run).fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingFailed(f"training failed: {_cause(error)}") from error
    if reason := result.return_value:
        entries = [folder.store.uri_of(entry.model) for entry in folder.entries()]
        last = f"the last good checkpoint is {entries[-1]}" if entries else "no checkpoint yet"
        remedy = "try a lower --lr, --grad-clip, or --precision float32"
        raise TrainingFailed(f"training stopped: {reason}; {last}; {remedy}")


def _torch_trainer(setup: Setup, scaling: Scaling, folder: CheckpointFolder, run: Run) -> TorchTrainer:
    config = setup.config
    return TorchTrainer(
        functools.partial(train_loop, setup, folder, run),  # type: ignore[arg-type]  # Train V2 hands on what it returns
        scaling_config=scaling.for_ray(config.scaling.resize_interval),
        run_config=RunConfig(  # type: ignore[call-arg]  # typed as Train V1, which V2 replaces at import
            name=config.name,
            storage_path=folder.store.path_of(""),
            storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(folder.store.filesystem)),
            failure_config=FailureConfig(max_failures=config.scaling.max_failures),
            callbacks=[EpochPrinter()],  # type: ignore[list-item]
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _cause(error: ray.train.TrainingFailedError) -> str:
    """Quote the first worker's error."""
    failures = getattr(error, "worker_failures", None) or {}
    first = next(iter(failures.values()), error)
    return str(plain(first)) if isinstance(first, RayError) else " ".join(str(first).strip().splitlines()[-1:])


class EpochPrinter(UserCallback):
    """Prints a line for each epoch, from Ray Train's controller process."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Print the metrics, which are the same of every worker."""
        total = metrics[0]
        shown = "  ".join(f"{key} {total[key]:.4g}" for key in ("loss", "miou", "aacc", "images_per_second"))
        print(f"epoch {total['epoch']}  {shown}", flush=True)

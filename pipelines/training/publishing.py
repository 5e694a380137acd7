"""Log and register the best checkpoint of a run, and compare it with the champion."""

import functools
from typing import Any

from pipelines.evaluation.actors import score_checkpoint
from pipelines.storage import to_local
from pipelines.tracking import registry
from pipelines.tracking.runs import Run
from pipelines.training.champion import crown
from pipelines.training.checkpointing import CheckpointFolder, best
from pipelines.training.setup import Setup
from pspnet_core.errors import PspnetError


class TrainingFailed(PspnetError):
    """The training run ended with an error that retries did not cure."""


def publish(setup: Setup, folder: CheckpointFolder, run: Run) -> dict[str, Any]:
    """Log and register the best checkpoint."""
    config = setup.config
    found = best(folder.entries())
    if not found:
        raise TrainingFailed("training ended without a checkpoint")
    entry, metrics = found[0], found[0].progress.metrics
    uri, data = folder.store.uri_of(entry.model), setup.dataset.fingerprint(config.val)
    with to_local(uri, field="output") as local:
        model = registry.log_model(run, local, config.name, miou=metrics["miou"], data=data, step=entry.progress.step)
    score = functools.partial(score_checkpoint, dataset=setup.dataset, split=config.val, gpus=config.scaling.gpus)
    champion = crown(run.server, model, miou=metrics["miou"], data=data, score=score)
    return {
        "run_id": run.run_id,
        "model": model,
        "metrics": {key: metrics[key] for key in ("miou", "macc", "aacc")},
        "images_per_second": metrics["images_per_second"],
        "epoch": int(metrics["epoch"]),
        "checkpoint": uri,
        "champion": champion,
    }

"""Log and register the best checkpoint of a run, which becomes the champion of its name if it beats the old one."""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

from pipelines.evaluation.actors import score_checkpoint
from pipelines.models.loading import load_model
from pipelines.process.redaction import first_line
from pipelines.storage import to_local
from pipelines.tracking.registry import Champion, champion_of, log_model, set_champion
from pipelines.tracking.runs import Run
from pipelines.tracking.server import Server, TrackingError
from pipelines.training.checkpointing import CheckpointFolder, best
from pipelines.training.setup import Setup
from pspnet_core.checkpoints.checkpoint import Checkpoint
from pspnet_core.errors import PspnetError

log = logging.getLogger(__name__)


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
        model = log_model(run, local, config.name, miou=metrics["miou"], data=data, step=entry.progress.step)
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


def crown(server: Server, model: str, *, miou: float, data: str, score: Callable[[Checkpoint], float]) -> bool:
    """Give a registered version the alias ``@champion`` if it is the first, or better than the champion.

    Args:
        model: ``models:/name/version``.
        miou: its score, 0 to 1; NaN of a model that diverged.
        data: fingerprint of what it was scored on.
        score: mIoU of another checkpoint on this data; it may raise a ``PspnetError``.

    Returns:
        Whether it is the champion now.

    Raises:
        TrackingError: when the server cannot be used.
    """
    old = champion_of(server, model.removeprefix("models:/").rsplit("/", 1)[0])
    if old and old.uri != model:
        mark = old.miou if old.data == data and old.miou is not None else _score_again(server, old, score)
        # A score that is no number beats nothing, and is beaten by any.
        if mark is None or not math.isfinite(miou) or miou <= mark:
            return False
    set_champion(server, model)
    log.info("%s is the champion now", model)
    return True


def _score_again(server: Server, champion: Champion, score: Callable[[Checkpoint], float]) -> float | None:
    """Score the champion on the new data; None where that cannot be done, for example for its other classes."""
    try:
        return score(load_model(champion.uri, server=server))
    except TrackingError:
        raise
    except PspnetError as error:
        log.warning("%s stays the champion: it cannot be scored on this data (%s)", champion.uri, first_line(error))
        return None

"""Whether a new model becomes the champion of its name: the old one is compared with it on the same data."""

import logging
import math
from collections.abc import Callable

from pipelines.models.loading import load_model
from pipelines.process.redaction import first_line
from pipelines.tracking.registry import Champion, champion_of, set_champion
from pipelines.tracking.server import Server, TrackingError
from pspnet_core.checkpoints.checkpoint import Checkpoint
from pspnet_core.errors import PspnetError

log = logging.getLogger(__name__)


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
        mark = old.miou if old.data == data and old.miou is not None else _scored_anew(server, old, score)
        # A score that is no number beats nothing, and is beaten by any.
        if mark is None or not math.isfinite(miou) or miou <= mark:
            return False
    set_champion(server, model)
    log.info("%s is the champion now", model)
    return True


def _scored_anew(server: Server, champion: Champion, score: Callable[[Checkpoint], float]) -> float | None:
    """The champion's mIoU on the new data; None where it cannot be scored, for example for its other classes."""
    try:
        return score(load_model(champion.uri, server=server))
    except TrackingError:
        raise
    except PspnetError as error:
        log.warning("%s stays the champion: it cannot be scored on this data (%s)", champion.uri, first_line(error))
        return None

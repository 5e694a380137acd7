"""Who becomes the champion: the best on the same data, whenever the old one was scored on it."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.tracking.registry import champion_of, set_champion
from pipelines.tracking.server import Server, TrackingError
from pipelines.training.publishing import crown
from pspnet_core.checkpoints.checkpoint import Checkpoint, load_checkpoint
from pspnet_core.errors import ConfigError
from tests.support.registered import register


@dataclasses.dataclass
class Versions:
    """Versions of one model, each a copy of the same checkpoint."""

    checkpoint: Path
    made: int = 0

    def log(self, miou: float | None = None, data: str | None = None) -> str:
        """Register one more, with this record."""
        record = {"miou": None if miou is None else repr(miou), "data": data}
        tags = {name: value for name, value in record.items() if value is not None}
        register(self.checkpoint, "scenes", tags=tags)
        self.made += 1
        return f"models:/scenes/{self.made}"

    def crown(self, miou: float, data: str, score: Callable[[Checkpoint], float]) -> bool:
        """Log one more and let it compete."""
        return crown(Server(), self.log(miou, data), miou=miou, data=data, score=score)

    def champion(self) -> str | None:
        champion = champion_of(Server(), "scenes")
        return champion.uri if champion else None


@pytest.fixture
def versions(tracking_home: Path, scene_model: Path) -> Versions:
    return Versions(scene_model)


def never(checkpoint: Checkpoint) -> float:
    raise AssertionError("the recorded scores are compared")


def test_the_champion_is_the_best_on_the_same_data(versions: Versions) -> None:
    assert versions.champion() is None
    assert versions.crown(math.nan, "abc", never)  # it has diverged, so any score beats it
    assert versions.crown(0.5, "abc", never)
    for miou in (0.4, 0.5, math.nan):
        assert not versions.crown(miou, "abc", never)
        assert versions.champion() == "models:/scenes/2"
    assert versions.crown(0.6, "abc", never)
    assert versions.champion() == "models:/scenes/6"
    assert crown(Server(), "models:/scenes/6", miou=0.6, data="abc", score=never)  # the same command again


def test_a_champion_of_other_data_is_scored_anew(versions: Versions, scene_model: Path) -> None:
    assert versions.crown(0.9, "abc", never)
    scored = []

    def score(checkpoint: Checkpoint) -> float:
        scored.append(checkpoint.fingerprint)
        return 0.3

    assert not versions.crown(0.2, "def", score)
    assert versions.crown(0.4, "def", score)
    assert versions.champion() == "models:/scenes/3"
    assert scored == [load_checkpoint(scene_model).fingerprint] * 2


def test_a_champion_without_a_record_is_scored(versions: Versions) -> None:
    set_champion(Server(), versions.log())
    assert not versions.crown(0.2, "abc", lambda checkpoint: 0.3)
    assert versions.crown(0.2, "abc", lambda checkpoint: 0.1)


def test_a_champion_that_cannot_be_scored_stays(versions: Versions, caplog: pytest.LogCaptureFixture) -> None:
    def score(checkpoint: Checkpoint) -> float:
        raise ConfigError("model", "x", "its classes are others")

    assert versions.crown(0.1, "abc", never)
    assert not versions.crown(0.9, "def", score)
    assert versions.champion() == "models:/scenes/1"
    assert "models:/scenes/1 stays the champion: it cannot be scored on this data" in caplog.text
    assert "its classes are others" in caplog.text


def test_a_registry_that_is_away_decides_nothing() -> None:
    with pytest.raises(TrackingError):
        crown(Server(uri="http://127.0.0.1:9", patience=0), "models:/scenes/1", miou=0.5, data="abc", score=never)

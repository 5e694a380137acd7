"""How training's workers share a cluster, whose parts a stand-in tells."""

import pytest
import ray

from pipelines.cluster.resources import WorkerRange
from pipelines.training.scaling import Scaling, ScalingConfig

NODES = [4.0, 4.0, 16.0]
"""CPUs of each node; the last one is gone."""


@pytest.mark.parametrize(("workers", "cpus"), [(1, 4.0), (2, 4.0), (4, 2.0), (8, 1.0)])
def test_a_worker_asks_for_no_more_than_a_node_has(workers: int, cpus: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would wait for ever."""
    nodes = [{"Alive": size < 16, "Resources": {"CPU": size}} for size in NODES]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    scaling = Scaling.of(ScalingConfig(workers=f"{workers}"), WorkerRange(low=workers, high=workers))
    assert scaling.actor.cpus == cpus

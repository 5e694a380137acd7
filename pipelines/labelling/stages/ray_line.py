"""The coordinator of a run on Ray: ``ChunkStates`` in an actor, and the way to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from pipelines.labelling.stages.coordinator import ChunkStates

ANSWER_S = 5.0
"""Seconds that ``under_way`` waits for a Ray actor: its answer is for watching only."""


@dataclass(frozen=True)
class RayLine:
    """The way to ``ChunkStates`` in a Ray actor."""

    actor: Any

    def ask(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        """Raises RayError where the actor does not answer within ``timeout`` seconds."""
        return ray.get(getattr(self.actor, method).remote(*arguments), timeout=timeout)

    def tell(self, method: str, *arguments: Any) -> None:
        """Call without waiting."""
        getattr(self.actor, method).remote(*arguments)

    def own_id(self) -> str:
        """The calling actor's id, which it keeps when Ray starts it again."""
        return str(ray.get_runtime_context().get_actor_id())


@contextmanager
def start_coordinator() -> Iterator[RayLine]:
    """Chunk states in a Ray actor on the node of the driver, as long as the context lasts."""
    # On a node that may vanish it would take every count along.
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True
    )
    # One that dies comes back with its memory blank, and answers what it was asked.
    lasting = {"max_restarts": -1, "max_task_retries": -1}
    actor: Any = ray.remote(ChunkStates).options(num_cpus=0, scheduling_strategy=here, **lasting).remote()
    try:
        yield RayLine(actor)
    finally:
        ray.kill(actor)

"""Scaling: more nodes with more images, and what one driver can feed.

Weak scaling: as many images for each node, on 1, 2, 4 and 8 nodes that Ray simulates on this machine.

A node has one logical GPU and one actor, whose model sleeps a fixed time for each image and needs no CPU: what is
measured is whether driver, tasks and object store keep up. Everything runs on the cores of this one machine, so the
time per image is chosen such that these are not what limits.

Driving: chunks of nothing go through the three stages, and only the chain itself costs something. Reading and writing
are stand-ins, and an actor finds no image in a chunk. The rate is that of driver, tasks, actor and object store
together; what the driver spends on a chunk is counted apart.
"""

import itertools
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import ray
from ray.cluster_utils import Cluster

from benchmarks.labelling import Instant, SleepingFor, fill, run_over, save_model
from pipelines.cluster.resources import ActorConfig
from pipelines.cluster.session import KEEP_IDLE
from pipelines.demo.scenes import SCENE_CLASSES
from pipelines.label_table.ledger import Ledger
from pipelines.label_table.schema import Paths, RowProvenance, utc_now
from pipelines.labelling.executor import RayExecutor
from pipelines.labelling.report.totals import Totals
from pipelines.labelling.stages.chunks import ENCODED, Chunk, RunContext, encoded, written
from pipelines.labelling.stages.clocks import Start
from pipelines.labelling.stages.predictor import ModelToLoad
from pipelines.labelling.stages.walk import Walk
from pipelines.storage import open_store
from pspnet_core.checkpoints.checkpoint import load_checkpoint

NODES = (1, 2, 4, 8)
SLEEP_S = 0.05
CHUNK = 16
# The pool fills up in the beginning, and in the end some nodes are done before others.
SKIP, CUT = 0.25, 0.25

IMAGES = 256
"""Images that a chunk stands for."""

GPU_RATE = 100.0
"""Images per second of one GPU, for the number of GPUs: about what is left of a large one with PSPNet-50 at 473."""

QUARTERS = 4


def run(folder: Path, *, chunks: int, nodes: tuple[int, ...] = NODES) -> dict[int, float]:
    """Images per second on each number of nodes.

    Args:
        chunks: for each node.
    """
    model = save_model(folder)
    rates = {}
    for count in nodes:
        home = folder / f"{count}"
        home.mkdir()
        bucket = fill(home / "bucket", count * chunks * CHUNK, None)
        rates[count] = _rate(bucket, home / "labels", model, count)
    return rates


def _rate(bucket: Path, labels: Path, model: Path, nodes: int) -> float:
    """Images per second in the middle of a run."""
    # A node with a GPU has more CPUs than these have, and keeps its processes.
    os.environ.setdefault(*KEEP_IDLE)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "dashboard_port": 0}
    )
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=2, num_gpus=1)
        ray.init(address=cluster.address, logging_level=logging.WARNING)
        make, workers = SleepingFor(SLEEP_S), f"{nodes}"
        result = run_over(bucket, labels, model, make, chunk=CHUNK, workers=workers, skip=SKIP, cut=CUT)
        return result.steady.rate
    finally:
        ray.shutdown()
        cluster.shutdown()


def lines(rates: dict[int, float]) -> list[str]:
    """Rates for people."""
    (fewest, base), *_ = rates.items()
    rows = (
        f"  {nodes} nodes  {rate:6.1f} images/s, {rate / CHUNK:5.2f} chunks/s, "
        f"{rate / nodes / (base / fewest):.1%} of {nodes / fewest:g} times the first"
        for nodes, rate in rates.items()
    )
    head = f"weak scaling, a model that sleeps {1000 * SLEEP_S:g} ms for each image, chunks of {CHUNK}"
    return list(itertools.chain([head], rows))


# --- driving --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Driving:
    """What one run showed, from the first chunk's end to the last one's.

    Attributes:
        chunks_per_second: start of Ray and of the first actor excluded.
        driver_ms: CPU milliseconds of the driver per chunk, all its threads.
        memory: bytes of the driver's own memory with the first chunk and after each quarter.
    """

    chunks: int
    chunks_per_second: float
    driver_ms: float
    memory: tuple[int, ...]


def read(number: int) -> Chunk:
    """Stands in for the first stage."""
    return encoded(number, ENCODED.empty_table(), images=IMAGES, since=Start.now())


def write(chunk: Chunk) -> Chunk:
    """Stands in for the last stage."""
    return written(chunk, since=Start.now(), counted=True)


def drive(folder: Path, *, chunks: int) -> Driving:
    """Send so many chunks through one actor."""
    model = ModelToLoad(checkpoint=load_checkpoint(save_model(folder)), batch=1, compile=False, stand_in=Instant)
    with RayExecutor(model, ActorConfig(workers="1", gpus=0.0)) as executor:
        context = RunContext(
            ledger=Ledger(open_store(str(folder), field="output"), Paths(partition="benchmark-0")),
            provenance=RowProvenance(run_id="benchmark", made=utc_now(), mask="rle"),
            model="",
            classes=SCENE_CLASSES,
            max_pixels=1,
            coordinator=executor.start(),
        )
        walk = Walk(context=context, read=read, write=write)
        return _measured(executor.execute(walk, range(chunks), lambda: False), chunks)


def _measured(done: Iterator[tuple[int, Totals]], chunks: int) -> Driving:
    counts = _summed(done)
    next(counts)
    started, cpu, memory = time.perf_counter(), time.process_time(), [_memory()]
    for count in counts:
        if count % max(1, chunks // QUARTERS) == 0:
            memory.append(_memory())
    seconds, spent = time.perf_counter() - started, time.process_time() - cpu
    return Driving(
        chunks=chunks,
        chunks_per_second=(chunks - 1) / seconds,
        driver_ms=1000 * spent / (chunks - 1),
        memory=tuple(memory),
    )


def _summed(done: Iterator[tuple[int, Totals]]) -> Iterator[int]:
    """Add up what comes back, as a driver does; yields how many there were."""
    total = Totals()
    for count, (_, totals) in enumerate(done, start=1):
        total += totals
        yield count


def _memory() -> int:
    """Bytes of this process that it shares with no other: the object store counts for none."""
    found = psutil.Process().memory_info()
    return int(found.rss - found.shared)


def driving_lines(figures: Driving) -> list[str]:
    """Figures for people."""
    memory = ", ".join(f"{size / 1e6:.0f}" for size in figures.memory)
    gpus = figures.chunks_per_second * IMAGES / GPU_RATE
    alone = 1000 / figures.driver_ms * IMAGES / GPU_RATE
    return [
        f"driving: {figures.chunks:,} chunks without images through the three stages",
        f"  {figures.chunks_per_second:.1f} chunks/s, driver {figures.driver_ms:.1f} ms of CPU per chunk",
        f"  memory of the driver {memory} MB with the first chunk and after each quarter",
        f"  GPUs of {GPU_RATE:g} images/s with chunks of {IMAGES}: {gpus:.0f} at this rate; {alone:.0f} by what the "
        "driver alone spends, on one core",
    ]

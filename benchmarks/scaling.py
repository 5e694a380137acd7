"""Weak scaling: as many images for each node, on 1, 2, 4 and 8 nodes that Ray simulates on this machine.

A node has one logical GPU and one actor, whose model sleeps a fixed time for each image and needs no CPU: what is
measured is whether driver, tasks and object store keep up. Everything runs on the cores of this one machine, so the
time per image is chosen such that these are not what limits.
"""

import itertools
import logging
import os
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from benchmarks.labelling import fill, run_over, save_model
from benchmarks.stand_ins import SleepingFor
from pipelines.cluster.session import KEEP_IDLE

NODES = (1, 2, 4, 8)
SLEEP_S = 0.05
CHUNK = 16
# The pool fills up in the beginning, and in the end some nodes are done before others.
SKIP, CUT = 0.25, 0.25


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

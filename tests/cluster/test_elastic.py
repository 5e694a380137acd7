"""Pools on a cluster of several nodes with logical GPUs: fractions, growth and what does not fit."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray.cluster_utils import Cluster

from tests.cluster.elastic import ACTORS, LAST
from tests.support import trainjob
from tests.support.paths import ROOT
from tests.support.waiting import until

CHUNKS = 24


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without GPUs and two nodes with one each."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "dashboard_port": 0}
    )
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2, num_gpus=1)
        yield cluster
    finally:
        cluster.shutdown()


@contextlib.contextmanager
def driver(cluster: Cluster, log: Path, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.cluster.elastic", *map(str, arguments)]
    environment = os.environ | {"RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1"}
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def result(cluster: Cluster, log: Path, *arguments: object) -> Any:
    with driver(cluster, log, *arguments) as process:
        return trainjob.result(process, log)


def test_the_pool_grows_with_the_backlog_and_gives_its_gpus_back(
    cluster: Cluster, tmp_path: Path, scene_model: Path
) -> None:
    """Nobody answers before all four are there, nor the last image before three are gone; half a GPU each."""
    bucket, crowd = tmp_path / "bucket", tmp_path / "crowd"
    bucket.mkdir()
    crowd.mkdir()
    for index in range(2 * CHUNKS):
        red = LAST if index == 2 * CHUNKS - 1 else index
        Image.fromarray(np.full((8, 8, 3), red, np.uint8)).save(bucket / f"{index:03d}.png")
    found = result(cluster, tmp_path / "log", "grow_and_shrink", bucket, tmp_path / "labels", scene_model, crowd)
    assert (found["images"], found["labelled"], found["errors"]) == (2 * CHUNKS, 2 * CHUNKS, 0)
    assert len(list(crowd.iterdir())) == ACTORS
    assert len(list((tmp_path / "labels").glob("masks/*/*/*.parquet"))) == CHUNKS


def test_what_does_not_fit_is_told_at_once(cluster: Cluster, tmp_path: Path) -> None:
    told = result(cluster, tmp_path / "log", "refusals")
    assert told == {
        "too many GPUs for one node": "gpus=2.0: an actor lies on one node, and none has more than 1; ask for fewer",
        "more workers than GPUs": "workers=3: the cluster has 2 GPUs; ask for fewer workers or set --gpus",
        "fractions that do not add up": "workers=3: no nodes with 3 x 1 CPU and 0.6 GPU came in 1 s; ask for fewer, "
        "or see why the autoscaler brings none",
        "too many workers for the CPUs": "workers=200: the cluster has 5 CPUs; ask for fewer workers",
        "taken": "workers=1: needs 1 x 1 CPU and 1 GPU and after 1 s the other jobs on the cluster leave 4 CPU, 0 GPU; "
        "wait until they are done, or ask for fewer workers",
        "fits": "1 to 4 of 0.5 CPUs and 0.5 GPUs",
    }


def test_nodes_that_are_still_to_come_are_waited_for(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with driver(cluster, log, "arrival") as process:
        until(lambda: "waiting for nodes with 3 x 1 CPU and 1 GPU" in log.read_text(), process, log)
        node = cluster.add_node(num_cpus=2, num_gpus=1)
        assert trainjob.result(process, log) == "3 to 3 of 1 CPUs and 1 GPUs"
    cluster.remove_node(node)

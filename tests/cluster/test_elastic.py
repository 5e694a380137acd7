"""Pools on a cluster of several nodes with logical GPUs: fractions, growth and what does not fit."""

from __future__ import annotations

import json
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
from tests.support.paths import ROOT

PATIENCE_S = 400
CHUNKS = 24


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without GPUs and two nodes with one each."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "dashboard_port": 0}
    )
    for _ in range(2):
        cluster.add_node(num_cpus=2, num_gpus=1)
    yield cluster
    cluster.shutdown()


def driver(cluster: Cluster, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.cluster.elastic", *map(str, arguments)]
    environment = os.environ | {"RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def result(process: subprocess.Popen[str]) -> Any:
    with process:
        try:
            output, errors = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == 0, errors[-3000:]
    return json.loads(output.splitlines()[-1])


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
    found = result(driver(cluster, "grow_and_shrink", bucket, tmp_path / "labels", scene_model, crowd))
    assert (found["images"], found["labelled"], found["errors"]) == (2 * CHUNKS, 2 * CHUNKS, 0)
    assert len(list(crowd.iterdir())) == ACTORS
    assert len(list((tmp_path / "labels").glob("masks/*/*/*.parquet"))) == CHUNKS


def test_what_does_not_fit_is_told_at_once(cluster: Cluster) -> None:
    told = result(driver(cluster, "refusals"))
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


def test_nodes_that_are_still_to_come_are_waited_for(cluster: Cluster) -> None:
    process = driver(cluster, "arrival")
    assert process.stderr is not None
    for line in process.stderr:
        if "waiting for nodes with 3 x 1 CPU and 1 GPU" in line:
            break
    node = cluster.add_node(num_cpus=2, num_gpus=1)
    assert result(process) == "3 to 3 of 1 CPUs and 1 GPUs"
    cluster.remove_node(node)

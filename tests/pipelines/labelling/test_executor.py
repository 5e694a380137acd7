"""What an actor makes of a checkpoint, with the memory that it may use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines.cluster import resources as cluster
from pipelines.cluster.resources import PASS_SHARE, Share
from pipelines.labelling import executor as streaming
from pipelines.labelling.executor import segmenter_of
from pspnet_core.checkpoints.checkpoint import load_checkpoint
from pspnet_core.inference import segmenter as inference
from pspnet_core.inference.footprint import bytes_per_pixel

SIZE = ((48, 64, 3),)


@pytest.mark.parametrize(("inputs", "expected"), [(100.0, 8), (3.5, 3), (0.1, 1)])
def test_batches_are_sized_to_the_actors_memory(
    inputs: float, expected: int, scene_model: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = Share(workers=1, cpus=1, gpus=0)
    make = segmenter_of(load_checkpoint(scene_model), batch=8, compile=False, share=share)
    network, device = make().model, make().device
    each = 48 * 64 * bytes_per_pixel(network.coarse, bands=3, device=device)
    monkeypatch.setattr(cluster, "total_memory", lambda _: None)
    monkeypatch.setattr(cluster, "machine_memory", lambda: round(inputs * each / PASS_SHARE))
    assert make().limits.of(SIZE) == expected


@pytest.mark.parametrize(
    ("device", "compile", "expected"), [("cpu", False, True), ("cpu", True, False), ("cuda", False, False)]
)
def test_on_cpus_each_thread_of_an_actor_is_a_lane(
    device: str, compile: bool, expected: bool, scene_model: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = Share(workers=1, cpus=1, gpus=0)
    assert share.threads_here() > 1
    monkeypatch.setattr(streaming, "best_device", lambda: torch.device(device))
    monkeypatch.setattr(inference, "compile_network", lambda function, device: function)
    segmenter = segmenter_of(load_checkpoint(scene_model), batch=8, compile=compile, share=share)()
    assert (segmenter.lanes > 1) is expected

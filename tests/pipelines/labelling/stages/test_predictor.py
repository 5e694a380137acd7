"""What an actor makes of a checkpoint, with the resources that it may use."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from pipelines.cluster.machine import LocalResources
from pipelines.labelling.stages import predictor
from pipelines.labelling.stages.predictor import MakeSegmenter
from pspnet_core.checkpoints.checkpoint import load_checkpoint
from pspnet_core.inference import segmenter as inference
from pspnet_core.inference.footprint import bytes_per_pixel

SIZE = ((48, 64, 3),)


def make(model: Path, *, memory: float = 2**34, compile: bool = False) -> MakeSegmenter:
    resources = LocalResources(threads=3, pass_memory=memory, cpus=3, gpus=0)
    return MakeSegmenter(
        load=functools.partial(load_checkpoint, model), batch=8, compile=compile, resources=lambda: resources
    )


@pytest.mark.parametrize(("inputs", "expected"), [(100.0, 8), (3.5, 3), (0.1, 1)])
def test_batches_are_sized_to_the_actors_memory(inputs: float, expected: int, scene_model: Path) -> None:
    segmenter = make(scene_model)()
    each = 48 * 64 * bytes_per_pixel(segmenter.model.coarse, bands=3, device=segmenter.device)
    assert make(scene_model, memory=inputs * each)().limits.of(SIZE) == expected


@pytest.mark.parametrize(("device", "compile", "lanes"), [("cpu", False, 3), ("cpu", True, 0), ("cuda", False, 0)])
def test_on_cpus_each_thread_of_an_actor_is_a_lane(
    device: str, compile: bool, lanes: int, scene_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "best_device", lambda: torch.device(device))
    monkeypatch.setattr(inference, "compile_network", lambda function, device: function)
    assert make(scene_model, compile=compile)().lanes == lanes

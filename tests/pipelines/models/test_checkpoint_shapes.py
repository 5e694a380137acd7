"""Checkpoints as people have them are converted: the logits of the plain state dict, whatever lies around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jobs.cli import main
from pipelines.models.converting import ConvertConfig, convert
from pipelines.models.loading import load_model
from tests.support.checkpoint_shapes import COLOURS, NAMES, SHAPES, mmseg_network
from tests.support.networks import random_images


@functools.cache
def network(build: Callable[[], nn.Module]) -> nn.Module:
    return build()


@functools.cache
def logits(build: Callable[[], nn.Module]) -> Tensor:
    """Those of the plain state dict."""
    images = random_images(1, 64, 72).float()
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    with torch.no_grad():
        answer: Tensor = network(build)((images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))[0]
    return answer


def assert_converted(model: Path | str, build: Callable[[], nn.Module]) -> None:
    with torch.no_grad():
        found = load_model(str(model)).model(random_images(1, 64, 72)).main
    torch.testing.assert_close(found, logits(build), rtol=0, atol=1e-4 * float(logits(build).abs().max()))


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_converted(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shape = SHAPES[name]
    shape.save(shape.content(network(shape.network).state_dict()), tmp_path / shape.name)
    flags = ["--source", str(tmp_path / shape.name), "--output", str(tmp_path / "new")]
    assert main(ConvertConfig, convert, flags) == 0
    assert shape.told in caplog.text
    assert_converted(tmp_path / "new", shape.network)
    if shape.network is mmseg_network:
        table = load_model(str(tmp_path / "new")).classes
        assert (table.names, [list(color) for color in table.colors]) == (NAMES, COLOURS)

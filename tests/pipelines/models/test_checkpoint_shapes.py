"""Checkpoints as people have them are converted: the logits of the plain state dict, whatever lies around it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jobs.cli import main
from pipelines.models.converting import ConvertConfig, convert
from pipelines.models.loading import load_model
from pipelines.storage import open_store
from pipelines.training.initial_weights import read_initial_weights
from pspnet_core.errors import ConfigError
from tests.support.checkpoint_poisons import MARKER, POISONS, make
from tests.support.checkpoint_shapes import COLOURS, NAMES, SHAPES, mmseg_network, smp_network
from tests.support.networks import random_images

Capture = pytest.CaptureFixture[str]


@functools.cache
def logits(build: Callable[[], nn.Module]) -> Tensor:
    """Those of the plain state dict."""
    images = random_images(1, 64, 72).float()
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    with torch.no_grad():
        answer: Tensor = build()((images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))[0]
    return answer


def assert_converted(model: Path | str, build: Callable[[], nn.Module], within: float = 1e-4) -> None:
    with torch.no_grad():
        found = load_model(str(model)).model(random_images(1, 64, 72)).main
    torch.testing.assert_close(found, logits(build), rtol=0, atol=within * float(logits(build).abs().max()))


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_converted(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shape = SHAPES[name]
    shape.save(shape.content(shape.network().state_dict()), tmp_path / shape.name)
    flags = ["--source", str(tmp_path / shape.name), "--output", str(tmp_path / "new")]
    assert main(ConvertConfig, convert, flags) == 0
    assert shape.told in caplog.text
    assert_converted(tmp_path / "new", shape.network, shape.within)
    if shape.network is mmseg_network:
        table = load_model(str(tmp_path / "new")).classes
        assert (table.names, [list(color) for color in table.colors]) == (NAMES, COLOURS)


def test_shards_are_fetched_from_a_bucket(s3_bucket: str, tmp_path: Path) -> None:
    shape = SHAPES["shards"]
    shape.save(smp_network().state_dict(), tmp_path / shape.name)
    bucket = open_store(s3_bucket, field="output")
    for path in tmp_path.iterdir():
        assert bucket.put_if_absent(f"deep/{path.name}", path.read_bytes())
    assert bucket.put_if_absent("shallow/x.safetensors.index.json", b'{"weight_map": {"a": "../deep/y", "b": "z"}}')
    assert bucket.put_if_absent("lost/x.safetensors.index.json", b'{"weight_map": {"b": "z"}}')
    convert(ConvertConfig(source=f"{s3_bucket}/deep/{shape.name}", output=f"{s3_bucket}/new"))
    assert_converted(f"{s3_bucket}/new", smp_network)
    with pytest.raises(ConfigError, match=r"^source=.*\.\./deep/y' leads out of its folder"):
        convert(ConvertConfig(source=f"{s3_bucket}/shallow/x.safetensors.index.json", output=str(tmp_path / "new")))
    with pytest.raises(ConfigError, match=r"^source=.*lost/z: there is no file or folder of that name"):
        convert(ConvertConfig(source=f"{s3_bucket}/lost/x.safetensors.index.json", output=str(tmp_path / "new")))


@pytest.mark.parametrize("name", ["a system call", "a stream of 2^60"])
def test_a_poison_in_a_bucket_is_one_line(name: str, s3_bucket: str, tmp_path: Path, capsys: Capture) -> None:
    data = make(name, tmp_path).read_bytes()
    assert open_store(s3_bucket, field="output").put_if_absent("x.pth", data)
    flags = ["--source", f"{s3_bucket}/x.pth", "--output", str(tmp_path / "new")]
    assert main(ConvertConfig, convert, flags) == 2
    assert re.fullmatch(f"error: source=.*{POISONS[name].told}.*\n", capsys.readouterr().err)
    assert not [*tmp_path.rglob(MARKER)]


@pytest.mark.parametrize("name", ["lightning", "shards", "tar", "timm-ema"])
def test_training_starts_from_a_shape(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    shape.save(shape.content(smp_network().state_dict()), tmp_path / shape.name)
    start = read_initial_weights(str(tmp_path / shape.name))
    expected = smp_network().state_dict()["decoder.conv.0.weight"]
    assert torch.equal(start.weights["fusion.0.weight"], expected)


def test_training_does_not_start_from_a_poison(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^init=.*holds an object of posix\.system"):
        read_initial_weights(str(make("a system call", tmp_path)))
    assert not [*tmp_path.rglob(MARKER)]

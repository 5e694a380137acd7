"""Exported files against the network itself: ONNX in ONNX Runtime, and programs of torch.export."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import pspnet_core
from pspnet_core.checkpoints.checkpoint import Checkpoint
from pspnet_core.checkpoints.export import METADATA_FILE, OPSET, check_installed, describe, save_program, to_onnx
from pspnet_core.checkpoints.settings import InferenceSettings
from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import ClassTable
from pspnet_core.network.backbones import BACKBONES, BackboneSpec, BasicBlock
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig
from tests.support.networks import random_images, trained

# What differs between the sources of checkpoints. Tracing takes seconds for each bin, so few have two.
PAPER = PSPNetConfig(classes=5, backbone="resnet18", bins=(2, 3))
DEEP = PSPNetConfig(classes=4, backbone="resnet18", stem="deep", output_stride=16, bins=(6,))
SEMSEG = dataclasses.replace(DEEP, dilation="full", align_corners=True)
BARE = PSPNetConfig(classes=3, backbone="resnet18", stages=2, bins=(1,), biased_bins=(1,), auxiliary=False)
SMP = dataclasses.replace(BARE, fusion_kernel=1, fusion_order="feature_last", classifier_kernel=3, align_corners=True)
FOUR = PSPNetConfig(classes=6, backbone="resnet18", mean=(1.0, 2.0, 3.0, 4.0), std=(50.0, 60.0, 70.0, 80.0))
COARSE = dataclasses.replace(FOUR, stem="deep32", output_stride=32, avg_down=True, bins=(1, 3))


@pytest.fixture(autouse=True)
def fewest_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one stage have a first and another block: each takes time to trace."""
    monkeypatch.setitem(BACKBONES, "resnet18", BackboneSpec(block=BasicBlock, blocks=(1, 1, 1, 2)))


# Height and width. At stride 8 the feature is 6 cells wide, which all bins divide, or 5 x 17, 33 x 13, 2 x 25, or 1.
SIZES = [(48, 48), (33, 130), (257, 97), (9, 200), (3, 50), (1, 1)]


def _assert_same(found: Tensor, network: PSPNet, images: Tensor) -> None:
    with torch.no_grad():
        expected = network(images).main
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def _session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _run(session: onnxruntime.InferenceSession, images: Tensor) -> Tensor:
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _interface(session: onnxruntime.InferenceSession) -> list[tuple[str, str, list[object]]]:
    return [(value.name, value.type, value.shape) for value in session.get_inputs() + session.get_outputs()]


@pytest.mark.parametrize(("config", "batch"), [(PAPER, 1), (SEMSEG, None), (SMP, 1)], ids=["paper", "semseg", "smp"])
def test_onnx_with_open_sizes(config: PSPNetConfig, batch: int | None, tmp_path: Path) -> None:
    network, path = trained(config), tmp_path / "model.onnx"
    to_onnx(network, path, batch=batch)
    session = _session(path)
    assert _interface(session) == [
        ("images", "tensor(uint8)", [batch or "batch", 3, "height", "width"]),
        ("logits", "tensor(float)", [batch or "batch", config.classes, "height", "width"]),
    ]
    for images in [random_images(batch or 1, *size) for size in SIZES] + [random_images(batch or 3, 40, 70)]:
        _assert_same(_run(session, images), network, images)


def test_onnx_with_given_sizes(tmp_path: Path) -> None:
    network, path = trained(COARSE), tmp_path / "model.onnx"
    metadata = {"name": "coarse", "classes": '["Straße", "b"]'}
    to_onnx(network.train(), path, size=(161, 99), batch=2, metadata=metadata)
    assert network.training
    session = _session(path)
    assert _interface(session) == [
        ("images", "tensor(uint8)", [2, 4, 161, 99]),
        ("logits", "tensor(float)", [2, 6, 161, 99]),
    ]
    _assert_same(_run(session, random_images(2, 161, 99, 4)), network.eval(), random_images(2, 161, 99, 4))
    assert session.get_modelmeta().custom_metadata_map == metadata
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", OPSET)]
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_program_with_open_sizes(tmp_path: Path) -> None:
    network, path = trained(SMP), tmp_path / "model.pt2"
    save_program(network, path, metadata={"name": "smp"})
    extra = {METADATA_FILE: ""}
    run = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra[METADATA_FILE]) == {"name": "smp"}
    for images in [random_images(batch, *size) for batch in (1, 3) for size in SIZES if min(size) > 8]:
        _assert_same(run(images), network, images)
    channels_last = random_images(2, 65, 97).contiguous(memory_format=torch.channels_last)
    _assert_same(run(channels_last), network, channels_last)


def test_a_program_with_a_given_size_and_no_trace_of_its_origin(tmp_path: Path) -> None:
    network, path = trained(COARSE), tmp_path / "model.pt2"
    save_program(network, path, size=(97, 129))
    run = torch.export.load(path).module()
    for batch in (1, 3):
        _assert_same(run(random_images(batch, 97, 129, 4)), network, random_images(batch, 97, 129, 4))
    with pytest.raises((AssertionError, RuntimeError), match="97"):
        run(random_images(1, 98, 129, 4))
    assert str(Path(pspnet_core.__file__).parent).encode() not in path.read_bytes()


def test_the_description_of_a_checkpoint() -> None:
    table = ClassTable(names=("sky", "road"), colors=((1, 2, 3), (4, 5, 6)), ignore=9)
    settings = InferenceSettings(resize="short", size=480)
    network = PSPNet(dataclasses.replace(SMP, classes=2))
    checkpoint = Checkpoint.from_model(network, name="street", classes=table, settings=settings)
    found = describe(checkpoint)
    assert json.loads(found.pop("classes")) == ["sky", "road"]
    assert json.loads(found.pop("palette")) == [[1, 2, 3], [4, 5, 6]]
    inference = json.loads(found.pop("inference"))
    assert (inference["resize"], inference["size"]) == ("short", 480)
    assert found == {
        "name": "street",
        "fingerprint": checkpoint.fingerprint,
        "version": pspnet_core.__version__,
        "ignore": "9",
    }


def test_without_its_libraries_onnx_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, path = PSPNet(SMP), tmp_path / "model.onnx"
    for name, absent in (("onnxscript", "onnxscript"), ("onnx", "onnx and onnxscript")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=rf"{absent} not installed; .*pspnet-batch\[export\]"):
            to_onnx(network, path)
    assert not path.exists()
    check_installed(tmp_path / "model.pt2")


def test_an_old_torch_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.6.1+cpu"))
    with pytest.raises(ConfigError, match=r"needs torch 2\.7; this is 2\.6\.1"):
        check_installed(tmp_path / "model.pt2")
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.10.0"))
    check_installed(tmp_path / "model.pt2")

"""The export job: what it writes, what it says of it, and when it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from pipelines.models import exporting
from pipelines.models.exporting import RUNNERS, ExportConfig, ExportError, export
from pspnet_core.checkpoints.checkpoint import load_checkpoint
from pspnet_core.checkpoints.export import FORMATS, METADATA_FILE, describe, save_program
from pspnet_core.errors import ConfigError
from pspnet_core.network.pspnet import PSPNet


def _config(model: Path, output: Path, **fields: Any) -> ExportConfig:
    given: dict[str, Any] = {"size": (64, 97), "batch": 1, **fields}
    return ExportConfig(model=str(model), output=str(output), **given)


def test_onnx_is_written_and_checked(scene_model: Path, tmp_path: Path) -> None:
    checkpoint, path = load_checkpoint(scene_model), tmp_path / "new" / "scenes.onnx"
    result = export(_config(scene_model, path))
    assert result.pop("max_difference") < 1e-5
    assert result == {
        "model": checkpoint.partition,
        "output": str(path),
        "format": "onnx",
        "bytes": path.stat().st_size,
    }
    assert list(path.parent.iterdir()) == [path]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [1, 3, 64, 97]
    assert session.get_modelmeta().custom_metadata_map == describe(checkpoint)


def test_a_program_is_written_and_checked(scene_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "scenes.pt2"
    path.write_bytes(b"an older one")
    result = export(_config(scene_model, path, size=None, batch=None))
    assert result["format"] == "pt2"
    assert result["max_difference"] < 1e-5
    assert result["bytes"] == path.stat().st_size
    extra = {METADATA_FILE: ""}
    program = torch.export.load(path, extra_files=extra)
    checkpoint = load_checkpoint(scene_model)
    assert json.loads(extra[METADATA_FILE]) == describe(checkpoint)
    images = torch.full((3, 3, 70, 90), 128, dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), checkpoint.model(images).main, rtol=1e-4, atol=1e-5)


def test_without_onnx_runtime_the_file_is_written_unchecked(
    scene_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = export(_config(scene_model, tmp_path / "scenes.onnx"))
    assert result["max_difference"] is None
    assert result["bytes"] == (tmp_path / "scenes.onnx").stat().st_size
    assert "not checked: onnxruntime is not installed" in caplog.text


@pytest.mark.parametrize("value", [0.01, float("nan")])
def test_a_file_that_says_something_else_is_not_put_in_place(
    value: float, scene_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_another(model: PSPNet, path: Path, **options: Any) -> None:
        other = PSPNet(model.config)
        other.load_state_dict(model.state_dict())
        for bias in (parameter for name, parameter in other.decoder.named_parameters() if name.endswith("bias")):
            torch.nn.init.constant_(bias, value)
        save_program(other, path, **options)

    path = tmp_path / "scenes.pt2"
    path.write_bytes(b"an older one")
    monkeypatch.setitem(FORMATS, ".pt2", write_another)
    with pytest.raises(ExportError, match=r"scenes.pt2: its logits differ .*; nothing was written"):
        export(_config(scene_model, path))
    assert path.read_bytes() == b"an older one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"output": "model.pth"}, "output=model.pth: give a local file that ends in .onnx or .pt2"),
        ({"output": "s3://models/a.onnx"}, "output=s3://models/a.onnx: give a local file"),
        ({"output": "a.pt2", "size": (0, 64)}, "size=(0, 64): give a positive height and width"),
        ({"output": "a.pt2", "batch": 0}, "batch=0: give a positive number"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_done(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ExportConfig(model="somewhere", **fields)
    assert str(caught.value).startswith(line)


def test_a_library_is_missed_before_the_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"pspnet-batch\[export\]"):
        export(_config(tmp_path / "absent", tmp_path / "a.onnx"))


def test_an_output_that_cannot_be_written_is_reported(scene_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be written"):
        export(_config(scene_model, tmp_path / "file" / "a.pt2"))


def test_every_format_can_be_checked() -> None:
    assert list(RUNNERS) == list(FORMATS)
    assert exporting.TOLERANCE <= 1e-4

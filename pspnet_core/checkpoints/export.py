"""Export: the network as one file that runs without this code, as ONNX or as a program of ``torch.export``.

Both are traced from a ``deploy`` copy, with sizes left open unless they are given. Pooling and fusion are products with
matrices made of the feature's size, so an open size needs no bins that divide it.

The graph has one input, ``images`` ``(B, N, H, W)`` uint8 (RGB by default), and one output, ``logits`` ``(B, C, H, W)``
float32; normalisation is inside. Shapes: ``B`` batch, ``N`` bands, ``C`` classes, ``H W`` pixels.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import pspnet_core
from pspnet_core.checkpoints.checkpoint import Checkpoint
from pspnet_core.errors import ConfigError
from pspnet_core.network.deploy import deploy
from pspnet_core.network.pspnet import PSPNet

INPUT, OUTPUT = "images", "logits"
AXES = {0: "batch", 2: "height", 3: "width"}
OPSET = 18
"""ONNX operator set: what torch writes without conversion, whichever its version."""
METADATA_FILE = "metadata.json"
"""Where a saved program keeps what ONNX calls metadata properties."""
LIBRARIES = {".onnx": ("onnx", "onnxscript")}
"""File suffix -> libraries that its writer needs besides torch."""
LEAST_TORCH = "2.7"
"""Earlier ones cannot convert an open size to ONNX, nor save such a program."""

# Traced where a size is open; nothing is computed. At any stride the feature of such an image is larger than the grids
# and not as high as wide, because tracing treats sizes that happen to be equal as one.
_EXAMPLE = {0: 2, 2: 1301, 3: 1811}


def describe(checkpoint: Checkpoint) -> dict[str, str]:
    """What users of an exported file need to know besides the graph; all of it text, lists and settings as JSON.

    Returns:
        ``name``, ``fingerprint``, ``version`` (of this code), ``classes`` (names in the order of the channels),
        ``palette`` (an RGB colour for each, 0 to 255), ``ignore`` (the id of unlabelled pixels) and ``inference`` (how
        the checkpoint resizes its inputs; the graph does not).
    """
    return {
        "name": checkpoint.name,
        "fingerprint": checkpoint.fingerprint,
        "version": pspnet_core.__version__,
        "classes": json.dumps(checkpoint.classes.names),
        "palette": json.dumps(checkpoint.classes.colors),
        "ignore": str(checkpoint.classes.ignore),
        "inference": json.dumps(dataclasses.asdict(checkpoint.settings)),
    }


def to_program(model: PSPNet, *, size: tuple[int, int] | None = None, batch: int | None = None) -> ExportedProgram:
    """Trace a network with ``torch.export``.

    Args:
        model: in any mode; it stays as it is.
        size: height and width of the images; None for any above the output stride.
        batch: images at a time; None for any number.

    Returns:
        A program on the CPU from ``(B, N, H, W)`` uint8 to ``(B, C, H, W)`` float32, without the auxiliary head.
    """
    given = _sizes(size, batch)
    shape = [given.get(axis, _EXAMPLE.get(axis, model.config.bands)) for axis in range(4)]
    images = torch.zeros(shape, dtype=torch.uint8)
    # Dim.DYNAMIC, not a Dim with a range: of some conditions, true of any size, torch cannot see that they are.
    dynamic = {axis: Dim.DYNAMIC for axis in AXES if axis not in given}
    network = _MainLogits(deploy(model, device=torch.device("cpu"), winograd=False)).eval()
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        # torch.export.save treats a tensor whose memory is in another order than its shape as part of a larger one.
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    with torch.no_grad():
        program = torch.export.export(network, (images,), dynamic_shapes={INPUT: dynamic}, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of the machine that exported
    return program


def save_program(
    model: PSPNet,
    path: Path,
    *,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``to_program``'s result with ``torch.export.save``; ``torch.export.load`` reads it.

    Args:
        model: as in ``to_program``, like ``size`` and ``batch``.
        path: the file to write, ending in ``.pt2``.
        size: height and width, or None.
        batch: images at a time, or None.
        metadata: kept in the archive as ``metadata.json``.

    Raises:
        ConfigError: where torch is too old.
    """
    check_installed(path)
    extra = {METADATA_FILE: json.dumps(dict(metadata or {}))}
    torch.export.save(to_program(model, size=size, batch=batch), path, extra_files=extra)


def to_onnx(
    model: PSPNet,
    path: Path,
    *,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a network as one ONNX file of operator set ``OPSET``.

    Args:
        model: in any mode; it stays as it is.
        path: the file to write, ending in ``.onnx``.
        size: height and width of the images; None leaves the axes ``height`` and ``width`` open.
        batch: images at a time; None leaves the axis ``batch`` open.
        metadata: texts that become the file's metadata properties.

    Raises:
        ConfigError: where torch is too old or a library is missing.
    """
    check_installed(path)
    program = to_program(model, size=size, batch=batch)
    open_axes = {axis: name for axis, name in AXES.items() if axis not in _sizes(size, batch)}
    # Silence the exporter, which reports that torchvision is not installed, and how it calls torch.
    exporter = logging.getLogger("torch.onnx._internal.exporter._registration")
    with contextlib.ExitStack() as after, warnings.catch_warnings():
        after.callback(exporter.setLevel, exporter.level)
        exporter.setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: open_axes},
            opset_version=OPSET,
            verbose=False,
        )
    assert exported is not None  # that is the older exporter's answer
    exported.model.metadata_props.update(metadata or {})
    exported.save(path, external_data=False)


def check_installed(path: Path) -> None:
    """Raise ConfigError unless what a file of this suffix needs is installed."""
    if torch.__version__ < LEAST_TORCH:
        raise ConfigError("output", path, f"export needs torch {LEAST_TORCH}; this is {torch.__version__}")
    missing = [name for name in LIBRARIES.get(path.suffix, ()) if importlib.util.find_spec(name) is None]
    if missing:
        extra = "install the extra: pip install 'pspnet-batch[export]'"
        raise ConfigError("output", path, f"{' and '.join(missing)} not installed; {extra}")


FORMATS: dict[str, Callable[..., None]] = {".onnx": to_onnx, ".pt2": save_program}
"""File suffix -> its writer: ``(model, path, *, size, batch, metadata)``."""


class _MainLogits(nn.Module):
    """The network with a tensor for its result."""

    def __init__(self, network: PSPNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(B, N, H, W)`` to the main logits ``(B, C, H, W)``; the name of the argument is the input's."""
        main: Tensor = self.network(images).main
        return main


def _sizes(size: tuple[int, int] | None, batch: int | None) -> dict[int, int]:
    """The axes whose size is given."""
    height, width = size or (None, None)
    return {axis: value for axis, value in zip(AXES, (batch, height, width), strict=True) if value is not None}

"""Export: a model URI to one file that runs without this code, put in place once it agrees with the network."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.models.loading import load_model
from pspnet_core.checkpoints.checkpoint import Checkpoint
from pspnet_core.checkpoints.export import FORMATS, INPUT, check_installed, describe
from pspnet_core.errors import ConfigError, PspnetError

log = logging.getLogger(__name__)
TOLERANCE = 1e-4  # of the largest logit
CHECKED_SIZE = (150, 217)  # where the size is open: no grid of the pyramid divides its feature


class ExportError(PspnetError):
    """The exported file computes other logits than the network."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export a model to ONNX or torch.export, normalisation included, and check the file against the network."""

    model: str
    """Checkpoint: a local folder, a URI, runs:/... or models:/name@alias."""
    output: str
    """File to write: FILE.onnx, or FILE.pt2 for torch.export; one that exists is replaced."""
    size: tuple[int, int] | None = None
    """HEIGHT,WIDTH of the images; by default open."""
    batch: int | None = None
    """Images at a time; by default open."""

    def __post_init__(self) -> None:
        if "://" in self.output or Path(self.output).suffix not in FORMATS:
            raise ConfigError("output", self.output, f"give a local file that ends in {' or '.join(FORMATS)}")
        if self.size is not None and min(self.size) < 1:
            raise ConfigError("size", self.size, "give a positive height and width, such as 473,473")
        if self.batch is not None and self.batch < 1:
            raise ConfigError("batch", self.batch, "give a positive number, or none to leave it open")


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the file, run one random image through it and through the network, and put it in place if they agree.

    Returns:
        ``model`` (name and fingerprint), ``output``, ``format`` (its suffix), ``bytes``, and ``max_difference``: the
        largest difference of a logit, as a share of the largest logit; None where ONNX Runtime is not installed.

    Raises:
        ConfigError: a mistake in the config, or a library that is missing.
        ExportError: when file and network disagree; then no file is written.
    """
    path = Path(config.output).expanduser()
    check_installed(path)
    checkpoint = load_model(config.model)
    log.info("exporting %s to %s", checkpoint.partition, path)
    with _staged(path) as staged:
        write = FORMATS[path.suffix]
        write(checkpoint.model, staged, size=config.size, batch=config.batch, metadata=describe(checkpoint))
        difference = _difference(checkpoint, staged, config)
    return {
        "model": checkpoint.partition,
        "output": str(path),
        "format": path.suffix.removeprefix("."),
        "bytes": path.stat().st_size,
        "max_difference": difference,
    }


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A file of the same name to write to, which takes the place of ``path`` unless something is raised."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-")
    except OSError as error:
        raise ConfigError("output", path, f"cannot be written ({error.strerror}); choose another place") from error
    with folder as name:
        staged = Path(name) / path.name
        yield staged
        os.replace(staged, path)


def _difference(checkpoint: Checkpoint, path: Path, config: ExportConfig) -> float | None:
    """How far the file's logits of a random image are from the network's; None where nothing runs the file."""
    run = RUNNERS[path.suffix]
    shape = (config.batch or 1, checkpoint.config.bands, *(config.size or CHECKED_SIZE))
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = run(path, images)
    if found is None:
        return None
    with torch.inference_mode():
        expected = checkpoint.model(images).main
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:  # not a number, too
        reason = f"its logits differ from the network's by {difference:.1e} of the largest"
        raise ExportError(f"{config.output}: {reason}, more than {TOLERANCE:.0e}; nothing was written")
    return difference


def _run_onnx(path: Path, images: Tensor) -> Tensor | None:
    try:
        import onnxruntime
    except ImportError:
        log.warning("the file is not checked: onnxruntime is not installed")
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {INPUT: images.numpy()})
    return torch.from_numpy(logits)


def _run_program(path: Path, images: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = torch.export.load(path).module()(images)
    return logits


RUNNERS: dict[str, Callable[[Path, Tensor], Tensor | None]] = {".onnx": _run_onnx, ".pt2": _run_program}
"""File suffix -> what runs such a file on ``(B, N, H, W)`` uint8."""

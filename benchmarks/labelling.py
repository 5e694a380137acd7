"""Steady-state labelling with a stub in place of the network: what everything but the network costs.

The stub returns a ready class map and confidence map at once; list, read, decode, statistics, run-length code and write
are the real ones, on 480x360 JPEGs in a local folder.
"""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.labelling import LabelConfig, label
from pspnet_core import checkpoints
from pspnet_core.inference import Prediction, Prepared
from pspnet_core.pspnet import PSPNet, PSPNetConfig
from pspnet_core.scenes import SCENE_CLASSES, draw_scene

WIDTH, HEIGHT = 480, 360


class StubPredictor:
    """Answers every image with the same ready mask, that of a drawn scene, and a smooth confidence map."""

    def __init__(self) -> None:
        mask = draw_scene(0, width=WIDTH, height=HEIGHT)[1]
        confidence = np.random.default_rng(0).uniform(0.5, 1.0, mask.shape).astype(np.float32)
        self.answer = Prediction(mask, confidence)

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """The image as it is."""
        return Prepared(image.shape[0], image.shape[1], (image,))

    def predict(self, images: Iterable[Prepared]) -> Iterator[Prediction]:
        """The ready answer, once per image."""
        for _ in images:
            yield self.answer


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run showed."""

    images: int
    images_per_second: float
    """Between the first chunk's file and the last one's: start-up excluded."""
    with_start: float
    """Over the whole call, start of Ray and actors included."""
    cpu_ms: dict[str, float]
    """CPU milliseconds per image, stage by stage."""


def run(folder: Path, *, images: int, photographs: Path | None, chunk: int = 256) -> Result:
    """Label ``images`` copies of some 480x360 JPEGs with the stub.

    Args:
        photographs: folder of JPEGs to copy from; drawn scenes when None.
    """
    bucket = folder / "bucket"
    fill(bucket, images, photographs)
    config = LabelConfig(input=str(bucket), output=str(folder / "labels"), model=str(save_model(folder)), chunk=chunk)
    result = label(config, StubPredictor)
    written = sorted(path.stat().st_mtime for path in (folder / "labels").glob("masks/*/*/*.parquet"))
    steady = (len(written) - 1) * chunk / (written[-1] - written[0])
    return Result(
        images=result["images"],
        images_per_second=steady,
        with_start=result["images_per_second"],
        cpu_ms=result["cpu_ms"],
    )


def fill(bucket: Path, images: int, photographs: Path | None) -> None:
    """Copy JPEGs into the bucket, over and over until there are enough."""
    bucket.mkdir(parents=True)
    sources = sorted(photographs.rglob("*.jpg")) if photographs else list(_drawn(bucket.parent / "drawn", 64))
    for index in range(images):
        shutil.copyfile(sources[index % len(sources)], bucket / f"{index:07d}.jpg")


def save_model(folder: Path) -> Path:
    """Any checkpoint will do: the stub takes its place, but the class table and the fingerprint are needed."""
    torch.manual_seed(0)
    model = PSPNet(PSPNetConfig(classes=len(SCENE_CLASSES), backbone="resnet18"))
    checkpoints.from_model(model, name="stub", classes=SCENE_CLASSES).save(folder / "model")
    return folder / "model"


def _drawn(folder: Path, count: int) -> Iterator[Path]:
    folder.mkdir()
    for seed in range(count):
        buffer = BytesIO()
        Image.fromarray(draw_scene(seed, width=WIDTH, height=HEIGHT)[0]).save(buffer, "JPEG", quality=90)
        (folder / f"{seed}.jpg").write_bytes(buffer.getvalue())
        yield folder / f"{seed}.jpg"


def lines(result: Result) -> list[Any]:
    """The result as lines to print."""
    stages = ", ".join(f"{stage} {value:.2f}" for stage, value in result.cpu_ms.items())
    return [
        f"labelling, stub network, {result.images} JPEGs of {WIDTH}x{HEIGHT}",
        f"  steady state  {result.images_per_second:.0f} images/s ({result.with_start:.0f} with start-up)",
        f"  CPU ms/image  {stages} (segment holds decode and encode)",
    ]

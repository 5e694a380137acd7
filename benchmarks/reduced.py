"""Decoding to fewer pixels: what it saves, and what it costs in mIoU.

Large JPEGs whose network input is smaller (the short side of 1280x960 brought to 480) are prepared and labelled twice:
from all their pixels, and with the setting ``reduced``. Time is CPU time of one thread, as decoding threads spend it.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.labelling import save_model
from pipelines.datasets.layouts import open_dataset
from pipelines.demo.scenes import SCENE_CLASSES, draw_scene
from pspnet_core.checkpoints.checkpoint import load_checkpoint
from pspnet_core.images.classes import ClassTable
from pspnet_core.inference.inputs import Prepared
from pspnet_core.inference.segmenter import Segmenter, prediction_of
from pspnet_core.metrics.confusion import ConfusionMatrix

WIDTH, HEIGHT = 1280, 960
SHORT = 480
REPEAT = 5

Labelled = tuple[bytes, NDArray[np.integer]]
"""An image file and its mask of class ids."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the two ways showed, all pixels first."""

    images: int
    trained: bool
    """Whether the model was a given one; scores of random weights say nothing."""
    miou: tuple[float, float]
    prepare_ms: tuple[float, float]
    """CPU milliseconds to decode and resize an image, median over the images of the best of some tries."""
    agreement: float
    """Share of pixels that get the same class."""


def run(folder: Path, *, images: int, model: Path | None, data: Path | None) -> Result:
    """Label both ways.

    Args:
        images: how many.
        model: checkpoint folder; random weights by default.
        data: labelled images in layout ``folder``, of which the split ``val`` is taken; drawn scenes by default.
    """
    checkpoint = load_checkpoint(model or save_model(folder))
    rule = dataclasses.replace(checkpoint.settings, resize="short", size=SHORT)
    ways = [
        Segmenter(checkpoint.model, dataclasses.replace(rule, reduced=reduced), batch=1) for reduced in (False, True)
    ]
    classes, pairs = _of_data(data) if data else (SCENE_CLASSES, _drawn(images))
    scores = [ConfusionMatrix(len(classes)) for _ in ways]
    seconds: list[list[float]] = [[] for _ in ways]
    same = pixels = done = 0
    for image, target in (pair for pair, _ in zip(pairs, range(images), strict=False)):
        masks = []
        for way, score, spent in zip(ways, scores, seconds, strict=True):
            prepared, best = _best_of(REPEAT, lambda way=way, image=image: way.decode(image))  # type: ignore[misc]
            spent.append(best)
            ((_, outcome),) = way.predict([(0, prepared)])
            masks.append(prediction_of(outcome).mask)
            score.update(masks[-1], target, ignore=classes.ignore)
        same, pixels, done = same + int((masks[0] == masks[1]).sum()), pixels + masks[0].size, done + 1
    return Result(
        images=done,
        trained=model is not None,
        miou=(scores[0].miou, scores[1].miou),
        prepare_ms=(1000 * statistics.median(seconds[0]), 1000 * statistics.median(seconds[1])),
        agreement=same / pixels,
    )


def lines(result: Result) -> list[str]:
    """The result as lines to print."""
    rows = [
        f"  {name:12} {ms:6.2f} CPU ms/image to decode and resize" + (f", mIoU {miou:.4f}" * result.trained)
        for name, ms, miou in zip(("all pixels", "reduced"), result.prepare_ms, result.miou, strict=True)
    ]
    difference = f", mIoU {100 * (result.miou[1] - result.miou[0]):+.2f} points" * result.trained
    return [
        f"reduced decoding of {result.images} JPEGs, short side to {SHORT}",
        *rows,
        f"  {result.agreement:.2%} of the pixels get the same class{difference}",
    ]


def _best_of(tries: int, function: Callable[[], Prepared]) -> tuple[Prepared, float]:
    """The last result, and the least CPU seconds of this thread that one took."""
    found = []
    for _ in range(tries):
        start = time.thread_time()
        found.append((function(), time.thread_time() - start))
    return found[-1][0], min(seconds for _, seconds in found)


def _of_data(data: Path) -> tuple[ClassTable, Iterator[Labelled]]:
    dataset = open_dataset(str(data), "folder")

    def pairs() -> Iterator[Labelled]:
        for pair in dataset.split("val"):
            sample = dataset.fetch(pair)
            yield sample.image, dataset.decode(pair, sample)[1]

    return dataset.classes, pairs()


def _drawn(count: int) -> Iterator[Labelled]:
    for seed in range(count):
        image, mask = draw_scene(seed, width=WIDTH, height=HEIGHT)
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue(), mask

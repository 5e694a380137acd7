"""What everything but the network costs in labelling, and how close it comes to the network's own rate.

A stand-in takes the network's place (``Instant``, ``Sleeping``); list, read, decode, statistics, run-length code and
write are the real ones, on 480x360 JPEGs in a local folder.
"""

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.meter import Meter, Sample, Steady, steady
from pipelines.cluster.resources import ActorConfig
from pipelines.demo.scenes import SCENE_CLASSES, draw_scene
from pipelines.labelling.config import LabelConfig
from pipelines.labelling.job import label
from pipelines.labelling.stages.predictor import Predictor
from pspnet_core.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from pspnet_core.images.decoding import decode_image
from pspnet_core.inference.batching import one_ahead
from pspnet_core.inference.inputs import Prepared
from pspnet_core.inference.memory import BatchLimits
from pspnet_core.inference.segmenter import Prediction, Segmenter
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig

WIDTH, HEIGHT = 480, 360

BATCH = 8
"""Images that a stand-in that sleeps takes at a time, as ``--batch`` of the real network."""
SLEEP_S = 0.002
"""Time for an image of the stand-in that sleeps."""
SIDE = 473
"""Pixels of the images for the real network."""


class Instant:
    """Answers every image at once with the same ready mask, that of a drawn scene, and a confidence map."""

    def __init__(self) -> None:
        mask = draw_scene(0, width=WIDTH, height=HEIGHT)[1]
        confidence = np.random.default_rng(0).uniform(0.5, 1.0, mask.shape).astype(np.float32)
        self.answer = Prediction(mask, confidence)

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """The image as it is."""
        return Prepared(image.shape[0], image.shape[1], (image,))

    def predict(self, images: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, Prediction]]:
        """The ready answer, once per image."""
        for key, _ in images:
            yield key, self.answer


class Sleeping(Instant):
    """Takes some time for each image, in which it needs no CPU and lets other threads run, as a GPU does.

    Like one it works on batches, one after the other, and is given the next before the last is waited for.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.device = ThreadPoolExecutor(1)

    def predict(self, images: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, Prediction]]:
        """The ready answer, once per image, when the device is through with its batch."""
        waiting = iter(images)
        batches = iter(lambda: list(itertools.islice(waiting, BATCH)), [])
        for done in one_ahead(self.device.submit(self._work, batch) for batch in batches):
            yield from done.result()

    def _work(self, batch: list[tuple[int, Prepared]]) -> list[tuple[int, Prediction]]:
        time.sleep(len(batch) * self.seconds)
        return [(key, self.answer) for key, _ in batch]


@dataclass(frozen=True)
class SleepingFor:
    """Builds a ``Sleeping`` on an actor."""

    seconds: float

    def __call__(self) -> Sleeping:
        """Of this many seconds for each image."""
        return Sleeping(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run showed."""

    images: int
    steady: Steady
    """Between the first chunk's file and the last one's: start-up excluded."""
    with_start: float
    """Images per second over the whole call, start of Ray and actors included."""
    cpu_ms: dict[str, float]
    """CPU milliseconds per image, stage by stage."""


def run(folder: Path, *, images: int, photographs: Path | None, chunk: int = 256) -> Result:
    """Label ``images`` copies of some 480x360 JPEGs with the stand-in that answers at once.

    Args:
        photographs: folder of JPEGs to copy from; drawn scenes when None.
    """
    bucket = fill(folder / "bucket", images, photographs)
    return run_over(bucket, folder / "labels", save_model(folder), Instant, chunk=chunk)


def run_over(
    bucket: Path,
    labels: Path,
    model: Path,
    make_predictor: Callable[[], Predictor] | None,
    *,
    chunk: int,
    workers: str | None = None,
    skip: float = 0.0,
    cut: float = 0.0,
) -> Result:
    """Label a bucket on Ray.

    Args:
        make_predictor: the network by default.
        skip, cut: as for ``steady``.
    """
    config = LabelConfig(
        input=str(bucket),
        output=str(labels),
        model=str(model),
        chunk=chunk,
        actors=ActorConfig(workers=workers),
        local=False,
    )
    result = label(config, make_predictor)
    return Result(
        images=result["images"],
        steady=steady(labels.glob("masks/*/*/*.parquet"), _rows, skip=skip, cut=cut),
        with_start=result["images_per_second"],
        cpu_ms=result["cpu_ms"],
    )


def lines(result: Result) -> list[Any]:
    """The result as lines to print."""
    stages = ", ".join(f"{stage} {value:.2f}" for stage, value in result.cpu_ms.items())
    return [
        f"labelling, stub network, {result.images} JPEGs of {WIDTH}x{HEIGHT}",
        f"  steady state  {result.steady.rate:.0f} images/s ({result.with_start:.0f} with start-up)",
        f"  CPU ms/image  {stages} (segment holds decode and encode)",
    ]


def executors(folder: Path, *, counts: Iterable[int], backbone: str) -> list[str]:
    """Seconds of whole runs on Ray, whose start is part of them, and in a child process, in turn."""
    model = save_model(folder, backbone=backbone)
    rows = []
    for count in counts:
        bucket = fill(folder / f"{count}/bucket", count, None)
        seconds = {}
        for name, local in (("on Ray", False), ("in process", True)):
            start = time.perf_counter()
            labels = str(folder / f"labels-{count}-{local}")
            label(LabelConfig(input=str(bucket), output=labels, model=str(model), local=local))
            seconds[name] = time.perf_counter() - start
        times = ", ".join(f"{name} {taken:.1f} s" for name, taken in seconds.items())
        rows.append(f"  {count:5d} images  {times}, {seconds['on Ray'] / seconds['in process']:.2f} times as long")
    return [f"labelling by both executors, {backbone}, JPEGs of {WIDTH}x{HEIGHT}, start-up included", *rows]


def sleeping(folder: Path, *, images: int, photographs: Path | None, chunk: int = 256) -> list[str]:
    """Which share of its own rate a stand-in reaches that sleeps for each image."""
    bucket = fill(folder / "bucket", images, photographs)
    make = SleepingFor(SLEEP_S)
    stand_in = make()
    prepared = [stand_in.prepare(decode_image(next(bucket.iterdir()).read_bytes()))] * 500
    own = _rate(stand_in, prepared)
    found = run_over(bucket, folder / "labels", save_model(folder), make, chunk=chunk).steady.rate
    return [
        f"labelling, a stand-in that sleeps {1000 * SLEEP_S:g} ms for each of {images} JPEGs of {WIDTH}x{HEIGHT}",
        f"  {found:.1f} images/s, {found / own:.1%} of its own {own:.1f}",
    ]


def bare(folder: Path, *, images: int, backbone: str, chunk: int = 16, batch: int = 8) -> list[str]:
    """Labelling with the real network against loops over ready images, before and after it, with as many threads."""
    bucket = fill(folder / "bucket", images, None, width=SIDE, height=SIDE)
    model = save_model(folder, backbone=backbone)
    checkpoint = load_checkpoint(model)
    threads = torch.get_num_threads()
    plain = Segmenter(checkpoint.model, checkpoint.settings, batch=batch)
    plain.limits = BatchLimits(batch)
    loops = {
        f"in batches of {batch}, all threads on each": plain,
        "in passes as large as ours, all threads on each": Segmenter(
            checkpoint.model, checkpoint.settings, batch=batch
        ),
        "by our lanes, a thread for each": Segmenter(checkpoint.model, checkpoint.settings, batch=batch, lanes=threads),
    }
    prepared = [plain.decode(path.read_bytes()) for path in sorted(bucket.iterdir())[: 6 * batch]]

    def rates() -> list[float]:
        found = []
        for segmenter in loops.values():
            torch.set_num_threads(threads)
            found.append(_rate(segmenter, prepared))
        return found

    before = rates()
    found = run_over(bucket, folder / "labels", model, None, chunk=chunk).steady.rate
    rows = zip(loops, before, rates(), strict=True)
    return [
        f"labelling, {backbone}, {images} JPEGs of {SIDE}x{SIDE}, against loops over ready images, before and after",
        f"  {found:.3f} images/s",
        *(f"  {2 * found / (a + b):6.1%} of the loop {how} ({a:.3f}, {b:.3f})" for how, a, b in rows),
    ]


def memory(folder: Path, *, images: int, photographs: Path | None, chunk: int = 256) -> list[str]:
    """Memory of driver, actors and object store at some moments of a run over many images."""
    # Links, as so many copies are a lot of disk; to the storage they are files like others.
    bucket = fill(folder / "bucket", images, photographs, copy=os.link)
    with Meter(every=0.5, memory=True) as meter:
        result = run_over(bucket, folder / "labels", save_model(folder), Instant, chunk=chunk)
    stretch = result.steady
    rows = []
    for share in (0.1, 0.5, 1.0):
        sample = meter.at(stretch.since + share * (stretch.until - stretch.since))
        rows.append(f"  after {share:4.0%}  {_megabytes(sample)}")
    return [f"memory of labelling, stub network, {images} images, chunks of {chunk}, in MB", *rows]


def fill(
    bucket: Path,
    images: int,
    photographs: Path | None,
    *,
    width: int = WIDTH,
    height: int = HEIGHT,
    copy: Callable[[Path, Path], object] = shutil.copyfile,
) -> Path:
    """Copy JPEGs into the bucket, over and over until there are enough; drawn scenes where there are no photographs."""
    bucket.mkdir(parents=True)
    if photographs:
        sources = sorted(photographs.rglob("*.jpg"))
    else:
        sources = list(_drawn(bucket.parent / "drawn", min(64, images), width, height))
    for index in range(images):
        copy(sources[index % len(sources)], bucket / f"{index:07d}.jpg")
    return bucket


def save_model(folder: Path, *, backbone: str = "resnet18") -> Path:
    """A checkpoint with random weights. A stand-in needs its class table and its fingerprint only."""
    torch.manual_seed(0)
    model = PSPNet(PSPNetConfig(classes=len(SCENE_CLASSES), backbone=backbone))
    save_checkpoint(model, folder / "model", name="random", classes=SCENE_CLASSES)
    return folder / "model"


def _rate(predictor: Predictor, prepared: Iterable[Any]) -> float:
    """Images per second of a predictor that is given ready images, after two of them to warm up."""
    ready = list(enumerate(prepared))
    list(predictor.predict(ready[:2]))
    start = time.perf_counter()
    count = sum(1 for _ in predictor.predict(ready))
    return count / (time.perf_counter() - start)


def _rows(path: Path) -> int:
    return int(pq.read_metadata(path).num_rows)


def _megabytes(sample: Sample) -> str:
    return ", ".join(f"{kind} {size / 1e6:.0f}" for kind, size in sorted(sample.memory.items()))


def _drawn(folder: Path, count: int, width: int, height: int) -> Iterator[Path]:
    folder.mkdir()
    for seed in range(count):
        buffer = BytesIO()
        Image.fromarray(draw_scene(seed, width=width, height=height)[0]).save(buffer, "JPEG", quality=90)
        (folder / f"{seed}.jpg").write_bytes(buffer.getvalue())
        yield folder / f"{seed}.jpg"

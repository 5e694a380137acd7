"""Labelling beside the scripts that people write for it, with the same stand-in for the network in all of them.

One is the usual chain of Ray Data (``read_images``, ``map_batches``, ``write_parquet``), the other a loop over torch's
DataLoader that writes a PNG for each image. Neither keeps statistics, nor a ledger, nor goes on where it was
interrupted; both decode with Pillow as we do. Rates are counted between the first file that was written and the last,
so that the start of Ray, actors and processes is left out, and CPU time is that of the whole machine meanwhile.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray.data
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.labelling import HEIGHT, WIDTH, Instant, fill, run_over, save_model
from benchmarks.meter import Meter, Steady, steady
from pipelines.cluster.ray_data import quiet_ray_data
from pipelines.cluster.session import ray_session

BATCH = 8
CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one contender did."""

    images_per_second: float
    cpu_ms: float
    """CPU milliseconds of the whole machine per image."""


class Labeller:
    """What the usual script hands to ``map_batches``."""

    def __init__(self) -> None:
        self.predictor = Instant()

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Add a mask to each image of a batch."""
        prepared = enumerate(self.predictor.prepare(image) for image in batch["image"])
        masks = [prediction.mask for _, prediction in self.predictor.predict(prepared)]
        return {"path": batch["path"], "mask": np.stack(masks)}


class Files(Dataset[tuple[str, NDArray[np.uint8]]]):
    """Name and pixels of some images."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, NDArray[np.uint8]]:
        with Image.open(self.paths[index]) as image:
            return self.paths[index].stem, np.asarray(image.convert("RGB"))


def by_ray_data(bucket: Path, output: Path) -> Steady:
    """The usual chain of Ray Data, one actor."""
    with ray_session():
        quiet_ray_data()
        images = ray.data.read_images(str(bucket), mode="RGB", include_paths=True)
        masks = images.map_batches(
            Labeller,
            batch_size=BATCH,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=1,
        )
        masks.write_parquet(str(output))
    return steady(output.glob("*.parquet"), lambda path: int(pq.read_metadata(path).num_rows))


def by_data_loader(bucket: Path, output: Path) -> Steady:
    """A loop over torch's DataLoader with a process per core, which writes PNG masks."""
    output.mkdir()
    predictor = Instant()
    loader = DataLoader(
        Files(sorted(bucket.iterdir())), batch_size=BATCH, num_workers=os.cpu_count() or 1, collate_fn=list
    )
    for batch in loader:
        prepared = enumerate(predictor.prepare(image) for _, image in batch)
        for index, prediction in predictor.predict(prepared):
            name, _ = batch[index]
            Image.fromarray(prediction.mask).save(output / f"{name}.png")
    return steady(output.glob("*.png"), lambda _: 1)


def by_us(bucket: Path, output: Path) -> Steady:
    """Our own chain, one actor."""
    with ray_session():
        model = save_model(output)
        return run_over(bucket, output / "labels", model, Instant, chunk=CHUNK, workers="1").steady


CONTENDERS: dict[str, Callable[[Path, Path], Steady]] = {
    "torch DataLoader, PNG masks": by_data_loader,
    "Ray Data: read_images, map_batches, write_parquet": by_ray_data,
    "ours": by_us,
}


def run(folder: Path, *, images: int, photographs: Path | None) -> dict[str, Figures]:
    """Every contender in turn over the same images."""
    bucket = fill(folder / "bucket", images, photographs)
    found = {}
    for index, (name, contender) in enumerate(CONTENDERS.items()):
        with Meter() as meter:
            stretch = contender(bucket, folder / f"output-{index}")
        cpu_ms = 1000 * meter.cpu_seconds(stretch.since, stretch.until) / stretch.images
        found[name] = Figures(images_per_second=stretch.rate, cpu_ms=cpu_ms)
    return found


def lines(figures: dict[str, Figures], images: int) -> list[str]:
    """Figures for people; ours is the last."""
    *_, ours = figures.values()
    return [
        f"labelling with the same stub network, {images} JPEGs of {WIDTH}x{HEIGHT}, start-up excluded",
        *(
            f"  {name:50} {found.images_per_second:6.1f} images/s, CPU {found.cpu_ms:5.2f} ms/image, "
            f"ours is {ours.images_per_second / found.images_per_second:.1f} times as fast"
            for name, found in figures.items()
        ),
    ]

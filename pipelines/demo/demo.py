"""The whole product on one machine in minutes: draw scenes, train, register, label, label again, query, look.

Everything is real (Ray Train, Ray Data, MLflow, the label table) and small; only the photographs are drawn.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from PIL import Image

from pipelines.cluster.session import ray_session
from pipelines.datasets.layouts import DataConfig
from pipelines.demo.scenes import SCENE_CLASSES, draw_scene
from pipelines.labelling.config import LabelConfig
from pipelines.labelling.job import label
from pipelines.tracking.server import local_tracking
from pipelines.training.config import StepConfig, TrainConfig
from pipelines.training.initial_weights import NetworkConfig
from pipelines.training.job import train
from pipelines.training.scaling import ScalingConfig
from pspnet_core.errors import ConfigError
from pspnet_core.images import run_lengths
from pspnet_core.images.decoding import decode_image
from pspnet_core.images.masks import to_png
from pspnet_core.images.overlays import Row, contact_sheet
from pspnet_core.training.augment import AugmentConfig
from pspnet_core.training.optim import OptimiserConfig, ScheduleConfig

CLASS_SHARES = """
SELECT s.name AS class, count(*) AS images, round(100.0 * sum(s.pixels) / sum(sum(s.pixels)) OVER (), 2) AS percent
FROM (SELECT unnest(class_stats) AS s FROM read_parquet('{labels}', hive_partitioning = true) WHERE status = 'ok')
GROUP BY ALL ORDER BY percent DESC
"""
ERRORS = "SELECT key, error FROM read_parquet('{labels}', hive_partitioning = true) WHERE status = 'error' ORDER BY key"
FIRST = """
SELECT uri, width, height, mask_classes, mask_lengths FROM read_parquet('{labels}', hive_partitioning = true)
WHERE status = 'ok' ORDER BY key LIMIT {count}
"""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Draw street scenes, train PSPNet-18 on them, label a bucket twice and show the result."""

    output: str = "demo"
    """Folder for everything the demo makes; a new or empty one."""
    train: int = 320
    """Scenes to learn from."""
    images: int = 300
    """Fresh scenes to label, besides the broken files among them."""
    epochs: int = 8
    """Passes over the training scenes."""
    workers: int = 2
    """Data-parallel training workers."""
    seed: int = 0
    """Seed of scenes and training."""


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo; prints what it does and what to look at.

    Returns:
        ``miou`` on held-out scenes, the counts of both labelling runs, and the paths of ``sheet`` and ``labels``.

    Raises:
        ConfigError: when the output folder is not empty.
    """
    root = Path(config.output).resolve()
    if root.exists() and any(root.iterdir()):
        raise ConfigError("output", config.output, "is not empty; remove it (make demo does) or choose another folder")
    say = _narrator()
    say(f"drawing {config.train} training scenes and a bucket of {config.images} fresh ones")
    draw_dataset(root / "data", train=config.train, val=48, seed=config.seed)
    broken = draw_bucket(root / "bucket", images=config.images, seed=config.seed + 1_000_000)
    with local_tracking(root), ray_session():
        say(f"training PSPNet-18 with {config.workers} Ray Train workers, {config.epochs} epochs")
        trained = train(_train_config(config, root))
        say(f"held-out mIoU {trained['metrics']['miou']:.3f}; registered as {trained['model']}")
        labelling = LabelConfig(
            input=str(root / "bucket"), output=str(root / "labels"), model=str(trained["model"]), chunk=64
        )
        say(f"labelling the bucket, {broken} of whose files are broken")
        first = label(labelling)
        say("the same command again")
        second = label(labelling)
    say(f"second run: {second['skipped']} skipped, {second['labelled']} labelled: nothing is done twice")
    labels = str(first["labels"])
    say(f"class shares, by SQL over {labels}", duckdb.sql(CLASS_SHARES.format(labels=labels)))
    say("broken files are rows, too", duckdb.sql(ERRORS.format(labels=labels)))
    sheet = _draw_sheet(labels, root / "contact-sheet.png")
    say(f"look at   {sheet}")
    say(f"compare   .venv/bin/mlflow ui --backend-store-uri sqlite:///{root / 'mlflow.db'}")
    return {
        "miou": trained["metrics"]["miou"],
        "first": first,
        "second": second,
        "sheet": str(sheet),
        "labels": labels,
    }


def draw_dataset(folder: Path, *, train: int, val: int, seed: int) -> None:
    """Write labelled scenes in layout ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(json.dumps(SCENE_CLASSES.to_json()))
    for split, count, first in (("train", train, seed), ("val", val, seed + 500_000)):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            image, mask = draw_scene(number)
            Image.fromarray(image).save(folder / "images" / split / f"{number:07d}.jpg", quality=90)
            (folder / "masks" / split / f"{number:07d}.png").write_bytes(to_png(mask))


def draw_bucket(folder: Path, *, images: int, seed: int) -> int:
    """Write fresh scenes, and among them files that are broken the usual ways; returns how many are."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(seed, seed + images):
        Image.fromarray(draw_scene(number)[0]).save(folder / f"street-{number:07d}.jpg", quality=90)
    truncated = folder / "broken-truncated.jpg"
    Image.fromarray(draw_scene(seed)[0]).save(truncated, quality=90)
    os.truncate(truncated, truncated.stat().st_size // 2)
    (folder / "broken-empty.jpg").touch()
    (folder / "broken-page.jpg").write_text("<html>404 Not Found</html>")
    Image.new("1", (20000, 20000)).save(folder / "broken-bomb.png")  # a few hundred kB, but 400 million pixels
    return len(list(folder.glob("broken-*")))


def _train_config(config: DemoConfig, root: Path) -> TrainConfig:
    return TrainConfig(
        dataset=DataConfig(data=str(root / "data")),
        output=str(root / "checkpoints"),
        name="street-scenes",
        seed=config.seed,
        network=NetworkConfig(backbone="resnet18", output_stride=16),
        augmentation=AugmentConfig(crop=112, scale=(0.9, 1.2)),
        optimiser=OptimiserConfig(kind="adamw", lr=2e-3, head_lr_factor=1.0, weight_decay=0.01),
        schedule=ScheduleConfig(epochs=config.epochs, warmup=20),
        step=StepConfig(class_balance=0.4),
        scaling=ScalingConfig(workers=str(config.workers)),
    )


def _narrator() -> Callable[..., None]:
    """Print numbered steps to standard error (standard output holds the result line alone)."""
    steps = itertools.count(1)

    def say(text: str, *tables: Any) -> None:
        print(f"\n[{next(steps)}] {text}", *tables, sep="\n", file=sys.stderr, flush=True)

    return say


def _draw_sheet(labels: str, path: Path, count: int = 12) -> Path:
    """Save a contact sheet of the first labelled images, from the label table alone."""
    rows: list[Row] = []
    for uri, width, height, classes, lengths in duckdb.execute(FIRST.format(labels=labels, count=count)).fetchall():
        mask = run_lengths.decode(np.array(classes, np.int32), np.array(lengths, np.int32), height, width)
        rows.append((decode_image(Path(uri).read_bytes()), mask))
    contact_sheet(rows, SCENE_CLASSES).save(path)
    return path

"""Labelling in tests: scenes as image files, a config, and what a run leaves behind."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import duckdb
from PIL import Image

from pipelines.demo.scenes import draw_scene
from pipelines.label_table.ledger import Ledger
from pipelines.label_table.schema import Paths
from pipelines.labelling.config import LabelConfig
from pipelines.process.config_tree import build
from pipelines.storage import open_store
from pspnet_core.checkpoints.checkpoint import load_checkpoint


def scene(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    """A small image, the same for each seed."""
    return Image.fromarray(draw_scene(seed, width=width, height=height)[0])


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def put_scene(path: Path, seed: int, width: int = 64, height: int = 48) -> Path:
    """A scene as a file, of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scene(seed, width, height).save(path)
    return path


def make_config(folder: Path, model: Path, /, **changes: Any) -> LabelConfig:
    """``folder/bucket`` is labelled into ``folder/labels`` without Ray; any flag may be another one."""
    flags: dict[str, Any] = {"input": str(folder / "bucket"), "output": str(folder / "labels"), "model": str(model)}
    return build(LabelConfig, flags | {"chunk": 4, "date": "2026-01-31", "local": True} | changes)


def ledger_of(config: LabelConfig) -> Ledger:
    """The ledger of a config's model and output."""
    paths = Paths(partition=load_checkpoint(Path(config.model)).partition)
    return Ledger(open_store(config.output, field="output"), paths)


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The label table of a run, by key."""
    table = duckdb.read_parquet(result["labels"], hive_partitioning=True).order("key").to_arrow_table()
    assert table is not None
    return [*table.to_pylist()]


def sql(query: str, files: object) -> list[Any]:
    """What DuckDB answers; ``?`` in the query stands for the files."""
    return duckdb.execute(query, [str(files)]).fetchall()


def record_path(config: LabelConfig, result: dict[str, Any]) -> Path:
    """Where the record of a run lies."""
    return Path(config.output, "runs", f"{result['run_id']}.json")


def record_of(config: LabelConfig, result: dict[str, Any]) -> dict[str, Any]:
    """The record of a run."""
    return dict(json.loads(record_path(config, result).read_text()))

"""The schemas that readers rely on: each column of each file, its type, and whether it may be empty."""

import numpy as np
import pyarrow as pa
import pytest

from pipelines.label_table.schema import CLASS_STATISTIC, CLASS_STATS, CLASSES, LISTING, MASKS
from pspnet_core.images.statistics import class_statistics

STATISTIC = "struct<class_id: int32, name: string, pixels: int64, fraction: double, confidence: float>"
IMAGE = ["uri: string not null", "key: string not null", "etag: string not null", "bytes: int64 not null"]
COLUMNS = {
    "LISTING": (LISTING, IMAGE),
    "MASKS": (
        MASKS,
        [
            *IMAGE,
            "width: int32",
            "height: int32",
            "status: string not null",
            "error: string",
            "mask_classes: list<item: int32>",
            "mask_lengths: list<item: int32>",
            "mask_png: binary",
            "confidence: float",
            f"class_stats: list<item: {STATISTIC}>",
            "run_id: string not null",
            "labelled_at: timestamp[us, tz=UTC] not null",
        ],
    ),
    "CLASSES": (
        CLASSES,
        ["class_id: int32 not null", "name: string not null"] + [f"{band}: uint8 not null" for band in "rgb"],
    ),
    "CLASS_STATS": (
        CLASS_STATS,
        [
            "class_id: int32 not null",
            "name: string not null",
            "images: int64 not null",
            "pixels: int64 not null",
            "fraction: double not null",
            "confidence: float",
            "run_id: string not null",
        ],
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_every_column(name: str) -> None:
    schema, columns = COLUMNS[name]
    assert [str(field) for field in schema] == [f"pyarrow.Field<{column}>" for column in columns]


def test_the_cores_statistics_are_the_columns() -> None:
    found = class_statistics(np.array([1]), np.array([4]), np.ones((2, 2), np.float32))
    columns = {"class_id": found.class_id, **found.columns}
    types = {name: pa.from_numpy_dtype(column.dtype) for name, column in columns.items()}
    assert types == {field.name: field.type for field in CLASS_STATISTIC if field.name != "name"}

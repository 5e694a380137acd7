"""A label table of this project as training data: self-training on confident masks.

Images are read from the ``uri`` of each row, masks from its run lengths (or its PNG). Of an image that was labelled
several times the newest row counts; where that has the status ``error``, the image is left out.
"""

import functools
import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.datasets.dataset import Dataset, LayoutOptions, Mask, Pair, PairError, Sample, by_split
from pipelines.storage import ObjectChanged, Store, StoredObject, open_store
from pipelines.storage.arrow import metadata_of
from pspnet_core.errors import ConfigError, ImageError
from pspnet_core.images import run_lengths
from pspnet_core.images.classes import ClassTable
from pspnet_core.images.decoding import decode_mask

log = logging.getLogger(__name__)
RECENT_FILES = 48
"""Label files whose masks a process keeps: more than a window of the shuffle touches, at the usual chunk of 256."""
THREADS = 16

_LISTED = ["uri", "key", "etag", "bytes", "status", "labelled_at"]
_MASKS = ["height", "width", "mask_classes", "mask_lengths", "mask_png", "class_stats"]


@dataclass(frozen=True, kw_only=True)
class LabelRows:
    """Reads pairs that are rows of a label table: ``image`` is a URI, ``mask`` is ``<label file>/<row>``.

    Attributes:
        confidence: a class whose mean confidence in an image is lower is ignored there.
        ignore: the id that its pixels get.
    """

    confidence: float
    ignore: int

    def fetch(self, store: Store, pair: Pair) -> Sample:
        """As ``Reader.fetch``; an image that changed since it was labelled is a PairError."""
        folder, _, name = pair.image.rpartition("/")
        try:
            image = _folder(folder or "/", store.field).read_if(name, pair.version.split()[0])
        except ObjectChanged as error:
            raise PairError("data", pair.image, "has changed since it was labelled; label it again") from error
        path, _, row = pair.mask.rpartition("/")
        try:
            return Sample(image, self._mask(_mask_columns(store, path), int(row)))
        except (ImageError, ValueError) as error:
            remedy = f"holds no mask in row {row} ({error}); label the image again"
            raise PairError("data", store.uri_of(path), remedy) from error

    def block(self, pair: Pair) -> str:
        """As ``Reader.block``: the label file."""
        return pair.mask.rpartition("/")[0]

    def _mask(self, rows: pa.Table, row: int) -> Mask:
        png = rows["mask_png"][row]
        if rows["mask_classes"][row].is_valid:
            classes, lengths = (rows[name][row].values.to_numpy() for name in ("mask_classes", "mask_lengths"))
        else:
            classes, lengths = run_lengths.encode(decode_mask(png.as_py() or b""))
        least = np.float32(self.confidence)  # as the column is stored, so that 0.9 is not below 0.9
        unsure = [each["class_id"] for each in rows["class_stats"][row].as_py() if each["confidence"] < least]
        kept = np.where(np.isin(classes, unsure), self.ignore, classes)
        height, width = (int(rows[name][row].as_py()) for name in ("height", "width"))
        return cast(Mask, run_lengths.decode(kept, lengths, height, width))


def read_labels(store: Store, options: LayoutOptions) -> Dataset:
    """Layout ``labels``: the output of ``jobs/label.py``, or the folder of one model or day in it.

    The split of an image, ``train`` or ``val``, is a function of its key and of ``options.holdout``.

    Raises:
        ConfigError: there are no label files, or labels of several models.
    """
    files = list(store.list("masks", suffixes={".parquet"})) or list(store.list(suffixes={".parquet"}))
    if not files:
        raise ConfigError("data", store.root, "no label files; expected masks/model=*/dt=*/*.parquet")
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda item: _LabelFile.read(store, item), files))
    _refuse_several(store, found)
    classes, model = found[0].classes, found[0].model
    newest: dict[str, tuple[object, Pair | None]] = {}
    for file in found:
        for number, row in enumerate(file.rows.to_pylist()):
            known = newest.get(row["uri"])
            if known is None or row["labelled_at"] > known[0]:
                pair = Pair(
                    key=row["key"],
                    image=row["uri"],
                    mask=f"{file.path}/{number}",
                    split="val" if _share(row["key"]) < options.holdout else "train",
                    version=f"{row['etag']} {model} {options.confidence}",
                    bytes=row["bytes"],
                )
                newest[row["uri"]] = (row["labelled_at"], pair if row["status"] == "ok" else None)
    if without := sum(pair is None for _, pair in newest.values()):
        log.info("images left out because their newest row is an error: %d of %d", without, len(newest))
    return Dataset(
        store=store,
        classes=classes,
        splits=by_split(pair for _, pair in newest.values() if pair),
        reader=LabelRows(confidence=options.confidence, ignore=classes.ignore),
    )


@dataclass(frozen=True, kw_only=True)
class _LabelFile:
    """What the listing needs of one label file; ``model`` is the fingerprint."""

    path: str
    model: str
    classes: ClassTable
    rows: pa.Table

    @classmethod
    def read(cls, store: Store, item: StoredObject) -> "_LabelFile":
        with store.open(item.key) as stream:
            try:
                file = pq.ParquetFile(stream)
                metadata = metadata_of(file)
                model, classes = str(metadata["fingerprint"]), metadata["classes"]
                rows = file.read(columns=_LISTED)
            except (KeyError, pa.ArrowException) as error:
                raise ConfigError("data", item.uri, f"is no file of a label table ({error}); remove it") from error
        return cls(path=item.key, model=model, classes=ClassTable.from_json(classes), rows=rows)


def _refuse_several(store: Store, files: Sequence[_LabelFile]) -> None:
    by_model = {file.model: store.uri_of(file.path.rpartition("/dt=")[0]) for file in files}
    if len(by_model) > 1:
        remedy = f"holds labels of {len(by_model)} models; give one of {', '.join(sorted(by_model.values()))}"
        raise ConfigError("data", store.root, remedy)


def _share(key: str) -> float:
    """Hash the key to a number from 0 to below 1, evenly spread."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big") / 2**48


@functools.lru_cache(maxsize=RECENT_FILES)
def _mask_columns(store: Store, path: str) -> pa.Table:
    with store.open(path) as stream:
        return pq.ParquetFile(stream).read(columns=_MASKS).combine_chunks()


@functools.lru_cache(maxsize=256)
def _folder(uri: str, field: str) -> Store:
    return open_store(uri, field=field)

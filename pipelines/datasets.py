"""Labelled data sets: a layout turns a folder or prefix into pairs of image and mask.

A layout is one function ``Store -> Dataset`` and one row of ``LAYOUTS``.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from pipelines.storage import ObjectMissing, Store, open_store
from pspnet_core.classes import ClassTable
from pspnet_core.errors import ConfigError, ImageError
from pspnet_core.images import IMAGE_SUFFIXES, decode_image, decode_mask

Mask = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One labelled image: its key, and the paths of image and mask relative to the data set's root."""

    key: str
    image: str
    mask: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Labelled pairs by split, with the classes that their masks name."""

    store: Store
    classes: ClassTable
    splits: Mapping[str, tuple[Pair, ...]]

    def split(self, name: str) -> tuple[Pair, ...]:
        """The pairs of a split; ConfigError when there are none."""
        pairs = self.splits.get(name, ())
        if not pairs:
            known = ", ".join(sorted(self.splits)) or "none"
            raise ConfigError("split", name, f"no labelled images there; splits found: {known}")
        return pairs

    def read(self, pair: Pair) -> tuple[NDArray[np.uint8], Mask]:
        """Decode one pair.

        Returns:
            Image ``(H, W, 3)`` uint8 RGB and mask ``(H, W)`` uint8 or uint16 class ids; where the class table has raw
            ids, those in the file are turned into class ids.

        Raises:
            ConfigError: when a file is missing or unreadable, the sizes differ or an id has no class; names the file.
        """
        mask = self._read_mask(pair)
        image = _decoded(decode_image, self.store, pair.image)
        if image.shape[:2] != mask.shape:
            sizes = f"{mask.shape[1]}x{mask.shape[0]}, its image {image.shape[1]}x{image.shape[0]}"
            raise ConfigError("data", self.store.uri_of(pair.mask), f"the mask is {sizes}; make them the same size")
        return image, mask

    def _read_mask(self, pair: Pair) -> Mask:
        mask: Mask = self.classes.remap(_decoded(decode_mask, self.store, pair.mask))
        stray = mask[(mask >= len(self.classes)) & (mask != self.classes.ignore)]
        if stray.size:
            allowed = f"0..{len(self.classes) - 1} and ignore {self.classes.ignore}"
            raise ConfigError("data", self.store.uri_of(pair.mask), f"holds id {stray[0]}; the classes allow {allowed}")
        return mask


def open_dataset(uri: str, layout: str) -> Dataset:
    """The data set at ``uri``.

    Raises:
        ConfigError: for an unknown layout, a missing folder or bucket, or content that does not fit the layout.
    """
    if layout not in LAYOUTS:
        raise ConfigError("layout", layout, f"choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[layout](open_store(uri, field="data"))


def class_pixels(dataset: Dataset, pairs: Iterable[Pair], *, threads: int = 4) -> NDArray[np.int64]:
    """Pixels of each class ``(C,)`` over all masks; every pair is read and checked, and raises as ``read``."""

    def count(pair: Pair) -> NDArray[np.int64]:
        size = max(len(dataset.classes), dataset.classes.ignore + 1)
        return np.bincount(dataset.read(pair)[1].ravel(), minlength=size)[: len(dataset.classes)]

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(count, pairs), start=np.zeros(len(dataset.classes), dtype=np.int64))


def read_folder(store: Store) -> Dataset:
    """Layout ``folder``.

    ``images/<split>/KEY.{jpg,png}``, ``masks/<split>/KEY.png`` (single channel, class ids) and ``classes.json``.
    """
    classes = _read_classes(store, "classes.json")
    masks = {_key(item.key, "masks"): item.key for item in store.list("masks/", suffixes={".png"})}
    splits: dict[str, list[Pair]] = {}
    for item in store.list("images/", suffixes=IMAGE_SUFFIXES):
        split, key = _key(item.key, "images")
        if (split, key) not in masks:
            raise ConfigError("data", item.uri, f"has no mask; expected masks/{split}/{key}.png")
        splits.setdefault(split, []).append(Pair(key=key, image=item.key, mask=masks[split, key]))
    return Dataset(store=store, classes=classes, splits={name: tuple(pairs) for name, pairs in splits.items()})


LAYOUTS: dict[str, Callable[[Store], Dataset]] = {"folder": read_folder}


def _read_classes(store: Store, path: str) -> ClassTable:
    try:
        content = json.loads(store.read(path))
    except ObjectMissing as error:
        remedy = 'the folder layout needs it: {"names": [...], "colors": [[r,g,b]...], "ignore": 255}'
        raise ConfigError("data", store.uri_of(path), f"not there; {remedy}") from error
    except ValueError as error:
        raise ConfigError("data", store.uri_of(path), f"is not JSON ({error})") from error
    return ClassTable.from_json(content)


def _key(path: str, folder: str) -> tuple[str, str]:
    """Split and key of ``<folder>/<split>/KEY.suffix``; a file beside the split folders has the split ``""``."""
    parts = PurePosixPath(path).relative_to(folder).with_suffix("").parts
    return ("", parts[0]) if len(parts) == 1 else (parts[0], "/".join(parts[1:]))


def _decoded(decode: Callable[[bytes], NDArray[np.generic]], store: Store, path: str):  # type: ignore[no-untyped-def]
    try:
        return decode(store.read(path))
    except ImageError as error:
        raise ConfigError("data", store.uri_of(path), f"cannot be read ({error}); replace or remove it") from error
    except ObjectMissing as error:
        raise ConfigError("data", store.uri_of(path), "is gone; list the data set again") from error

"""Labelled data sets: pairs of an image and its mask by split, wherever their bytes lie.

A layout (``layouts.LAYOUTS``) finds the pairs; a ``Reader`` fetches the bytes of one; ``Dataset`` decodes and checks.

Shapes: ``H W`` pixels of an image and its mask.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.storage import ObjectError, ObjectMissing, Store
from pspnet_core.errors import ConfigError, ImageError
from pspnet_core.images.classes import ClassTable
from pspnet_core.images.classes import Mask as Mask
from pspnet_core.images.decoding import decode_image, decode_mask

SHOWN = 5
"""Files, keys, classes or ids that a message names."""


class PairError(ConfigError):
    """One pair cannot be used: a file is gone, unreadable, of the wrong size, or names ids without a class."""


class Unlabelled(ConfigError):
    """A split has no labels, as the test splits of benchmarks do: packing leaves it out."""


@dataclass(frozen=True, kw_only=True)
class LayoutOptions:
    """Options of the layout ``labels``; the others ignore them."""

    confidence: float = 0.9
    """Layout labels: pixels of a class whose mean confidence in an image is lower are ignored."""
    holdout: float = 0.1
    """Layout labels: share of the images that make the split val."""

    def __post_init__(self) -> None:
        if not 0 <= self.confidence <= 1:
            raise ConfigError("confidence", self.confidence, "give a probability, 0 to 1")
        if not 0 <= self.holdout < 1:
            raise ConfigError("holdout", self.holdout, "give a share, 0 to below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One labelled image.

    Attributes:
        key: its name.
        image, mask: where they lie, as the data set's reader understands it: paths relative to the root, absolute
            URIs, or ``<Parquet file>/<row>``.
        split: the split that it is in.
        version: identifies the content of both by what the listing has (etags, hashes, options).
        bytes: size of both as listed; 0 where it is not known.
    """

    key: str
    image: str
    mask: str
    split: str = ""
    version: str = ""
    bytes: int = 0


class Sample(NamedTuple):
    """A pair's content: the encoded image, and the mask as an encoded PNG or as ids ``(H, W)``."""

    image: bytes
    mask: bytes | Mask


class Decoded(NamedTuple):
    """A pair's pixels, checked.

    Attributes:
        image: ``(H, W, 3)`` uint8 RGB.
        mask: ``(H, W)`` uint8 or uint16 class ids, and the ignore id.
        raw: ``(H, W)`` what the mask's file holds; the mask itself unless the class table has raw ids.
    """

    image: NDArray[np.uint8]
    mask: Mask
    raw: Mask


class Reader(Protocol):
    """Fetches pairs. Safe to share between threads, and cheap to pickle."""

    def fetch(self, store: Store, pair: Pair) -> Sample:
        """Read one pair; PairError or an ObjectError when it cannot be read."""

    def block(self, pair: Pair) -> str:
        """Name the file that holds a pair; neighbours with the same name are cheap to read together."""


class LooseFiles:
    """Image and mask are a file each."""

    def fetch(self, store: Store, pair: Pair) -> Sample:
        """As ``Reader.fetch``."""
        return Sample(store.read(pair.image), store.read(pair.mask))

    def block(self, pair: Pair) -> str:
        """As ``Reader.block``: every pair is its own."""
        return pair.image


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Labelled pairs by split, with the classes that their masks name.

    Attributes:
        store: the root that relative paths start from.
        classes: the class table; with ``ids`` where masks hold raw ids.
        last_id: of a built-in table with raw ids: the largest that a mask may hold beside the ignore id. None for any,
            as those that a table of one's own leaves out are ignored.
        faults: why a split that was found is not among ``splits``; only who asks for it is told.
    """

    store: Store
    classes: ClassTable
    splits: Mapping[str, tuple[Pair, ...]]
    faults: Mapping[str, ConfigError] = field(default_factory=dict)
    reader: Reader = field(default_factory=LooseFiles)
    last_id: int | None = None

    def split(self, name: str) -> tuple[Pair, ...]:
        """Return the pairs of a split; ConfigError when there are none, or it has a fault."""
        if name in self.faults:
            raise self.faults[name]
        pairs = self.splits.get(name, ())
        if not pairs:
            known = ", ".join(sorted(self.splits)) or "none"
            raise ConfigError("split", name, f"no labelled images there; splits found: {known}")
        return pairs

    def blocks(self, split: str) -> tuple[int, ...]:
        """Return the sizes of the runs of pairs that are cheap to read together: 1 each for loose files.

        Raises:
            ConfigError: as ``split``.
        """
        runs = itertools.groupby(self.split(split), key=self.reader.block)
        return tuple(sum(1 for _ in run) for _, run in runs)

    def fingerprint(self, split: str) -> str:
        """Return 32 hexadecimal digits that identify keys, files and classes of a split as they were listed.

        Two splits with the same one are the same data. Local files count as changed when their time is.

        Raises:
            ConfigError: as ``split``.
        """
        pairs = [(pair.key, pair.version, pair.bytes) for pair in self.split(split)]
        content = json.dumps([self.classes.to_json(), self.last_id, pairs])
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def uri_of(self, path: str) -> str:
        """Return the URI of a pair's image or mask."""
        return path if path.startswith("/") or "://" in path else self.store.uri_of(path)

    def read(self, pair: Pair) -> tuple[NDArray[np.uint8], Mask]:
        """Fetch and decode one pair.

        Returns:
            Image ``(H, W, 3)`` uint8 RGB and mask ``(H, W)`` uint8 or uint16 class ids; where the class table has raw
            ids, those in the file are turned into class ids.

        Raises:
            PairError: when a file is missing or unreadable, the sizes differ or an id has no class; names the file.
        """
        decoded = self.decode(pair, self.fetch(pair))
        return decoded.image, decoded.mask

    def fetch(self, pair: Pair) -> Sample:
        """Read the encoded content of one pair; PairError when it cannot be read."""
        try:
            return self.reader.fetch(self.store, pair)
        except ObjectMissing as error:
            raise PairError("data", error.uri, "is gone; list the data set again") from error
        except ObjectError as error:
            raise PairError("data", error.uri, f"cannot be read ({error}); replace or remove it") from error

    def decode(self, pair: Pair, sample: Sample) -> Decoded:
        """Decode and check what ``fetch`` gave; raises as ``read``."""
        raw = self._decode_mask(pair, sample.mask)
        with self._explained(pair.image):
            image = decode_image(sample.image)
        if image.shape[:2] != raw.shape:
            sizes = f"{raw.shape[1]}x{raw.shape[0]}, its image {image.shape[1]}x{image.shape[0]}"
            raise PairError("data", self.uri_of(pair.mask), f"the mask is {sizes}; make them the same size")
        return Decoded(image, self.classes.remap(raw), raw)

    def holds_labels(self, pair: Pair, mask: bytes | Mask) -> bool:
        """Whether any pixel of a mask, as ``Sample`` has it, has a class; raises as ``read``."""
        return bool((self.classes.remap(self._decode_mask(pair, mask)) != self.classes.ignore).any())

    def _decode_mask(self, pair: Pair, content: bytes | Mask) -> Mask:
        """Decode a mask as its file holds it, and refuse ids that the classes do not have."""
        raw = content
        if isinstance(raw, bytes):
            with self._explained(pair.mask):
                raw = decode_mask(raw)
        last = len(self.classes) - 1 if self.classes.ids is None else self.last_id
        if last is not None:
            self._refuse_above(last, raw, pair)
        return raw

    def _refuse_above(self, last: int, ids: Mask, pair: Pair) -> None:
        stray = ids[(ids > last) & (ids != self.classes.ignore)]
        if stray.size:
            found = np.unique(stray)
            noun, allowed = "id" if found.size == 1 else "ids", f"0..{last} and ignore {self.classes.ignore}"
            raise PairError("data", self.uri_of(pair.mask), f"holds {noun} {first(found)}; the classes allow {allowed}")

    @contextlib.contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        try:
            yield
        except ImageError as error:
            remedy = f"cannot be read ({error}); replace or remove it"
            raise PairError("data", self.uri_of(path), remedy) from error


def first(items: Iterable[object]) -> str:
    """List the first few of some things, and say if there are more."""
    listed = list(map(str, itertools.islice(items, SHOWN + 1)))
    return ", ".join(listed[:SHOWN]) + (", ..." if len(listed) > SHOWN else "")


def by_split(pairs: Iterable[Pair]) -> dict[str, tuple[Pair, ...]]:
    """Group pairs by their ``split``, in the order given."""
    splits: dict[str, list[Pair]] = {}
    for pair in pairs:
        splits.setdefault(pair.split, []).append(pair)
    return {name: tuple(found) for name, found in splits.items()}

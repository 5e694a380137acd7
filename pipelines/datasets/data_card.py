"""The data card: what a labelled data set holds, and what is wrong with it.

Cards of parts of a data set add up with ``+``. ``check`` is the one that training makes before its first step.

Shapes: ``C`` classes.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.dataset import Dataset, Mask, Pair, PairError, Sample
from pspnet_core.threads import map_ahead

log = logging.getLogger(__name__)

SHOWN = 5
"""Keys that a warning names, and rows of a table of sizes in the text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one good pair adds to a card.

    Attributes:
        size: width and height in pixels.
        pixels: ``(C,)`` pixels of each class.
        image_hash: hash of the encoded image.
    """

    split: str
    key: str
    size: tuple[int, int]
    pixels: NDArray[np.int64]
    image_hash: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """A pair that training cannot use, its broken file and the reason."""

    split: str
    key: str
    file: str
    reason: str

    @classmethod
    def of(cls, pair: Pair, error: PairError) -> "Rejected":
        """The row for what ``Dataset.read`` raised."""
        return cls(split=pair.split, key=pair.key, file=str(error.value), reason=error.remedy)


@dataclass(frozen=True, kw_only=True)
class SplitCard:
    """One split.

    Attributes:
        images: good pairs.
        pixels: ``(C,)`` pixels of each class.
        ignored: pixels without a class.
        sizes: images of each width and height.
        rejected: the pairs that cannot be learnt from.
        keys: hash of an encoded image -> the first key that has it.
    """

    images: int
    pixels: NDArray[np.int64]
    ignored: int
    sizes: Counter[tuple[int, int]]
    rejected: tuple[Rejected, ...]
    keys: Mapping[str, str]

    def __add__(self, other: "SplitCard") -> "SplitCard":
        """Both together."""
        return SplitCard(
            images=self.images + other.images,
            pixels=self.pixels + other.pixels,
            ignored=self.ignored + other.ignored,
            sizes=self.sizes + other.sizes,
            rejected=self.rejected + other.rejected,
            keys={**other.keys, **self.keys},
        )

    @property
    def largest(self) -> tuple[int, int]:
        """Width and height of the image with the longest side; (0, 0) without images."""
        return max(self.sizes, key=max, default=(0, 0))


class Tally:
    """Counts the pairs of one split, one after another; ``C`` is ``classes``."""

    def __init__(self, classes: int) -> None:
        self._pixels = np.zeros(classes, np.int64)
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._rejected: list[Rejected] = []
        self._keys: dict[str, str] = {}

    def add(self, found: Measured | Rejected) -> None:
        """Count one pair."""
        if isinstance(found, Rejected):
            self._rejected.append(found)
            return
        self._pixels += found.pixels
        self._sizes[found.size] += 1
        self._keys.setdefault(found.image_hash, found.key)

    def card(self) -> SplitCard:
        """The card of what was counted."""
        area = sum(width * height * count for (width, height), count in self._sizes.items())
        return SplitCard(
            images=sum(self._sizes.values()),
            pixels=self._pixels,
            ignored=area - int(self._pixels.sum()),
            sizes=self._sizes,
            rejected=tuple(self._rejected),
            keys=self._keys,
        )


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """What a data set holds, split by split.

    Attributes:
        classes: names of the ``C`` classes.
        splits: the card of each split.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, SplitCard]

    def __add__(self, other: "DataCard") -> "DataCard":
        """Both together; they are of the same classes."""
        splits = dict(self.splits)
        for name, card in other.splits.items():
            splits[name] = splits[name] + card if name in splits else card
        return DataCard(classes=self.classes, splits=splits)

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        """The pairs that cannot be learnt from, in all splits."""
        return tuple(row for card in self.splits.values() for row in card.rejected)

    def leaks(self) -> tuple["Leak", ...]:
        """The images that two splits share, byte for byte."""
        names = sorted(self.splits)
        return tuple(
            Leak(splits=(one, other), keys=(self.splits[one].keys[digest], self.splits[other].keys[digest]))
            for position, one in enumerate(names)
            for other in names[position + 1 :]
            for digest in sorted(self.splits[one].keys.keys() & self.splits[other].keys.keys())
        )

    def to_json(self) -> dict[str, Any]:
        """The card in plain JSON types."""
        return {
            "classes": list(self.classes),
            "splits": {
                name: {
                    "images": card.images,
                    "rejected": len(card.rejected),
                    "pixels": dict(zip(self.classes, card.pixels.tolist(), strict=True)),
                    "ignored": card.ignored,
                    "sizes": [
                        {"width": width, "height": height, "images": count}
                        for (width, height), count in card.sizes.most_common()
                    ],
                }
                for name, card in self.splits.items()
            },
            "rejected": [
                {"split": row.split, "key": row.key, "file": row.file, "reason": row.reason} for row in self.rejected
            ],
            "leaks": [{"splits": list(leak.splits), "keys": list(leak.keys)} for leak in self.leaks()],
        }

    def to_markdown(self) -> str:
        """The card as a text for people."""
        return "\n".join(_lines(self)) + "\n"


@dataclass(frozen=True, kw_only=True)
class Leak:
    """One image in two splits, and its key in each."""

    splits: tuple[str, str]
    keys: tuple[str, str]

    def __str__(self) -> str:
        return f"{self.splits[0]}/{self.keys[0]} = {self.splits[1]}/{self.keys[1]}"


def content_hash(data: bytes) -> str:
    """32 hexadecimal digits that identify some bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def measure(pair: Pair, sample: Sample, mask: Mask, classes: int) -> Measured:
    """What a pair adds to the card; ``mask`` is what ``Dataset.decode`` made of the sample."""
    counts = np.bincount(mask.ravel(), minlength=classes)[:classes]
    return Measured(
        split=pair.split,
        key=pair.key,
        size=(mask.shape[1], mask.shape[0]),
        pixels=counts.astype(np.int64, copy=False),
        image_hash=content_hash(sample.image),
    )


def check(dataset: Dataset, pairs: Iterable[Pair], *, threads: int = 8) -> DataCard:
    """Read every pair, and make their card.

    Images that two splits share are warned of, where the pairs are of several splits.

    Raises:
        PairError: for the first pair that cannot be learnt from; names the file, what is wrong and the remedy.
    """

    def one(pair: Pair) -> Measured:
        sample = dataset.fetch(pair)
        return measure(pair, sample, dataset.decode(pair, sample)[1], len(dataset.classes))

    with ThreadPoolExecutor(threads) as pool:
        card = card_of(dataset, map_ahead(pool, one, pairs, depth=2 * threads))
    if leaks := card.leaks():
        named = ", ".join(map(str, leaks[:SHOWN])) + (", ..." if len(leaks) > SHOWN else "")
        log.warning("images in two splits: %d (%s); scores on them tell nothing", len(leaks), named)
    return card


def card_of(dataset: Dataset, findings: Iterable[Measured | Rejected]) -> DataCard:
    """The card of what was found, in one pass."""
    tallies: dict[str, Tally] = {}
    for found in findings:
        if found.split not in tallies:
            tallies[found.split] = Tally(len(dataset.classes))
        tallies[found.split].add(found)
    splits = {name: tally.card() for name, tally in tallies.items()}
    return DataCard(classes=dataset.classes.names, splits=splits)


def _lines(card: DataCard) -> Iterator[str]:
    yield "# Data card"
    yield ""
    yield "| split | images | rejected | sizes |"
    yield "|---|---:|---:|---|"
    for name, split in card.splits.items():
        sizes = ", ".join(f"{width}x{height} ({count})" for (width, height), count in split.sizes.most_common(SHOWN))
        yield f"| {name} | {split.images} | {len(split.rejected)} | {sizes}{_more(len(split.sizes))} |"
    yield ""
    yield f"| class | {' | '.join(f'{name}, % of pixels' for name in card.splits)} |"
    yield f"|---|{'---:|' * len(card.splits)}"
    shares = [100 * split.pixels / max(1, split.pixels.sum() + split.ignored) for split in card.splits.values()]
    for number, name in enumerate(card.classes):
        yield f"| {name} | {' | '.join(f'{share[number]:.3f}' for share in shares)} |"
    ignored = [
        100 - share.sum() if split.images else 0.0 for share, split in zip(shares, card.splits.values(), strict=True)
    ]
    yield f"| (ignored) | {' | '.join(f'{max(0.0, share):.3f}' for share in ignored)} |"
    for title, rows in (
        ("Rejected", [f"{row.file}: {row.reason}" for row in card.rejected]),
        ("In two splits", list(map(str, card.leaks()))),
    ):
        if rows:
            yield from ("", f"## {title}", "", *(f"- {row}" for row in rows))


def _more(sizes: int) -> str:
    return f" and {sizes - SHOWN} more" if sizes > SHOWN else ""

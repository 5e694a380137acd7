"""Data cards: count what a labelled data set holds, and list what is wrong with it.

``check`` makes the card that training wants before its first step; packing makes one of the parts that its tasks count.

Shapes: ``C`` classes.
"""

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.dataset import Dataset, Mask, Pair, Sample
from pspnet_core.threads import map_ahead

log = logging.getLogger(__name__)

SHOWN = 5
"""Keys that a warning names, and rows of a table of sizes in the text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """A pair that training cannot use, its broken file and the reason."""

    split: str
    key: str
    file: str
    reason: str


@dataclass(kw_only=True)
class SplitCard:
    """What one split holds, or a part of it; ``+=`` adds another part in place.

    Attributes:
        pixels: ``(C,)`` pixels of each class.
        images: good pairs.
        ignored: pixels without a class.
        sizes: images of each width and height.
        rejected: the pairs that cannot be learnt from.
        keys: hash of an encoded image -> the first key that has it.
    """

    pixels: NDArray[np.int64]
    images: int = 0
    ignored: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    rejected: list[Rejected] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)

    @classmethod
    def empty(cls, classes: int) -> "SplitCard":
        """Return the card of no pairs."""
        return cls(pixels=np.zeros(classes, np.int64))

    def __iadd__(self, other: "SplitCard") -> "SplitCard":
        self.pixels = self.pixels + other.pixels
        self.images += other.images
        self.ignored += other.ignored
        self.sizes.update(other.sizes)
        self.rejected += other.rejected
        for digest, key in other.keys.items():
            self.keys.setdefault(digest, key)
        return self

    @property
    def largest(self) -> tuple[int, int]:
        """Width and height of the image with the longest side; (0, 0) without images."""
        return max(self.sizes, key=max, default=(0, 0))


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """What a data set holds, split by split.

    Attributes:
        classes: names of the ``C`` classes.
        splits: the card of each split.
    """

    classes: tuple[str, ...]
    splits: dict[str, SplitCard] = field(default_factory=dict)

    def add(self, split: str, part: SplitCard) -> None:
        """Add a part of a split to the card."""
        if split not in self.splits:
            self.splits[split] = SplitCard.empty(len(self.classes))
        self.splits[split] += part

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        """The pairs that cannot be learnt from, in all splits."""
        return tuple(row for card in self.splits.values() for row in card.rejected)

    def leaks(self) -> tuple["Leak", ...]:
        """Find the images that two splits share, byte for byte."""
        return tuple(
            Leak(splits=(one, other), keys=(card.keys[digest], beside.keys[digest]))
            for (one, card), (other, beside) in itertools.combinations(sorted(self.splits.items()), 2)
            for digest in sorted(card.keys.keys() & beside.keys.keys())
        )

    def warn_of_leaks(self) -> None:
        """Log how many images two splits share, and the first of them."""
        if leaks := self.leaks():
            named = ", ".join(map(str, leaks[:SHOWN])) + (", ..." if len(leaks) > SHOWN else "")
            log.warning("images in two splits: %d (%s); scores on them tell nothing", len(leaks), named)

    def to_json(self) -> dict[str, Any]:
        """Return the card in plain JSON types."""
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
            "rejected": [asdict(row) for row in self.rejected],
            "leaks": [{"splits": list(leak.splits), "keys": list(leak.keys)} for leak in self.leaks()],
        }

    def to_markdown(self) -> str:
        """Return the card as a Markdown text."""
        return "\n".join(_lines(self)) + "\n"


@dataclass(frozen=True, kw_only=True)
class Leak:
    """One image in two splits, and its key in each."""

    splits: tuple[str, str]
    keys: tuple[str, str]

    def __str__(self) -> str:
        return f"{self.splits[0]}/{self.keys[0]} = {self.splits[1]}/{self.keys[1]}"


def content_hash(data: bytes) -> str:
    """Return 32 hexadecimal digits that identify some bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def measure(pair: Pair, sample: Sample, mask: Mask, classes: int) -> SplitCard:
    """Make the card of one good pair; ``mask`` is what ``Dataset.decode`` made of the sample."""
    counts = np.bincount(mask.ravel(), minlength=classes)[:classes]
    return SplitCard(
        pixels=counts.astype(np.int64, copy=False),
        images=1,
        ignored=mask.size - int(counts.sum()),
        sizes=Counter([(mask.shape[1], mask.shape[0])]),
        keys={content_hash(sample.image): pair.key},
    )


def check(dataset: Dataset, pairs: Iterable[Pair], *, threads: int = 8) -> DataCard:
    """Read every pair, make their card, and warn of images that two splits share.

    Raises:
        PairError: for the first pair that cannot be learnt from; names the file, what is wrong and the remedy.
    """

    def one(pair: Pair) -> tuple[str, SplitCard]:
        sample = dataset.fetch(pair)
        return pair.split, measure(pair, sample, dataset.decode(pair, sample)[1], len(dataset.classes))

    card = DataCard(classes=dataset.classes.names)
    with ThreadPoolExecutor(threads) as pool:
        for split, part in map_ahead(pool, one, pairs, depth=2 * threads):
            card.add(split, part)
    card.warn_of_leaks()
    return card


def _lines(card: DataCard) -> Iterator[str]:
    yield from ("# Data card", "", "| split | images | rejected | sizes |", "|---|---:|---:|---|")
    for name, split in card.splits.items():
        sizes = ", ".join(f"{width}x{height} ({count})" for (width, height), count in split.sizes.most_common(SHOWN))
        more = f" and {len(split.sizes) - SHOWN} more" if len(split.sizes) > SHOWN else ""
        yield f"| {name} | {split.images} | {len(split.rejected)} | {sizes}{more} |"
    titles = (f"{name}, % of pixels" for name in card.splits)
    yield from ("", f"| class | {' | '.join(titles)} |", f"|---|{'---:|' * len(card.splits)}")
    pixels = [np.append(split.pixels, split.ignored) for split in card.splits.values()]
    for number, name in enumerate((*card.classes, "(ignored)")):
        shares = (f"{100 * counts[number] / max(1, counts.sum()):.3f}" for counts in pixels)
        yield f"| {name} | {' | '.join(shares)} |"
    for title, rows in (
        ("Rejected", [f"{row.file}: {row.reason}" for row in card.rejected]),
        ("In two splits", list(map(str, card.leaks()))),
    ):
        if rows:
            yield from ("", f"## {title}", "", *(f"- {row}" for row in rows))

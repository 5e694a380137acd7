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

from pipelines.datasets.dataset import SHOWN, Dataset, Mask, Pair, Sample, first
from pspnet_core.images.decoding import open_image
from pspnet_core.threads import map_ahead

log = logging.getLogger(__name__)
UPRIGHT = "make sure that the masks are of the upright pictures"


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
        blank: masks without a pixel of any class.
        turned: images that EXIF turns to a picture of the same size, while nothing turns their masks.
        unnamed: pixels of each raw id that the class table leaves out; they are among the ignored.
        sizes: images of each width and height.
        rejected: the pairs that cannot be learnt from.
        keys: hash of an encoded image -> the first key that has it.
    """

    pixels: NDArray[np.int64]
    images: int = 0
    ignored: int = 0
    blank: int = 0
    turned: int = 0
    unnamed: Counter[int] = field(default_factory=Counter)
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
        self.blank += other.blank
        self.turned += other.turned
        self.unnamed.update(other.unnamed)
        self.sizes.update(other.sizes)
        self.rejected += other.rejected
        for digest, key in other.keys.items():
            self.keys.setdefault(digest, key)
        return self

    @property
    def copies(self) -> int:
        """How many images are others again, byte for byte."""
        return self.images - len(self.keys)

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

    def warn(self) -> None:
        """Log what a mistake looks like: it does not keep the data from being learnt from, or scored on."""
        if leaks := self.leaks():
            log.warning("images in two splits: %d (%s); scores on them tell nothing", len(leaks), first(leaks))
        for name, card in self.splits.items():
            if card.images and (absent := self.absent(name)):
                log.warning("classes without a pixel in split %s: %d (%s)", name, len(absent), first(absent))
            if card.copies:
                log.warning("images of split %s that are copies of others: %d of %d", name, card.copies, card.images)
            if card.blank:
                log.warning("masks of split %s without a labelled pixel: %d of %d", name, card.blank, card.images)
            if card.turned:
                log.warning(
                    "images of split %s that EXIF turns, unlike their masks: %d; %s", name, card.turned, UPRIGHT
                )
            if card.unnamed:
                ids = first(f"{raw} ({pixels} pixels)" for raw, pixels in card.unnamed.most_common())
                log.warning("ids in masks of split %s that the classes leave out, and are ignored: %s", name, ids)

    def absent(self, *splits: str) -> tuple[str, ...]:
        """Name the classes that have no pixel in these splits together."""
        pixels = np.sum([self.splits[name].pixels for name in splits], axis=0)
        return tuple(name for name, count in zip(self.classes, pixels.tolist(), strict=True) if not count)

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
                    "blank": card.blank,
                    "turned": card.turned,
                    "unnamed": {str(raw): count for raw, count in card.unnamed.items()},
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


def measure(dataset: Dataset, pair: Pair, sample: Sample) -> tuple[SplitCard, Mask]:
    """Decode and check a pair; return its card, and its mask of class ids.

    Raises:
        PairError: it cannot be learnt from.
    """
    _, mask, raw = dataset.decode(pair, sample)
    table, classes = dataset.classes, len(dataset.classes)
    # Counting is what takes time: once, by the ids in the file, of which those of the classes follow.
    counts = np.bincount(raw.ravel())
    ids = table.remap(np.arange(counts.size, dtype=np.uint16))
    pixels = np.bincount(ids, weights=counts, minlength=classes)[:classes].astype(np.int64)
    strays = [int(each) for each in np.flatnonzero(counts) if table.leaves_out(int(each))]
    card = SplitCard(
        pixels=pixels,
        images=1,
        ignored=mask.size - int(pixels.sum()),
        blank=int(not pixels.any()),
        turned=int(_is_turned_alone(sample, square=mask.shape[0] == mask.shape[1])),
        # The tables that are built in leave out on purpose what they leave out.
        unnamed=Counter({each: int(counts[each]) for each in strays} if dataset.last_id is None else {}),
        sizes=Counter([(mask.shape[1], mask.shape[0])]),
        keys={content_hash(sample.image): pair.key},
    )
    return card, mask


def _is_turned_alone(sample: Sample, *, square: bool) -> bool:
    """Whether EXIF turns the image and not its mask, and their sizes are the same either way."""
    if not isinstance(sample.mask, bytes) or open_image(sample.mask).told_orientation > 1:
        return False
    return open_image(sample.image).told_orientation in (range(2, 9) if square else range(2, 5))


def check(dataset: Dataset, pairs: Iterable[Pair], *, threads: int = 8) -> DataCard:
    """Read every pair, make their card, and warn of what looks like a mistake.

    Counting takes no read of its own, and memory for a hash of each image.

    Raises:
        PairError: for the first pair that cannot be learnt from; names the file, what is wrong and the remedy.
    """

    def one(pair: Pair) -> tuple[str, SplitCard]:
        return pair.split, measure(dataset, pair, dataset.fetch(pair))[0]

    card = DataCard(classes=dataset.classes.names)
    with ThreadPoolExecutor(threads) as pool:
        for split, part in map_ahead(pool, one, pairs, depth=2 * threads):
            card.add(split, part)
    card.warn()
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

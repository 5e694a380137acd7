"""Any layout into Parquet shards: ``prepare()`` checks every pair, packs the good ones and writes the data card.

The walk: list the input -> ``plan_shards`` deals the pairs to shards, a function of the listing alone -> one task per
shard (``Pack``) reads, checks and writes it, put if absent -> the driver adds up the parts and writes index, class
table and card, the card last. A shard that is there already is not made again: its part is read from its footer.
``plan.json``, written first, keeps a second input out of the same folder.

Tasks are Ray Data's, as in labelling: a large data set is packed by all nodes of a cluster. A task holds one shard.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import ray.data

from pipelines.cluster.ray_data import quiet_ray_data, rows_of
from pipelines.cluster.session import ray_session
from pipelines.datasets.data_card import DataCard, Rejected, SplitCard, content_hash, measure
from pipelines.datasets.dataset import Dataset, Pair, PairError, Unlabelled
from pipelines.datasets.layouts import DataConfig
from pipelines.datasets.shards import (
    CARD_FILE,
    CARD_TEXT,
    CLASSES_FILE,
    INDEX_FILE,
    IndexRow,
    ShardWriter,
    shard_metadata,
    shard_path,
    write_index,
)
from pipelines.process.progress import Progress
from pipelines.process.reading_back import read_back
from pipelines.storage import Store, open_store
from pspnet_core.errors import ConfigError, PspnetError, check
from pspnet_core.images.decoding import open_image
from pspnet_core.images.masks import to_png
from pspnet_core.threads import map_ahead

log = logging.getLogger(__name__)
FORMAT = 2
PLAN_FILE = "plan.json"
THREADS = 8
"""Pairs that a task reads at a time: storage answers late, and the codecs release the GIL."""


class PackingFailed(PspnetError):
    """The data set was not packed; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Check a labelled data set, and pack it into Parquet shards with a data card."""

    dataset: DataConfig
    output: str
    """Where the shards go: a local folder or a URI; training reads it as layout shards."""
    shard: int = 128
    """Size of a shard in MB of encoded images and masks."""

    def __post_init__(self) -> None:
        if not 1 <= self.shard <= 1024:
            raise ConfigError("shard", self.shard, "give a size in MB, 1 to 1024")


def prepare(config: PrepareConfig, execute: Callable[["Pack"], list["Part"]] | None = None) -> dict[str, Any]:
    """Check and pack a data set.

    Args:
        execute: makes every shard and returns the parts in order; by default ``pack_on_ray``.

    Returns:
        ``splits`` (name -> images packed), ``shards`` (how many), ``rejected`` (pairs left out), ``leaks`` (images that
        are in two splits) and ``card`` (URI of the data card).

    Raises:
        ConfigError: a mistake in the config or the layout, an output that holds something else, no split with labels,
            or one of which no pair can be used.
        PackingFailed: the input changed while it was packed.
    """
    found = config.dataset.open()
    dataset = _labelled(found)
    output = open_store(config.output, field="output")
    output.check_writable_atomically()
    claim(output, config, dataset)
    pack = Pack(dataset, output, plan_shards(dataset, config.shard * 10**6))
    parts = (execute or pack_on_ray)(pack)
    card = card_of_parts(dataset, parts)
    _refuse_unusable(dataset, card)
    if listing_of(config.dataset.open()) != listing_of(found):
        raise PackingFailed(f"{dataset.store.root} changed while it was packed; empty {output.root} and start again")
    finish(output, dataset, card, parts)
    card.warn()
    return {
        "splits": {name: split.images for name, split in card.splits.items()},
        "shards": len(pack.shards),
        "rejected": len(card.rejected),
        "leaks": len(card.leaks()),
        "card": output.uri_of(CARD_FILE),
    }


def _labelled(dataset: Dataset) -> Dataset:
    """Leave out the splits without labels, unless there are no others; raise what else is wrong with any split."""
    for fault in dataset.faults.values():
        if not isinstance(fault, Unlabelled):
            raise fault
    blank = {name: _blank(dataset, name) for name, pairs in dataset.splits.items() if not _hold_labels(dataset, pairs)}
    splits = {name: pairs for name, pairs in dataset.splits.items() if name not in blank}
    for name, fault in {**blank, **dataset.faults}.items():
        if not splits:
            raise fault
        log.warning("split %s is left out: %s", name, fault)
    check(bool(splits), "data", dataset.store.root, "holds no labelled images")
    return replace(dataset, splits=splits)


def _hold_labels(dataset: Dataset, pairs: Sequence[Pair]) -> bool:
    """Whether any mask holds a labelled pixel, as far as it can be read: most often the first few tell."""

    def holds(pair: Pair) -> bool:
        try:
            return dataset.holds_labels(pair, dataset.fetch(pair).mask)
        except PairError:  # a row of the card
            return True

    with ThreadPoolExecutor(THREADS) as pool:
        return any(map_ahead(pool, holds, pairs, depth=THREADS))


def _blank(dataset: Dataset, split: str) -> Unlabelled:
    remedy = f"none of the {len(dataset.split(split))} masks of split {split} holds a labelled pixel"
    return Unlabelled("data", dataset.store.root, f"{remedy}; remove it or label it")


def plan_shards(dataset: Dataset, limit: int) -> tuple[tuple[Pair, ...], ...]:
    """Deal the pairs to shards of one split each, in the order of the listing.

    Args:
        limit: bytes of a shard, by the sizes listed, unless one pair has more.
    """
    shards: list[tuple[Pair, ...]] = []
    for name in sorted(dataset.splits):
        current: list[Pair] = []
        size = 0
        for pair in dataset.splits[name]:
            if current and size + pair.bytes > limit:
                shards.append(tuple(current))
                current, size = [], 0
            current.append(pair)
            size += pair.bytes
        shards.append(tuple(current))
    return tuple(shards)


def listing_of(dataset: Dataset) -> str:
    """Identify the data set as it was listed, all splits."""
    parts = [(name, dataset.fingerprint(name)) for name in sorted(dataset.splits)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the shards of an output are made of: ``plan.json``. Data and layout are for people; the listing counts."""

    format: int = FORMAT
    shard: int
    listing: str
    data: str
    layout: str

    def difference(self, there: "Plan") -> str:
        """Say what keeps shards of this plan out of a folder that has another one; empty where nothing does."""
        if there.format != self.format:
            return f"holds shards that another version wrote (format {there.format}, now {self.format})"
        if there.listing != self.listing:
            return f"holds shards of {there.data} (layout {there.layout}) as it was listed then"
        return f"holds shards of {there.shard} MB, not {self.shard}" if there.shard != self.shard else ""


def claim(output: Store, config: PrepareConfig, dataset: Dataset) -> None:
    """Write the plan of the output, unless there is one already.

    Raises:
        ConfigError: the output is of another input, or of other settings.
    """
    plan = Plan(shard=config.shard, listing=listing_of(dataset), data=dataset.store.root, layout=config.dataset.layout)
    if output.put_if_absent(PLAN_FILE, json.dumps(asdict(plan), indent=1).encode()):
        return
    try:
        difference = plan.difference(read_back(Plan, output.read(PLAN_FILE)))
    except ValueError as error:
        raise ConfigError("output", output.uri_of(PLAN_FILE), f"is no plan ({error}); give an empty folder") from error
    if difference:
        raise ConfigError("output", output.root, f"{difference}; give an empty folder")


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one shard adds to index and card; kept in the shard's footer."""

    split: str
    card: SplitCard
    entries: tuple[IndexRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the part in plain JSON types."""
        return {
            "split": self.split,
            "entries": [asdict(entry) for entry in self.entries],
            "rejected": [asdict(row) for row in self.card.rejected],
            "pixels": self.card.pixels.tolist(),
            "ignored": self.card.ignored,
            "blank": self.card.blank,
            "turned": self.card.turned,
            "unnamed": list(self.card.unnamed.items()),
            "sizes": [[*size, count] for size, count in self.card.sizes.items()],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Part":
        """Read what ``to_json`` gives."""
        entries = tuple(IndexRow(**entry) for entry in content["entries"])
        card = SplitCard(
            images=len(entries),
            pixels=np.array(content["pixels"], dtype=np.int64),
            ignored=content["ignored"],
            blank=content["blank"],
            turned=content["turned"],
            unnamed=Counter(dict(content["unnamed"])),
            sizes=Counter({(width, height): count for width, height, count in content["sizes"]}),
            rejected=[Rejected(**row) for row in content["rejected"]],
            keys={entry.image_hash: entry.key for entry in reversed(entries)},
        )
        return cls(split=content["split"], card=card, entries=entries)


class Pack:
    """Makes shards; a task of Ray Data, safe to run again.

    Args:
        shards: the pairs of each; all of one split.
    """

    def __init__(self, dataset: Dataset, output: Store, shards: Sequence[Sequence[Pair]]) -> None:
        self.dataset, self.output, self.shards = replace(dataset, splits={}, faults={}), output, shards

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write shard ``row["id"]`` unless it is there; returns its part as JSON."""
        number = int(row["id"])
        path = shard_path(number)
        if not self.output.exists(path):
            self.output.put_if_absent(path, self._shard(number))
        # Another run may have written it: the file in the store counts.
        return {"id": number, "images": len(self.shards[number]), "part": shard_metadata(self.output, path)}

    def _shard(self, number: int) -> bytes:
        pairs = self.shards[number]
        writer, card = ShardWriter(), SplitCard.empty(len(self.dataset.classes))
        entries: list[IndexRow] = []
        with ThreadPoolExecutor(THREADS) as pool:
            for pair, (found, packed) in zip(
                pairs, map_ahead(pool, self._checked, pairs, depth=2 * THREADS), strict=True
            ):
                card += found
                if packed is None:
                    continue
                image, mask = packed
                (image_hash,) = found.keys
                row = IndexRow(
                    key=pair.key,
                    split=pair.split,
                    shard=number,
                    row=len(entries),
                    bytes=len(image) + len(mask),
                    image_hash=image_hash,
                    mask_hash=content_hash(mask),
                )
                entries.append(row)
                writer.add(pair.key, image, mask, pair.split)
        part = Part(split=pairs[0].split, card=card, entries=tuple(entries))
        return writer.finish(json.dumps(part.to_json()))

    def _checked(self, pair: Pair) -> tuple[SplitCard, tuple[bytes, bytes] | None]:
        """Return what a pair adds to the card, and image and mask for the shard unless the pair is rejected."""
        classes = self.dataset.classes
        try:
            sample = self.dataset.fetch(pair)
            card, mask = measure(self.dataset, pair, sample)
        except PairError as error:
            row = Rejected(split=pair.split, key=pair.key, file=str(error.value), reason=error.remedy)
            return replace(SplitCard.empty(len(classes)), rejected=[row]), None
        if not isinstance(sample.mask, bytes):
            return card, (sample.image, to_png(mask, classes.palette()))
        if classes.ids is None:
            return card, (sample.image, sample.mask)
        # A shard holds class ids, so that its readers need no table of raw ones. The mask keeps its orientation: they
        # warn of images that are turned unlike their masks.
        orientation = open_image(sample.mask).orientation
        return card, (sample.image, to_png(mask, classes.palette(), orientation=orientation))


def pack_on_ray(pack: Pack) -> list[Part]:
    """Make every shard by a task of Ray Data, and return their parts in order."""
    quiet_ray_data()
    count = len(pack.shards)
    parts: dict[int, Part] = {}
    with ray_session(), Progress(sum(map(len, pack.shards)), "packing") as progress:
        # A whole CPU each: as many shards are in memory at a time as the cluster has CPUs.
        for row in rows_of(ray.data.range(count, override_num_blocks=count).map(pack, num_cpus=1)):
            parts[row["id"]] = Part.from_json(json.loads(row["part"]))
            progress.advance(row["images"])
    return [parts[number] for number in range(count)]


def card_of_parts(dataset: Dataset, parts: Iterable[Part]) -> DataCard:
    """Add up the cards of all shards."""
    card = DataCard(classes=dataset.classes.names)
    for part in parts:
        card.add(part.split, part.card)
    return card


def _refuse_unusable(dataset: Dataset, card: DataCard) -> None:
    for name, split in card.splits.items():
        if not split.images:
            first = split.rejected[0]
            remedy = f"none of the {len(split.rejected)} pairs of split {name} can be used; {first.file} {first.reason}"
            raise ConfigError("data", dataset.store.root, f"{remedy}; mend them, and give an empty --output")
        remedy = f"none of the {split.images} masks of split {name} that can be used holds a labelled pixel"
        remedy += "; remove it or label it, and give an empty --output"
        check(bool(split.pixels.any()), "data", dataset.store.root, remedy)


def finish(output: Store, dataset: Dataset, card: DataCard, parts: Iterable[Part]) -> None:
    """Write index, class table and card; the card last, as it says that all the rest is there."""
    classes = replace(dataset.classes, ids=None)
    files = {
        INDEX_FILE: write_index(entry for part in parts for entry in part.entries),
        CLASSES_FILE: json.dumps(classes.to_json(), indent=1).encode(),
        CARD_TEXT: card.to_markdown().encode(),
        CARD_FILE: json.dumps(card.to_json(), indent=1).encode(),
    }
    for path, data in files.items():
        output.put_if_absent(path, data)

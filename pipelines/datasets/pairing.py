"""Pairs of images and masks, as a layout finds them among the files of a store: by name, each with its split.

Whatever is wrong with one split (an image without a mask, two files of one name) is told to those who ask for that
split only; what is passed over is counted in the log.
"""

from __future__ import annotations

import logging
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.datasets.dataset import Pair, Unlabelled, first
from pipelines.storage import Store, StoredObject
from pspnet_core.errors import ConfigError

log = logging.getLogger(__name__)

Names = Mapping[str, Sequence[StoredObject]]
"""Files by their name in a folder (``name_of``) in Unicode's form NFC: several where they differ in the rest only."""


@dataclass
class _Split:
    """What a layout finds of one split.

    Attributes:
        pairs: by key in Unicode's form NFC.
        bare: images without a mask, and where it was expected.
        fault: the first other thing that is wrong.
    """

    pairs: dict[str, Pair] = field(default_factory=dict)
    bare: list[tuple[StoredObject, str]] = field(default_factory=list)
    fault: ConfigError | None = None

    def verdict(self, name: str) -> ConfigError | None:
        """Say why the split cannot be used, if so."""
        if self.fault or not self.bare:
            return self.fault
        image, expected = self.bare[0]
        count = f" ({len(self.bare)} images of split {name} have none)" if len(self.bare) > 1 else ""
        kind = ConfigError if self.pairs else Unlabelled
        return kind("data", image.uri, f"has no mask; expected {expected}{count}")


@dataclass
class Pairing:
    """Collects the pairs of a layout, and what is wrong with each split: only who asks for that split is told.

    Attributes:
        masks: those that were found; a warning counts the ones that are of no image.
        others: files of other formats or names, of which a warning tells.
    """

    store: Store
    masks: list[StoredObject] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    _splits: dict[str, _Split] = field(default_factory=dict)
    _used: set[str] = field(default_factory=set)
    _flat: list[StoredObject] = field(default_factory=list)
    _again: list[str] = field(default_factory=list)

    def add(self, split: str, key: str, image: StoredObject, masks: Sequence[StoredObject], expected: str) -> None:
        """Take an image and its mask, which is to be one and was expected at a path."""
        self._used.update(mask.key for mask in masks)
        if not split:
            self._flat.append(image)
            return
        into = self._splits.setdefault(split, _Split())
        if not masks:
            into.bare.append((image, expected))
            return
        if len(masks) > 1:
            self.refuse(split, _twins(image, f"masks {masks[0].key} and {masks[1].key}"))
        pair = _pair(split, key, image, masks[0])
        before = into.pairs.setdefault(nfc(key), pair)
        if before is pair:
            return
        if before.image != pair.image:
            self.refuse(split, _twins(image, f"images {before.image} and {pair.image}"))
        elif before.mask != pair.mask:
            self.refuse(split, _twins(image, f"masks {before.mask} and {pair.mask}"))
        else:
            self._again.append(pair.image)

    def files(self, folder: str, suffixes: Collection[str], *, ending: str = "") -> Iterator[StoredObject]:
        """List the files of some formats below a folder, whose names have an ending, and note the others."""
        for item in self.store.list(folder):
            name, suffix = posixpath.splitext(item.key)
            if suffix.lower() in suffixes and name.endswith(ending):
                yield item
            else:
                self.others.append(item.key)

    def refuse(self, split: str, fault: ConfigError) -> None:
        """Take down what is wrong with a split; the first thing counts."""
        into = self._splits.setdefault(split, _Split())
        into.fault = into.fault or fault

    @property
    def faults(self) -> dict[str, ConfigError]:
        """What is wrong with the splits that cannot be used."""
        return {name: fault for name, split in self._splits.items() if (fault := split.verdict(name))}

    @property
    def pairs(self) -> dict[str, tuple[Pair, ...]]:
        """The pairs of the splits that can be used."""
        return {name: tuple(split.pairs.values()) for name, split in self._splits.items() if not split.verdict(name)}

    def check_found(self, expected: str) -> None:
        """Refuse a data set without a split, and say that these files were expected."""
        if self._splits:
            return
        if self._flat:
            folder = self._flat[0].uri.rpartition("/")[0]
            remedy = f"holds {len(self._flat)} images and no folders of splits; expected {expected}"
            raise ConfigError("data", folder, remedy)
        raise ConfigError("data", self.store.root, f"no labelled images; expected {expected}")

    def warn(self) -> None:
        """Log what is passed over: half-copied data sets and lists that were put together look like that."""
        pairs = {(pair.image, pair.mask) for split in self.pairs.values() for pair in split}
        several, shared = (_repeated(paths) for paths in zip(*pairs, strict=True)) if pairs else ([], [])
        _warn("masks without an image: %d passed over (%s)", {item.key for item in self.masks} - self._used)
        _warn("files of other formats or names: %d passed over (%s)", self.others)
        _warn("images beside the folders of splits: %d passed over (%s)", (item.key for item in self._flat))
        _warn("images that a split names again: %d, taken once (%s)", self._again)
        _warn("images with several masks: %d (%s); each mask makes a pair of its own", several)
        _warn("masks that several images share: %d (%s); make sure that each is drawn for its image", shared)


def _twins(image: StoredObject, files: str) -> ConfigError:
    # In ASCII, as names that differ in their form of Unicode look alike.
    named = files.encode("ascii", "backslashreplace").decode()
    return ConfigError("data", image.uri, f"its name leads to the {named}; rename or remove one")


def _repeated(paths: Iterable[str]) -> list[str]:
    return [path for path, count in Counter(paths).items() if count > 1]


def _warn(text: str, paths: Iterable[str]) -> None:
    if listed := sorted(paths):
        log.warning(text, len(listed), first(listed))


def by_name(files: Iterable[StoredObject], folder: str) -> Names:
    """Index the files of a folder by their names."""
    names: dict[str, list[StoredObject]] = {}
    for item in files:
        names.setdefault(nfc(name_of(item, folder)), []).append(item)
    return names


def name_of(item: StoredObject, folder: str) -> str:
    """Return a listed file's path below a folder, without its suffix."""
    return posixpath.splitext(item.key.removeprefix(f"{folder}/"))[0]


def nfc(text: str) -> str:
    """Return a text in Unicode's form NFC: file systems and tools write the same name in several."""
    return unicodedata.normalize("NFC", text)


def _pair(split: str, key: str, image: StoredObject, mask: StoredObject) -> Pair:
    return Pair(
        key=key,
        image=image.key,
        mask=mask.key,
        split=split,
        version=f"{image.etag} {mask.etag}",
        bytes=image.bytes + mask.bytes,
    )

"""Layouts of labelled data in a folder or bucket: one function each, and the table ``LAYOUTS``.

A layout lists a store once and pairs images with masks. Reading, decoding and checking are shared
(``dataset.Dataset``); layouts whose pairs are rows of Parquet files have files of their own (``shards``, ``labels``).
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pipelines.datasets.dataset import Dataset, LayoutOptions, Pair, by_split
from pipelines.datasets.labels import read_labels
from pipelines.datasets.shards import read_shards
from pipelines.storage import ObjectMissing, Store, StoredObject, open_store
from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import ClassTable, class_table
from pspnet_core.images.decoding import IMAGE_SUFFIXES

log = logging.getLogger(__name__)
CLASSES_FILE = "classes.json"
SHOWN = 5
"""Files that a warning names."""

_MASK_SUFFIXES = frozenset({".png"})
_IMAGE_ID = "_leftImg8bit"

Files = dict[str, StoredObject]


def read_folder(store: Store, options: LayoutOptions) -> Dataset:
    """Layout ``folder``.

    ``images/<split>/KEY.{jpg,png}``, ``masks/<split>/KEY.png`` (single channel, class ids) and ``classes.json``.
    """
    classes = read_classes(store)
    return _dataset(store, *_mirrored(store, [("images", "masks", None)]), classes)


def read_ade20k(store: Store, options: LayoutOptions) -> Dataset:
    """Layout ``ade20k``: the folder ``ADEChallengeData2016`` of the MIT Scene Parsing Benchmark.

    ``images/{training,validation}/KEY.jpg`` and ``annotations/{training,validation}/KEY.png``, in which 0 is "other"
    and ignored, and 1 to 150 are the classes 0 to 149.
    """
    folders = [
        ("images/training", "annotations/training", "train"),
        ("images/validation", "annotations/validation", "val"),
    ]
    expected = "images/training/*.jpg, as in the folder ADEChallengeData2016"
    return _dataset(store, *_mirrored(store, folders), "ade20k-raw", expected)


def read_cityscapes(store: Store, options: LayoutOptions) -> Dataset:
    """Layout ``cityscapes``: ``leftImg8bit/<split>/<city>/*_leftImg8bit.png`` and the masks beside it in ``gtFine``.

    Masks are ``*_gtFine_labelIds.png``, whose ids become train ids, or ``*_gtFine_labelTrainIds.png`` where only
    these are there. A split without any mask (``test``, as it is distributed) is left out.
    """
    masks = _files(store, "gtFine", _MASK_SUFFIXES)
    raw = any(path.endswith("_gtFine_labelIds.png") for path in masks)
    suffix = f"_gtFine_label{'' if raw else 'Train'}Ids.png"
    masks = {path: item for path, item in masks.items() if path.endswith(suffix)}
    labelled = {path.split("/")[1] for path in masks}
    pairs = []
    for path, image in _files(store, "leftImg8bit", _MASK_SUFFIXES).items():
        split, key = _split_and_key(path, "leftImg8bit")
        if split in labelled and key.endswith(_IMAGE_ID):
            wanted = f"gtFine/{split}/{key.removesuffix(_IMAGE_ID)}{suffix}"
            pairs.append(_pair(split, key.removesuffix(_IMAGE_ID), image, masks.get(wanted), wanted))
    expected = f"leftImg8bit/train/<city>/*{_IMAGE_ID}.png and gtFine/train/<city>/*{suffix}"
    return _dataset(store, pairs, masks, "cityscapes-raw" if raw else "cityscapes", expected)


def read_voc2012(store: Store, options: LayoutOptions) -> Dataset:
    """Layout ``voc2012``: the folder ``VOCdevkit/VOC2012``, with the SBD annotations where they are there.

    ``JPEGImages/KEY.jpg``, ``SegmentationClass/KEY.png``, ``ImageSets/Segmentation/{train,val}.txt``. With
    ``SegmentationClassAug/KEY.png`` the split ``train`` is what ``trainaug.txt`` names, or all masks of that folder
    where there is no such list, in both cases without the images of ``val``.
    """
    images = {_stem(path): item for path, item in _files(store, "JPEGImages", IMAGE_SUFFIXES).items()}
    fine, more = (_files(store, name, _MASK_SUFFIXES) for name in ("SegmentationClass", "SegmentationClassAug"))
    lists = {
        _stem(path): [_stem(fields[0]) for _, fields in _lines(store, path)]
        for path in _files(store, "ImageSets/Segmentation", {".txt"})
    }
    if "train" not in lists or "val" not in lists:
        remedy = "expected ImageSets/Segmentation/train.txt and val.txt, as in the folder VOCdevkit/VOC2012"
        raise ConfigError("data", store.root, remedy)
    names = {"train": lists["train"], "val": lists["val"]}
    if more:
        wider, held_out = lists.get("trainaug") or [_stem(path) for path in more], set(lists["val"])
        names["train"] = [name for name in wider if name not in held_out]
    pairs = []
    for split, name in [(split, name) for split, listed in names.items() for name in listed]:
        if name not in images:
            where = store.uri_of(f"ImageSets/Segmentation/{split}.txt")
            raise _missing(store, where, f"JPEGImages/{name}.jpg", "image")
        own, wide = fine.get(f"SegmentationClass/{name}.png"), more.get(f"SegmentationClassAug/{name}.png")
        mask = (wide or own) if split == "train" else (own or wide)
        pairs.append(_pair(split, name, images[name], mask, f"SegmentationClass/{name}.png"))
    strays = [path for path in (*fine, *more) if _stem(path) not in images]
    return _dataset(store, pairs, strays, "voc2012", "names of images in ImageSets/Segmentation/train.txt and val.txt")


def read_camvid(store: Store, options: LayoutOptions) -> Dataset:
    """Layout ``camvid``: ``{train,val,test}/KEY.png`` and ``{train,val,test}annot/KEY.png`` of the SegNet release.

    The masks hold the 11 class ids, and 11 for pixels without a label.
    """
    folders = [(split, f"{split}annot", split) for split in ("train", "val", "test")]
    expected = "train/*.png and trainannot/*.png, as in the SegNet release of CamVid"
    return _dataset(store, *_mirrored(store, folders), "camvid", expected)


def read_list(store: Store, options: LayoutOptions) -> Dataset:
    """Layout ``list``: ``<split>.txt`` with the paths of an image and its mask in each line, and ``classes.json``.

    Paths are relative to the root and hold no blanks, as in the lists of hszhao/semseg. Empty lines are passed over.
    """
    classes = read_classes(store)
    files = {item.key: item for item in store.list()}
    pairs = []
    for name in sorted(path for path in files if "/" not in path and path.endswith(".txt")):
        for number, fields in _lines(store, name):
            line = f"{store.uri_of(name)} line {number}"
            if len(fields) != 2:
                raise ConfigError("data", line, "expected the path of an image, a blank and the path of its mask")
            for path, what in zip(fields, ("image", "mask"), strict=True):
                if path.lstrip("/") not in files:
                    raise _missing(store, line, path, what)
            image, mask = (files[path.lstrip("/")] for path in fields)
            key = str(PurePosixPath(image.key).with_suffix(""))
            pairs.append(_pair(name.removesuffix(".txt"), key, image, mask, mask.key))
    expected = "train.txt and val.txt with the paths of an image and its mask in each line"
    return _dataset(store, pairs, (), classes, expected)


LAYOUTS: dict[str, Callable[[Store, LayoutOptions], Dataset]] = {
    "folder": read_folder,
    "ade20k": read_ade20k,
    "cityscapes": read_cityscapes,
    "voc2012": read_voc2012,
    "camvid": read_camvid,
    "list": read_list,
    "labels": read_labels,
    "shards": read_shards,
}


def open_dataset(uri: str, layout: str, options: LayoutOptions | None = None) -> Dataset:
    """Open the data set at ``uri``.

    Raises:
        ConfigError: for an unknown layout, a missing folder or bucket, or content that does not fit the layout.
    """
    if layout not in LAYOUTS:
        raise ConfigError("layout", layout, f"choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[layout](open_store(uri, field="data"), options or LayoutOptions())


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Labelled images, and how they lie there."""

    data: str
    """Labelled images: a local folder or a URI (s3://...)."""
    layout: str = "folder"
    """How the data is laid out; a row of LAYOUTS."""
    labels: LayoutOptions = field(default_factory=LayoutOptions)

    def open(self) -> Dataset:
        """Open the data set. Raises as ``open_dataset``."""
        return open_dataset(self.data, self.layout, self.labels)


def read_classes(store: Store) -> ClassTable:
    """Read the class table in ``classes.json``; ConfigError when it is not there or no class table."""
    uri = store.uri_of(CLASSES_FILE)
    try:
        data = store.read(CLASSES_FILE)
    except ObjectMissing as error:
        remedy = 'this layout needs it: {"names": [...], "colors": [[r,g,b]...], "ignore": 255}'
        raise ConfigError("data", uri, f"not there; {remedy}") from error
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ConfigError("data", uri, f"is not JSON ({error})") from error
    return ClassTable.from_json(content)


def _dataset(
    store: Store, pairs: Sequence[Pair], masks: Iterable[str], classes: ClassTable | str, expected: str = ""
) -> Dataset:
    """Put a data set together, and warn of ``masks`` that no pair has: a half-copied data set looks like that.

    Args:
        classes: the class table, or the name of a built-in one where there is no ``classes.json``.
        expected: refuse a data set without pairs, and say that these files were expected.
    """
    if expected and not pairs:
        raise ConfigError("data", store.root, f"no labelled images; expected {expected}")
    if strays := sorted(set(masks) - {pair.mask for pair in pairs}):
        named = ", ".join(strays[:SHOWN]) + (", ..." if len(strays) > SHOWN else "")
        log.warning("masks without an image: %d passed over (%s)", len(strays), named)
    last_id = None
    if isinstance(classes, str):
        built_in = not store.exists(CLASSES_FILE)
        classes = class_table(classes) if built_in else read_classes(store)
        last_id = max(classes.ids) if built_in and classes.ids else None
    return Dataset(store=store, classes=classes, splits=by_split(pairs), last_id=last_id)


def _mirrored(store: Store, folders: Iterable[tuple[str, str, str | None]]) -> tuple[list[Pair], Files]:
    """Pair the images below some folders with masks of the same paths below others.

    Args:
        folders: of images, of their masks, and the split; None where it is the first folder of each path.

    Returns:
        The pairs, and all masks by their path.
    """
    pairs: list[Pair] = []
    files: Files = {}
    for images, masks, split in folders:
        found = _files(store, masks, _MASK_SUFFIXES)
        by_name = {_below(path, masks): mask for path, mask in found.items()}
        for path, image in _files(store, images, IMAGE_SUFFIXES).items():
            name = _below(path, images)
            own, key = (split, name) if split else _split_and_key(path, images)
            pairs.append(_pair(own, key, image, by_name.get(name), f"{masks}/{name}.png"))
        files |= found
    return pairs, files


def _files(store: Store, folder: str, suffixes: Iterable[str]) -> Files:
    """List the files below a folder by their path."""
    return {item.key: item for item in store.list(folder, suffixes=frozenset(suffixes))}


def _below(path: str, folder: str) -> str:
    """Return a file's path below a folder, without its suffix."""
    return str(PurePosixPath(path).relative_to(folder).with_suffix(""))


def _split_and_key(path: str, folder: str) -> tuple[str, str]:
    """Return split and key of ``<folder>/<split>/KEY.suffix``; a file beside the split folders has the split ``""``."""
    *split, key = _below(path, folder).split("/", 1)
    return "".join(split), key


def _stem(path: str) -> str:
    return PurePosixPath(path).stem


def _pair(split: str, key: str, image: StoredObject, mask: StoredObject | None, expected: str) -> Pair:
    """Pair two files; ConfigError when there is no mask, naming where it was expected."""
    if mask is None:
        raise ConfigError("data", image.uri, f"has no mask; expected {expected}")
    return Pair(
        key=key,
        image=image.key,
        mask=mask.key,
        split=split,
        version=f"{image.etag} {mask.etag}",
        bytes=image.bytes + mask.bytes,
    )


def _lines(store: Store, path: str) -> Iterator[tuple[int, list[str]]]:
    """Read number, counted from 1, and blank-separated fields of each line of a text file that is not empty."""
    try:
        text = store.read(path).decode()
    except UnicodeDecodeError as error:
        raise ConfigError("data", store.uri_of(path), f"is no UTF-8 text ({error.reason})") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if fields := line.split():
            yield number, fields


def _missing(store: Store, where: str, path: str, what: str) -> ConfigError:
    return ConfigError("data", where, f"names {path}, but there is no such {what} below {store.root}")

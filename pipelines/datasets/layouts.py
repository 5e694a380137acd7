"""How labelled data lies in a folder or bucket: one function per layout, and the table ``LAYOUTS``.

A layout lists a store once and pairs images with masks. Reading, decoding and checking are shared
(``dataset.Dataset``); layouts whose pairs are rows of Parquet files have files of their own (``shards``, ``labels``).
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
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
_ADE20K_SPLITS = {"training": "train", "validation": "val"}
_IMAGE_ID = "_leftImg8bit"

Files = Mapping[str, StoredObject]


def read_folder(store: Store, options: LayoutOptions) -> Dataset:
    """Layout ``folder``.

    ``images/<split>/KEY.{jpg,png}``, ``masks/<split>/KEY.png`` (single channel, class ids) and ``classes.json``.
    """
    classes = read_classes(store)
    masks = {_split_and_key(path, "masks"): item for path, item in _files(store, "masks", _MASK_SUFFIXES).items()}
    pairs = []
    for path, image in _files(store, "images", IMAGE_SUFFIXES).items():
        split, key = _split_and_key(path, "images")
        mask = masks.get((split, key))
        pairs.append(_pair(store, split, key, image, mask, str(PurePosixPath("masks", split, f"{key}.png"))))
    _tell_strays((mask.key for mask in masks.values()), pairs)
    return Dataset(store=store, classes=classes, splits=by_split(pairs))


def read_ade20k(store: Store, options: LayoutOptions) -> Dataset:
    """Layout ``ade20k``: the folder ``ADEChallengeData2016`` of the MIT Scene Parsing Benchmark.

    ``images/{training,validation}/KEY.jpg`` and ``annotations/{training,validation}/KEY.png``, in which 0 is "other"
    and ignored, and 1 to 150 are the classes 0 to 149.
    """
    masks = _files(store, "annotations", _MASK_SUFFIXES)
    pairs = []
    for path, image in _files(store, "images", IMAGE_SUFFIXES).items():
        folder, key = _split_and_key(path, "images")
        if folder in _ADE20K_SPLITS:
            wanted = f"annotations/{folder}/{key}.png"
            pairs.append(_pair(store, _ADE20K_SPLITS[folder], key, image, masks.get(wanted), wanted))
    _refuse_empty(store, pairs, "images/training/*.jpg, as in the folder ADEChallengeData2016")
    _tell_strays((path for path in masks if _split_and_key(path, "annotations")[0] in _ADE20K_SPLITS), pairs)
    classes, last_id = _classes_or(store, "ade20k-raw")
    return Dataset(store=store, classes=classes, splits=by_split(pairs), last_id=last_id)


def read_cityscapes(store: Store, options: LayoutOptions) -> Dataset:
    """Layout ``cityscapes``: ``leftImg8bit/<split>/<city>/*_leftImg8bit.png`` and the masks beside it in ``gtFine``.

    Masks are ``*_gtFine_labelIds.png``, whose ids become train ids, or ``*_gtFine_labelTrainIds.png`` where only
    these are there. A split without any mask (``test``, as it is distributed) is left out.
    """
    masks = _files(store, "gtFine", _MASK_SUFFIXES)
    raw = any(path.endswith("_gtFine_labelIds.png") for path in masks)
    suffix = f"_gtFine_label{'' if raw else 'Train'}Ids.png"
    labelled = {path.split("/")[1] for path in masks if path.endswith(suffix)}
    pairs = []
    for path, image in _files(store, "leftImg8bit", _MASK_SUFFIXES).items():
        split, key = _split_and_key(path, "leftImg8bit")
        if split in labelled and key.endswith(_IMAGE_ID):
            wanted = f"gtFine/{split}/{key.removesuffix(_IMAGE_ID)}{suffix}"
            pairs.append(_pair(store, split, key.removesuffix(_IMAGE_ID), image, masks.get(wanted), wanted))
    _refuse_empty(store, pairs, f"leftImg8bit/train/<city>/*{_IMAGE_ID}.png and gtFine/train/<city>/*{suffix}")
    _tell_strays((path for path in masks if path.endswith(suffix)), pairs)
    classes, last_id = _classes_or(store, "cityscapes-raw" if raw else "cityscapes")
    return Dataset(store=store, classes=classes, splits=by_split(pairs), last_id=last_id)


def read_voc2012(store: Store, options: LayoutOptions) -> Dataset:
    """Layout ``voc2012``: the folder ``VOCdevkit/VOC2012``, with the SBD annotations where they are there.

    ``JPEGImages/KEY.jpg``, ``SegmentationClass/KEY.png``, ``ImageSets/Segmentation/{train,val}.txt``. With
    ``SegmentationClassAug/KEY.png`` the split ``train`` is what ``trainaug.txt`` names, or all masks of that folder
    where there is no such list, in both cases without the images of ``val``.
    """
    images = _files(store, "JPEGImages", IMAGE_SUFFIXES)
    fine, more = (_files(store, name, _MASK_SUFFIXES) for name in ("SegmentationClass", "SegmentationClassAug"))
    lists = {
        PurePosixPath(path).stem: [PurePosixPath(fields[0]).stem for _, fields in _lines(store, path)]
        for path in _files(store, "ImageSets/Segmentation", {".txt"})
    }
    if "train" not in lists or "val" not in lists:
        remedy = "expected ImageSets/Segmentation/train.txt and val.txt, as in the folder VOCdevkit/VOC2012"
        raise ConfigError("data", store.root, remedy)
    names = {"train": lists["train"], "val": lists["val"]}
    if more:
        held_out = set(lists["val"])
        wider = lists.get("trainaug") or [PurePosixPath(path).stem for path in more]
        names["train"] = [name for name in wider if name not in held_out]
    by_name = {PurePosixPath(path).stem: item for path, item in images.items()}
    pairs = []
    for split, name in [(split, name) for split, listed in names.items() for name in listed]:
        if name not in by_name:
            raise _missing(
                store, store.uri_of(f"ImageSets/Segmentation/{split}.txt"), f"JPEGImages/{name}.jpg", "image"
            )
        own, wide = fine.get(f"SegmentationClass/{name}.png"), more.get(f"SegmentationClassAug/{name}.png")
        mask = (wide or own) if split == "train" else (own or wide)
        pairs.append(_pair(store, split, name, by_name[name], mask, f"SegmentationClass/{name}.png"))
    _refuse_empty(store, pairs, "names of images in ImageSets/Segmentation/train.txt and val.txt")
    _tell_strays((path for path in (*fine, *more) if PurePosixPath(path).stem not in by_name), pairs)
    return Dataset(store=store, classes=_classes_or(store, "voc2012")[0], splits=by_split(pairs))


def read_camvid(store: Store, options: LayoutOptions) -> Dataset:
    """Layout ``camvid``: ``{train,val,test}/KEY.png`` and ``{train,val,test}annot/KEY.png`` of the SegNet release.

    The masks hold the 11 class ids, and 11 for pixels without a label.
    """
    pairs: list[Pair] = []
    masks: dict[str, StoredObject] = {}
    for split in ("train", "val", "test"):
        masks |= _files(store, f"{split}annot", _MASK_SUFFIXES)
        for path, image in _files(store, split, IMAGE_SUFFIXES).items():
            key = str(PurePosixPath(path).relative_to(split).with_suffix(""))
            wanted = f"{split}annot/{key}.png"
            pairs.append(_pair(store, split, key, image, masks.get(wanted), wanted))
    _refuse_empty(store, pairs, "train/*.png and trainannot/*.png, as in the SegNet release of CamVid")
    _tell_strays(masks, pairs)
    return Dataset(store=store, classes=_classes_or(store, "camvid")[0], splits=by_split(pairs))


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
            image, mask = (files.get(path.lstrip("/")) for path in fields)
            if image is None:
                raise _missing(store, line, fields[0], "image")
            if mask is None:
                raise _missing(store, line, fields[1], "mask")
            key = str(PurePosixPath(image.key).with_suffix(""))
            pairs.append(_pair(store, name.removesuffix(".txt"), key, image, mask, mask.key))
    _refuse_empty(store, pairs, "train.txt and val.txt with the paths of an image and its mask in each line")
    return Dataset(store=store, classes=classes, splits=by_split(pairs))


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
    """The data set at ``uri``.

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
        """The data set. Raises as ``open_dataset``."""
        return open_dataset(self.data, self.layout, self.labels)


def read_classes(store: Store) -> ClassTable:
    """The class table in ``classes.json``; ConfigError when it is not there or no class table."""
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


def _classes_or(store: Store, name: str) -> tuple[ClassTable, int | None]:
    """The class table in ``classes.json`` where there is one, else a built-in one with its largest raw id, if any."""
    if store.exists(CLASSES_FILE):
        return read_classes(store), None
    table = class_table(name)
    return table, max(table.ids) if table.ids else None


def _files(store: Store, folder: str, suffixes: Iterable[str]) -> dict[str, StoredObject]:
    """The files below a folder by their path."""
    return {item.key: item for item in store.list(folder, suffixes=frozenset(suffixes))}


def _split_and_key(path: str, folder: str) -> tuple[str, str]:
    """Split and key of ``<folder>/<split>/KEY.suffix``; a file beside the split folders has the split ``""``."""
    parts = PurePosixPath(path).relative_to(folder).with_suffix("").parts
    return ("", parts[0]) if len(parts) == 1 else (parts[0], "/".join(parts[1:]))


def _pair(store: Store, split: str, key: str, image: StoredObject, mask: StoredObject | None, expected: str) -> Pair:
    """A pair of files; ConfigError when there is no mask, naming where it was expected."""
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


def _tell_strays(masks: Iterable[str], pairs: Iterable[Pair]) -> None:
    """Masks that no image goes with are passed over, but not in silence: a half-copied data set looks like that."""
    strays = sorted(set(masks) - {pair.mask for pair in pairs})
    if strays:
        named = ", ".join(strays[:SHOWN]) + (", ..." if len(strays) > SHOWN else "")
        log.warning("masks without an image: %d passed over (%s)", len(strays), named)


def _lines(store: Store, path: str) -> Iterator[tuple[int, list[str]]]:
    """Number, counted from 1, and blank-separated fields of each line of a text file that is not empty."""
    try:
        text = store.read(path).decode()
    except UnicodeDecodeError as error:
        raise ConfigError("data", store.uri_of(path), f"is no UTF-8 text ({error.reason})") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if fields := line.split():
            yield number, fields


def _missing(store: Store, where: str, path: str, what: str) -> ConfigError:
    return ConfigError("data", where, f"names {path}, but there is no such {what} below {store.root}")


def _refuse_empty(store: Store, pairs: Iterable[Pair], expected: str) -> None:
    if not any(True for _ in pairs):
        raise ConfigError("data", store.root, f"no labelled images; expected {expected}")

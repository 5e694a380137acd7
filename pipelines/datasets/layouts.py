"""Layouts of labelled data in a folder or bucket: one function each, and the table ``LAYOUTS``.

A layout lists a store once and pairs images with masks. Reading, decoding and checking are shared
(``dataset.Dataset``); layouts whose pairs are rows of Parquet files have files of their own (``shards``, ``labels``).
"""

import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from pipelines.datasets.dataset import Dataset, LayoutOptions, PairError, Unlabelled
from pipelines.datasets.labels import read_labels
from pipelines.datasets.pairing import Pairing, by_name, name_of, nfc
from pipelines.datasets.shards import read_shards
from pipelines.storage import ObjectError, ObjectMissing, Store, StoredObject, open_store
from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import ClassTable, class_table
from pspnet_core.images.decoding import IMAGE_SUFFIXES

CLASSES_FILE = "classes.json"
PROBED = 3
"""Masks of Cityscapes' split test that are looked into."""

_MASK_SUFFIXES = frozenset({".png"})
_IMAGE_ID = "_leftImg8bit"

Listed = tuple[StoredObject, StoredObject]
"""Image and mask in a line of a list."""


def read_folder(store: Store, options: LayoutOptions) -> Dataset:
    """Layout ``folder``.

    ``images/<split>/KEY.{jpg,png}``, ``masks/<split>/KEY.png`` (single channel, class ids) and ``classes.json``.
    """
    classes = read_classes(store)
    found = _mirrored(store, [("images", "masks", None)])
    return _dataset(found, classes, "images/train/*.jpg, masks/train/*.png, and the same in val")


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
    return _dataset(_mirrored(store, folders), "ade20k-raw", expected)


def read_cityscapes(store: Store, options: LayoutOptions) -> Dataset:
    """Layout ``cityscapes``: ``leftImg8bit/<split>/<city>/*_leftImg8bit.png`` and the masks beside it in ``gtFine``.

    Masks are ``*_gtFine_labelIds.png``, whose ids become train ids, or ``*_gtFine_labelTrainIds.png`` where only
    these are there. The split ``test``, as it is distributed, has dummies for masks, and counts as unlabelled.
    """
    masks = _files(store, "gtFine", _MASK_SUFFIXES)
    raw = any(name_of(item, "gtFine").endswith("_gtFine_labelIds") for item in masks)
    ending = f"_gtFine_label{'' if raw else 'Train'}Ids"
    masks = [item for item in masks if name_of(item, "gtFine").endswith(ending)]
    masks_by_name = by_name(masks, "gtFine")
    found = Pairing(store, masks)
    for image in found.files("leftImg8bit", _MASK_SUFFIXES, ending=_IMAGE_ID):
        name = name_of(image, "leftImg8bit").removesuffix(_IMAGE_ID)
        split, key = _split_and_key(name)
        wanted = name + ending
        found.add(split, key, image, masks_by_name.get(nfc(wanted), ()), f"gtFine/{wanted}.png")
    expected = f"leftImg8bit/train/<city>/*{_IMAGE_ID}.png and gtFine/train/<city>/*{ending}.png"
    return _without_dummies(_dataset(found, "cityscapes-raw" if raw else "cityscapes", expected), "test")


def read_voc2012(store: Store, options: LayoutOptions) -> Dataset:
    """Layout ``voc2012``: the folder ``VOCdevkit/VOC2012``, with the SBD annotations where they are there.

    ``JPEGImages/KEY.jpg``, ``SegmentationClass/KEY.png``, ``ImageSets/Segmentation/{train,val}.txt``. With
    ``SegmentationClassAug/KEY.png`` the split ``train`` is what ``trainaug.txt`` names, or ``train.txt`` and all masks
    of that folder where there is no such list, in both cases without the images of ``val``. Masks of
    ``SegmentationClass``, which are finer, go before those.
    """
    found = Pairing(store)
    images = by_name(found.files("JPEGImages", IMAGE_SUFFIXES), "JPEGImages")
    fine, wide = (
        by_name(found.files(folder, _MASK_SUFFIXES), folder) for folder in ("SegmentationClass", "SegmentationClassAug")
    )
    lists = {
        name: [_voc_name(fields[0]) for _, fields in _lines(store, item.key)]
        for item in _files(store, "ImageSets/Segmentation", {".txt"})
        if (name := name_of(item, "ImageSets/Segmentation")) in ("train", "val", "trainaug")
    }
    if "train" not in lists or "val" not in lists:
        remedy = "expected ImageSets/Segmentation/train.txt and val.txt, as in the folder VOCdevkit/VOC2012"
        raise ConfigError("data", store.root, remedy)
    names = {"train": lists["train"], "val": lists["val"]}
    if wide:
        trained, held_out = set(lists["train"]), set(lists["val"])
        wider = lists.get("trainaug") or [
            *lists["train"],
            *(name for name in wide if name in images and name not in trained),
        ]
        names["train"] = [name for name in wider if name not in held_out]
    found.masks += [item for masks in (fine, wide) for name in masks.keys() - images.keys() for item in masks[name]]
    for split, name in [(split, name) for split, listed in names.items() for name in listed]:
        if name in images:
            for image in images[name]:
                found.add(split, name, image, fine.get(name) or wide.get(name, ()), f"SegmentationClass/{name}.png")
        else:
            where = store.uri_of(f"ImageSets/Segmentation/{split}.txt")
            found.refuse(split, _missing(store, where, f"JPEGImages/{name}.jpg", "image"))
    return _dataset(found, "voc2012", "names of images in ImageSets/Segmentation/train.txt and val.txt")


def read_camvid(store: Store, options: LayoutOptions) -> Dataset:
    """Layout ``camvid``: ``{train,val,test}/KEY.png`` and ``{train,val,test}annot/KEY.png`` of the SegNet release.

    The masks hold the 11 class ids, and 11 for pixels without a label.
    """
    folders = [(split, f"{split}annot", split) for split in ("train", "val", "test")]
    expected = "train/*.png and trainannot/*.png, as in the SegNet release of CamVid"
    return _dataset(_mirrored(store, folders), "camvid", expected)


def read_list(store: Store, options: LayoutOptions) -> Dataset:
    """Layout ``list``: ``<split>.txt`` with the paths of an image and its mask in each line, and ``classes.json``.

    Paths are relative to the root and hold no blanks, as in the lists of hszhao/semseg. Empty lines are passed over.
    The lists say which mask is of which image, so names need not.
    """
    classes = read_classes(store)
    exact = {item.key: item for item in store.list()}
    files = {nfc(path): item for path, item in exact.items()} | exact
    found = Pairing(store)
    for name in sorted(path for path in exact if "/" not in path and path.endswith(".txt")):
        split = name.removesuffix(".txt")
        try:
            listed = list(_listed_pairs(store, files, name))
        except ConfigError as error:
            found.refuse(split, error)
            continue
        keys = _keys(listed)
        for image, mask in listed:
            found.add(split, keys[image, mask], image, [mask], mask.key)
    return _dataset(found, classes, "train.txt and val.txt with the paths of an image and its mask in each line")


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
        content = json.loads(data, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise ConfigError("data", uri, f"is not JSON ({error})") from error
    return ClassTable.from_json(content)


def _each_once(entries: list[tuple[str, object]]) -> dict[str, object]:
    """Make an object of JSON; ValueError for a key that stands twice, of which the later would count."""
    content = dict(entries)
    if len(content) < len(entries):
        twice = Counter(key for key, _ in entries).most_common(1)[0][0]
        raise ValueError(f"{twice} stands twice; leave one of them out")
    return content


def _dataset(found: Pairing, classes: ClassTable | str, expected: str) -> Dataset:
    """Put a data set together.

    Args:
        classes: the class table, or the name of a built-in one where there is no ``classes.json``.
        expected: files to name where nothing is found.
    """
    found.check_found(expected)
    found.warn()
    if isinstance(classes, str):
        classes = read_classes(found.store) if found.store.exists(CLASSES_FILE) else class_table(classes)
    last_id = max(classes.ids) if classes.ids and classes.is_built_in else None
    return Dataset(store=found.store, classes=classes, splits=found.pairs, faults=found.faults, last_id=last_id)


def _without_dummies(dataset: Dataset, name: str) -> Dataset:
    """Count a split as unlabelled if the masks that are looked into, a few of it, have no pixel of any class."""
    pairs = dataset.splits.get(name, ())
    probed = pairs[:: -(-len(pairs) // PROBED)] if pairs else ()
    try:
        if not pairs or any(dataset.holds_labels(pair, dataset.store.read(pair.mask)) for pair in probed):
            return dataset
    except (PairError, ObjectError):  # the check of the data will tell
        return dataset
    remedy = f"its {len(pairs)} masks are dummies without labels, as Cityscapes gives them out; give another split"
    others = {split: kept for split, kept in dataset.splits.items() if split != name}
    return replace(dataset, splits=others, faults={**dataset.faults, name: Unlabelled("split", name, remedy)})


def _mirrored(store: Store, folders: Iterable[tuple[str, str, str | None]]) -> Pairing:
    """Pair the images below some folders with masks of the same paths below others.

    Args:
        folders: of images, of their masks, and the split; None where it is the first folder of each path.
    """
    found = Pairing(store)
    for images, masks, split in folders:
        drawn = list(found.files(masks, _MASK_SUFFIXES))
        found.masks += drawn
        masks_by_name = by_name(drawn, masks)
        for image in found.files(images, IMAGE_SUFFIXES):
            name = name_of(image, images)
            own, key = (split, name) if split else _split_and_key(name)
            found.add(own, key, image, masks_by_name.get(nfc(name), ()), f"{masks}/{name}.png")
    return found


def _files(store: Store, folder: str, suffixes: Iterable[str]) -> list[StoredObject]:
    """List the files below a folder."""
    return list(store.list(folder, suffixes=frozenset(suffixes)))


def _without_suffix(path: str) -> str:
    """Remove the suffix of an image; a name may hold other dots."""
    name, suffix = posixpath.splitext(path)
    return name if suffix.lower() in IMAGE_SUFFIXES else path


def _voc_name(path: str) -> str:
    """Return the name that a line of a list of VOC2012 stands for: it may be the path of the image, too."""
    return nfc(_without_suffix(_plain(path).rpartition("JPEGImages/")[2]))


def _plain(path: str) -> str:
    """Return a listed path as keys are written: relative to the root and without ``./``."""
    return posixpath.normpath(path.lstrip("/"))


def _split_and_key(name: str) -> tuple[str, str]:
    """Return split and key of the name ``<split>/KEY``; a file beside the folders of splits has the split ``""``."""
    split, slash, key = name.partition("/")
    return (split, key) if slash else ("", name)


def _keys(listed: Iterable[Listed]) -> dict[Listed, str]:
    """Give each pair of a list a key: its image's path without the suffix.

    The suffix stays where images differ in that only, and a number follows where an image has several masks.
    """
    pairs = list(dict.fromkeys(listed))
    stems = Counter(nfc(_without_suffix(path)) for path in {image.key for image, _ in pairs})
    seen: Counter[str] = Counter()
    keys = {}
    for image, mask in pairs:
        stem = _without_suffix(image.key)
        key = stem if stems[nfc(stem)] == 1 else image.key
        seen[nfc(key)] += 1
        keys[image, mask] = key if seen[nfc(key)] == 1 else f"{key}#{seen[nfc(key)]}"
    return keys


def _listed_pairs(store: Store, files: Mapping[str, StoredObject], name: str) -> Iterator[Listed]:
    """Read the files of image and mask in each line of a list.

    Raises:
        Unlabelled: the lines name images without masks, or none of them an image, as in a README.
        ConfigError: a line names something else.
    """
    uri = store.uri_of(name)
    text = store.read(name).decode("utf-8-sig", "replace")
    if not any(_without_suffix(path) != path for line in text.splitlines() for path in line.split()[:1]):
        raise Unlabelled("data", uri, "names no image, as UTF-8 text; remove it, or correct its lines")
    lines = list(_lines(store, name))
    if all(len(fields) == 1 for _, fields in lines):
        raise Unlabelled("data", uri, "names images without masks; remove it, or add the path of its mask to each line")
    for number, fields in lines:
        line = f"{uri} line {number}"
        if len(fields) != 2:
            remedy = "expected the path of an image, a blank and the path of its mask; remove it, or correct the line"
            raise ConfigError("data", line, remedy)
        image, mask = (files.get(_plain(path)) or files.get(nfc(_plain(path))) for path in fields)
        if image is None or mask is None:
            path, what = (fields[0], "image") if image is None else (fields[1], "mask")
            raise _missing(store, line, path, what)
        if image.key == mask.key:
            raise ConfigError("data", line, f"names {image.key} as an image and as its own mask; correct one of them")
        yield image, mask


def _lines(store: Store, path: str) -> Iterator[tuple[int, list[str]]]:
    """Read number, counted from 1, and blank-separated fields of each line of a text file that is not empty."""
    try:
        text = store.read(path).decode("utf-8-sig")  # as Windows writes it, with a mark at the start
    except UnicodeDecodeError as error:
        raise ConfigError("data", store.uri_of(path), f"is no UTF-8 text ({error.reason})") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if fields := line.split():
            yield number, fields


def _missing(store: Store, where: str, path: str, what: str) -> ConfigError:
    return ConfigError("data", where, f"names {path}, but there is no such {what} below {store.root}")

"""Data sets that training must not take without a word, each a function that plants one and says what is to follow.

A new poison is one function and one row of ``POISONS``. It is planted among good neighbours, which ``Ground`` lays out.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pipelines.storage import Store
from pspnet_core.images.masks import to_png

SHAPE = (12, 16)
Ids = list[list[int]]
FOLDERS = {"train": "training", "val": "validation"}
"""As ADE20K calls them."""


class Paths(NamedTuple):
    """Where a layout has image and mask of a key, and the raw ids of its first two classes."""

    image: str
    mask: str
    ids: tuple[int, int] = (0, 1)
    listed: str = ""
    """Line of the lists."""
    lists: str = ""
    key: str = "{key}"
    """As it is read."""


PATHS = {
    "folder": Paths("images/{split}/{key}.png", "masks/{split}/{key}.png"),
    "ade20k": Paths("images/{folder}/{key}.png", "annotations/{folder}/{key}.png", (1, 2)),
    "cityscapes": Paths(
        "leftImg8bit/{split}/{key}_leftImg8bit.png", "gtFine/{split}/{key}_gtFine_labelIds.png", (7, 8)
    ),
    "voc2012": Paths(
        "JPEGImages/{key}.png", "SegmentationClass/{key}.png", (0, 1), "{key}", "ImageSets/Segmentation/{split}.txt"
    ),
    "camvid": Paths("{split}/{key}.png", "{split}annot/{key}.png"),
    "list": Paths("in/{key}.png", "out/{key}.png", (0, 1), "in/{key}.png out/{key}.png", "{split}.txt", "in/{key}"),
}


def ids(*values: int) -> Ids:
    """A mask that goes through some ids, row by row."""
    return np.resize(values, SHAPE).tolist()


def png(picture: Image.Image, orientation: int = 1) -> bytes:
    """A file of a picture, with an EXIF orientation."""
    sink = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(sink, "PNG", **({"exif": exif.tobytes()} if orientation != 1 else {}))
    return sink.getvalue()


def photo(name: str) -> bytes:
    """A picture that is like no other."""
    seed = int.from_bytes(name.encode(), "big") % 2**32
    return png(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*SHAPE, 3), np.uint8)))


@dataclass(frozen=True, kw_only=True)
class Told:
    """What is to follow.

    Attributes:
        error: pattern of the line that ends the start of training; empty where it starts.
        packing: pattern of the line that ends packing, or training on what was packed, where that is another one.
        warning: pattern of a line in the log.
        silence: pattern that no line in the log has, neither of training nor of packing.
        masks: ``<split>/<key>`` -> class ids of the pairs that are there besides the neighbours, or in their place.
        flags: of training.
    """

    error: str = ""
    packing: str = ""
    warning: str = ""
    silence: str = ""
    masks: dict[str, Ids] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ground:
    """A data set that is being laid out; its classes are sky and road where they are not those of the layout."""

    store: Store
    layout: str
    classes: dict[str, Any] = field(default_factory=lambda: {"names": ["sky", "road"]})
    lists: dict[str, list[str]] = field(default_factory=dict)
    masks: dict[str, Ids] = field(default_factory=dict)
    """Class ids of the neighbours."""

    @property
    def paths(self) -> Paths:
        """Of the layout."""
        return PATHS[self.layout]

    def neighbours(self) -> None:
        """Three good pairs to learn from, and two to score."""
        first, second = self.paths.ids
        for split, key in (("train", "a"), ("train", "b"), ("train", "c"), ("val", "d"), ("val", "e")):
            self.pair(split, key, mask=to_png(np.array(ids(first, second))))
            self.masks[self.name(split, key)] = ids(0, 1)

    def where(self, path: str, split: str, key: str) -> str:
        """A path of the layout for a key."""
        return path.format(split=split, key=key, folder=FOLDERS.get(split, split))

    def name(self, split: str, key: str) -> str:
        """What a pair is called in ``masks``."""
        return f"{split}/{self.where(self.paths.key, split, key)}"

    def pair(self, split: str, key: str, mask: bytes | Ids, image: bytes | None = None) -> None:
        """Write, or write anew, a pair."""
        self.put(self.where(self.paths.image, split, key), image or photo(f"{split}/{key}"))
        self.put(self.where(self.paths.mask, split, key), mask if isinstance(mask, bytes) else to_png(np.array(mask)))
        lines = self.lists.setdefault(split, [])
        if (line := self.where(self.paths.listed, split, key)) not in lines:
            lines.append(line)

    def put(self, path: str, data: bytes) -> None:
        """Write an object in the place of what is there."""
        self.store.delete(path)
        assert self.store.put_if_absent(path, data)

    def finish(self) -> None:
        """Write class table and lists, unless the poison has."""
        if self.layout in ("folder", "list"):
            self.store.put_if_absent("classes.json", json.dumps(self.classes).encode())
        for split, lines in self.lists.items():
            if self.paths.lists:
                path = self.where(self.paths.lists, split, "")
                self.store.put_if_absent(path, "\n".join(lines).encode())


Plant = Callable[[Ground], Told]


def _everywhere(ground: Ground, mask: Ids, *splits: str) -> None:
    """Give the neighbours of some splits another mask."""
    for name in ground.masks:
        split, key = name.split("/")
        if split in splits:
            ground.pair(split, key, mask)
            ground.masks[name] = mask


# Labels

NO_LABELS = "none of the 3 masks of split train holds a labelled pixel; remove it or label it$"


def zero_and_255(ground: Ground) -> Told:
    _everywhere(ground, ids(0, 255), "train", "val")
    return Told(
        error=r"train=train: all labelled pixels are of the class sky, .* 50% of the pixels have 255, which is ignored"
        r'.*"ids": \{"0": 0, "255": 1\}$'
    )


def zero_and_255_by_their_ids(ground: Ground) -> Told:
    """The remedy of the one before."""
    _everywhere(ground, ids(0, 255), "train", "val")
    ground.classes["ids"] = {"0": 0, "255": 1}
    return Told(masks=dict.fromkeys(ground.masks, ids(0, 1)))


def three_classes_and_255(ground: Ground) -> Told:
    ground.classes["names"] = ["sky", "road", "car"]
    _everywhere(ground, ids(0, 1, 255), "train", "val")
    return Told(error=r"classes=car: no mask of train or val has a pixel of them; 33% .* or give --absent-classes$")


def absent_but_allowed(ground: Ground) -> Told:
    ground.classes["names"] = ["sky", "road", "car"]
    return Told(warning=r"classes without a pixel in split train: 1 \(car\)", flags={"absent_classes": True})


def a_class_for_val_only(ground: Ground) -> Told:
    ground.classes["names"] = ["sky", "road", "car"]
    ground.pair("val", "x", ids(2))
    return Told(warning=r"classes without a pixel in split train: 1 \(car\)", masks={"val/x": ids(2)})


def one_class_in_val(ground: Ground) -> Told:
    _everywhere(ground, ids(1), "val")
    return Told(warning=r"classes without a pixel in split val: 1 \(sky\)")


def val_of_ignored_pixels(ground: Ground) -> Told:
    _everywhere(ground, ids(255), "val")
    return Told(
        error=r"val=val: none of its 2 masks holds a labelled pixel",
        packing="split=val: no labelled images there; splits found: train$",
    )


def train_of_ignored_pixels(ground: Ground) -> Told:
    _everywhere(ground, ids(255), "train")
    return Told(
        error=r"train=train: none of its 3 masks holds a labelled pixel",
        packing="split=train: no labelled images there; splits found: val$",
    )


def a_blank_mask(ground: Ground) -> Told:
    ground.pair("train", "x", ids(255))
    return Told(warning="masks of split train without a labelled pixel: 1 of 4", masks={"train/x": ids(255)})


def copies(ground: Ground) -> Told:
    """One picture with two masks."""
    for key, mask in (("x", ids(0)), ("y", ids(1))):
        ground.pair("train", key, mask, image=photo("x"))
    line = "images of split train that are copies of others: 1 of 5"
    return Told(warning=line, masks={"train/x": ids(0), "train/y": ids(1)})


def a_stray_id(ground: Ground) -> Told:
    ground.pair("train", "x", ids(0, 7))
    return Told(error=r"masks/train/x\.png: holds id 7; the classes allow 0\.\.1 and ignore 255")


def an_id_left_out(ground: Ground) -> Told:
    ground.classes["ids"] = {"0": 0, "1": 1}
    ground.pair("train", "x", ids(0, 7, 255))
    left = r"ids in masks of split train that the classes leave out, and are ignored: 7 \(64 pixels\)$"
    return Told(warning=left, masks={"train/x": ids(0, 255, 255)})


def all_ids_left_out(ground: Ground) -> Told:
    ground.classes["ids"] = {"7": 0, "8": 1}
    error = "train=train: none of its 3 masks holds .*; the masks hold ids that the classes leave out: 0, 1; "
    return Told(error=error, packing=NO_LABELS)


def _by_name(ground: Ground, mask: Ids, meant: Ids) -> None:
    """Give all masks the raw ids of a built-in table, which ``classes.json`` names."""
    ground.classes.clear()
    ground.classes["table"] = "cityscapes-raw"
    _everywhere(ground, mask, "train", "val")
    ground.masks.update(dict.fromkeys(ground.masks, meant))


def a_built_in_table(ground: Ground) -> Told:
    """It leaves out 4 on purpose."""
    _by_name(ground, ids(7, 8, 4), ids(0, 1, 255))
    return Told(silence="classes leave out", flags={"absent_classes": True})


def a_built_in_table_leaves_all_out(ground: Ground) -> Told:
    _by_name(ground, ids(4), ids(255))
    return Told(error="none of its 3 masks holds a labelled pixel$", packing=NO_LABELS)


def an_id_beyond_a_built_in_table(ground: Ground) -> Told:
    _by_name(ground, ids(7, 8), ids(0, 1))
    ground.pair("train", "x", ids(7, 40))
    return Told(error=r"x\.png: holds id 40; the classes allow 0\.\.33 and ignore 255", flags={"absent_classes": True})


def sixteen_bits(ground: Ground) -> Told:
    """As tools write that stretch 8 bits to 16."""
    ground.pair("train", "x", ids(0, 257))
    return Told(error=r"x\.png: holds id 257; the classes allow")


def scored_on_what_is_learnt(ground: Ground) -> Told:
    return Told(warning="val=train: that is what is learnt from", flags={"val": "train"})


# Class tables


def class_table(error: str, text: str) -> Plant:
    """A ``classes.json`` that says something else than what counts."""

    def plant(ground: Ground) -> Told:
        ground.put("classes.json", text.encode())
        return Told(error=error)

    return plant


# Files


def bad_mask(error: str, data: bytes) -> Plant:
    """A file in the place of a mask."""

    def plant(ground: Ground) -> Told:
        ground.pair("train", "x", data)
        return Told(error=rf"masks/train/x\.png: {error}")

    return plant


def bad_image(error: str, data: bytes) -> Plant:
    """A file in the place of an image."""

    def plant(ground: Ground) -> Told:
        ground.pair("train", "x", ids(0))
        ground.put("images/train/x.png", data)
        return Told(error=rf"images/train/x\.png: {error}")

    return plant


def palette_of_four_bits(ground: Ground) -> Told:
    picture = Image.fromarray(np.array(ids(1, 0), np.uint8), "P")
    picture.putpalette([200, 0, 0, 0, 0, 0])
    ground.pair("train", "x", png(picture))
    return Told(masks={"train/x": ids(1, 0)})


def turned_mask(ground: Ground) -> Told:
    """Image and mask lie on their heads in the files, and both say so."""
    upright = np.array(ids(0, 0, 0, 1, 1), np.uint8)
    turned = np.ascontiguousarray(upright[::-1, ::-1])
    picture = Image.fromarray(np.zeros((*SHAPE, 3), np.uint8))
    ground.pair("train", "x", png(Image.fromarray(turned), 3), image=png(picture, 3))
    return Told(masks={"train/x": upright.tolist()})


def turned_mask_of_raw_ids(ground: Ground) -> Told:
    """As the one before; packing writes the mask anew."""
    ground.classes["ids"] = {"0": 0, "1": 1}
    return replace(turned_mask(ground), silence="EXIF turns")


def turned_tiff(ground: Ground) -> Told:
    """Pillow turns its pixels as it decodes them."""
    sink = io.BytesIO()
    Image.fromarray(np.zeros((*SHAPE, 3), np.uint8)).save(sink, "TIFF", tiffinfo={0x0112: 3})
    ground.put("images/train/x.tif", sink.getvalue())
    ground.put("masks/train/x.png", to_png(np.array(ids(1))))
    return Told(warning="images of split train that EXIF turns, unlike their masks: 1", masks={"train/x": ids(1)})


def turned_image(ground: Ground) -> Told:
    """Its mask may be of the picture that is shown, or of the one in the file: both are of the same size."""
    ground.pair("train", "x", ids(1), image=png(Image.fromarray(np.zeros((*SHAPE, 3), np.uint8)), 3))
    line = "images of split train that EXIF turns, unlike their masks: 1; make sure that the masks are of the upright"
    return Told(warning=line, masks={"train/x": ids(1)})


def folder_with_a_suffix(ground: Ground) -> Told:
    ground.pair("train", "x.jpg/y", ids(1))
    return Told(masks={"train/x.jpg/y": ids(1)})


def image_of_another_format(ground: Ground) -> Told:
    path = ground.where(ground.paths.image, "train", "x").replace(".png", ".heic")
    ground.put(path, b"ftypheic")
    ground.put(ground.where(ground.paths.mask, "train", "x"), to_png(np.array(ids(ground.paths.ids[0]))))
    return Told(warning=rf"files of other formats or names: 1 passed over \({path}\)")


# Names


def splits_without_masks(ground: Ground) -> Told:
    ground.put("images/test/x.png", photo("x"))
    return Told()


def split_with_half_its_masks(ground: Ground) -> Told:
    """Training does not ask for it; packing does."""
    ground.pair("test", "x", ids(0))
    ground.put("images/test/y.png", photo("y"))
    return Told(packing=r"images/test/y\.png: has no mask; expected masks/test/y\.png$")


def masks_missing(ground: Ground) -> Told:
    for key in "ab":
        ground.store.delete(f"masks/train/{key}.png")
    expected = r"images/train/a\.png: has no mask; expected masks/train/a\.png \(2 images of split train have none\)$"
    return Told(error=expected)


def flat(ground: Ground) -> Told:
    for split in ("train", "val"):
        for item in list(ground.store.list(f"images/{split}")):
            ground.put(f"images/{item.key.rpartition('/')[2]}", ground.store.read(item.key))
            ground.store.delete(item.key)
    return Told(error=r"images: holds 5 images and no folders of splits; expected images/train/\*\.jpg, masks/")


def flat_beside_splits(ground: Ground) -> Told:
    ground.put("images/x.png", photo("x"))
    return Told(warning=r"images beside the folders of splits: 1 passed over \(images/x\.png\)")


def twin_images(name: str) -> Plant:
    """An image whose mask is that of another one."""

    def plant(ground: Ground) -> Told:
        ground.put(f"images/train/{name}", photo(name))
        return Told(error=r"its name leads to the images images/train/\S+ and images/train/\S+; rename or remove one$")

    return plant


def twin_masks(ground: Ground) -> Told:
    ground.put("masks/train/a.PNG", to_png(np.array(ids(1))))
    return Told(error=r"a\.png: its name leads to the masks masks/train/a\.PNG and masks/train/a\.png; rename")


def capital_suffix(ground: Ground) -> Told:
    path = ground.where(ground.paths.mask, "train", "x")
    ground.pair("train", "x", b"")
    first, second = ground.paths.ids
    ground.store.delete(path)
    ground.put(path.replace(".png", ".PNG"), to_png(np.array(ids(second, first))))
    if ground.layout == "list":
        ground.lists["train"][-1] = "in/x.png out/x.PNG"
    return Told(masks={ground.name("train", "x"): ids(1, 0)})


def dots(ground: Ground) -> Told:
    """Frames, whose number is no suffix; the lists of VOC2012 have names without one."""
    first, second = ground.paths.ids
    ground.pair("train", "f.001", ids(first))
    ground.pair("train", "f.002", ids(second))
    return Told(masks={ground.name("train", "f.001"): ids(0), ground.name("train", "f.002"): ids(1)})


def folders(ground: Ground) -> Told:
    """The same name in two folders."""
    first, second = ground.paths.ids
    ground.pair("train", "one/x", ids(first))
    ground.pair("train", "two/x", ids(second))
    return Told(masks={ground.name("train", "one/x"): ids(0), ground.name("train", "two/x"): ids(1)})


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def forms_of_unicode(ground: Ground) -> Told:
    """An image copied from a Mac, a mask from elsewhere; a list from either."""
    first, _ = ground.paths.ids
    ground.pair("train", COMPOSED, ids(first))
    image = ground.where(ground.paths.image, "train", COMPOSED)
    ground.put(image.replace(COMPOSED, DECOMPOSED), ground.store.read(image))
    ground.store.delete(image)
    key = COMPOSED if ground.layout == "voc2012" else DECOMPOSED  # as its list has it
    return Told(masks={ground.name("train", key): ids(0)})


def both_forms_of_unicode(ground: Ground) -> Told:
    for key in (COMPOSED, DECOMPOSED):
        ground.put(f"images/train/{key}.png", photo(key))
    ground.put(f"masks/train/{COMPOSED}.png", to_png(np.array(ids(0))))
    return Told(error=r"images/train/cafe\\u0301\.png and images/train/caf\\xe9\.png; rename or remove one$")


# Lists


def lines(train: str, told: Told) -> Plant:
    """A list for train."""

    def plant(ground: Ground) -> Told:
        ground.put("train.txt", train.encode())
        return told

    return plant


GOOD = "in/a.png out/a.png\nin/b.png out/b.png\nin/c.png out/c.png\n"


def a_list_that_nobody_asks_for(ground: Ground) -> Told:
    ground.put("test.txt", b"in/a.png out/a.png\nin/d.png\n")
    return Told(packing=r"test\.txt line 2: expected the path of an image.*; remove it, or correct the line$")


def texts_that_are_no_lists(ground: Ground) -> Told:
    """As hszhao/semseg has its test images, and what else lies about."""
    ground.put("test.txt", b"in/a.png\n\nin/d.png\n")
    ground.put("classes.txt", b"sky\nroad\n")
    ground.put("README.txt", b"These are caf\xe9s.\n")
    return Told()


def a_list_of_images_alone(ground: Ground) -> Told:
    ground.put("train.txt", b"in/a.png\nin/b.png\n")
    line = r"train\.txt: names images without masks; remove it, or add"
    return Told(error=line, packing="split=train: no labelled images there; splits found: val")


def suffixes_that_tell_images_apart(ground: Ground) -> Told:
    ground.pair("train", "1_png", ids(0))
    ground.pair("train", "1_jpg", ids(1))
    for suffix in ("png", "jpg"):
        ground.put(f"in/1.{suffix}", photo(suffix))
    ground.lists["train"][-2:] = ["in/1.png out/1_png.png", "in/1.jpg out/1_jpg.png"]
    return Told(masks={"train/in/1.png": ids(0), "train/in/1.jpg": ids(1)})


def both_forms_of_unicode_in_a_list(ground: Ground) -> Told:
    ground.pair("train", COMPOSED, ids(0))
    ground.pair("train", DECOMPOSED, ids(1))
    return Told(masks={f"train/in/{COMPOSED}.png": ids(0), f"train/in/{DECOMPOSED}.png#2": ids(1)})


# Layouts of their own


def dummies(ground: Ground) -> Told:
    for number in range(5):
        ground.pair("test", f"berlin/{number}", ids(0, 1, 2, 3))
    line = r"split=test: its 5 masks are dummies without labels"
    return Told(error=line, packing="split=test: no labelled images there", flags={"val": "test"})


def dummies_in_a_folder(ground: Ground) -> Told:
    for number in range(3):
        ground.pair("test", f"{number}", ids(255))
    return Told()


def dummies_that_nobody_asks_for(ground: Ground) -> Told:
    dummies(ground)
    return Told()


def image_without_the_ending(ground: Ground) -> Told:
    ground.put("leftImg8bit/train/x_leftImg8bit_blurred.png", photo("x"))
    return Told(warning=r"formats or names: 1 passed over \(leftImg8bit/train/x_leftImg8bit_blurred\.png\)")


def mask_of_another_format(ground: Ground) -> Told:
    ground.put("SegmentationClass/x.bmp", photo("x"))
    return Told(warning=r"formats or names: 1 passed over \(SegmentationClass/x\.bmp\)")


def a_labelled_test(ground: Ground) -> Told:
    for number in range(5):
        ground.pair("test", f"{number}", ids(0, 7))
    return Told(flags={"val": "test"}, masks={f"test/{number}": ids(255, 0) for number in range(5)})


def sbd_alone(ground: Ground) -> Told:
    """(train + SBD) - val, and the finer masks where there are such."""
    for key, mask in (("a", ids(1)), ("d", ids(1)), ("x", ids(1))):
        ground.put(f"SegmentationClassAug/{key}.png", to_png(np.array(mask)))
    ground.put("SegmentationClassAug/gone.png", to_png(np.array(ids(1))))
    ground.put("JPEGImages/x.png", photo("x"))
    return Told(
        masks={"train/x": ids(1)}, warning=r"masks without an image: 1 passed over \(SegmentationClassAug/gone\.png\)"
    )


def a_readme_among_lists(ground: Ground) -> Told:
    ground.put("ImageSets/Segmentation/README.txt", b"These are caf\xe9s.\n")
    return Told()


GREY = Image.fromarray(np.array(ids(0, 1), np.uint8))
_MASK = r"cannot be read \(NotAMask: "
POISONS: dict[str, tuple[str, Plant]] = {
    each.__name__: ("folder", each)
    for each in (
        *(zero_and_255, zero_and_255_by_their_ids, three_classes_and_255, absent_but_allowed, a_class_for_val_only),
        *(
            one_class_in_val,
            val_of_ignored_pixels,
            train_of_ignored_pixels,
            a_blank_mask,
            copies,
            a_stray_id,
            an_id_left_out,
        ),
        *(a_built_in_table, a_built_in_table_leaves_all_out, an_id_beyond_a_built_in_table),
        *(all_ids_left_out, sixteen_bits, scored_on_what_is_learnt),
        *(palette_of_four_bits, turned_mask, turned_mask_of_raw_ids, turned_image, turned_tiff, folder_with_a_suffix),
        *(splits_without_masks, split_with_half_its_masks, masks_missing, flat, flat_beside_splits, twin_masks),
        *(both_forms_of_unicode, dummies_in_a_folder),
    )
}
POISONS |= {f"{each.__name__} in {name}": (name, each) for each in (capital_suffix, dots, folders) for name in PATHS}
POISONS |= {
    f"an image of another format in {name}": (name, image_of_another_format) for name in PATHS if name != "list"
}
POISONS |= {f"forms_of_unicode in {name}": (name, forms_of_unicode) for name in PATHS}
POISONS |= {
    "a.jpg beside a.png": ("folder", twin_images("a.jpg")),
    "a.PNG beside a.png": ("folder", twin_images("a.PNG")),
    "an empty mask": ("folder", bad_mask(r"cannot be read \(Empty: ", b"")),
    "a mask of colours": ("folder", bad_mask(_MASK + "PNG of mode RGB;", png(GREY.convert("RGB")))),
    "a mask with alpha": ("folder", bad_mask(_MASK + "PNG of mode RGBA;", png(GREY.convert("RGBA")))),
    "a grey mask with alpha": ("folder", bad_mask(_MASK + "PNG of mode LA;", png(GREY.convert("LA")))),
    "a larger mask": ("folder", bad_mask("the mask is 32x24, its image 16x12;", png(GREY.resize((32, 24))))),
    "a smaller mask": ("folder", bad_mask("the mask is 8x6, its image 16x12;", png(GREY.resize((8, 6))))),
    "an empty image": ("folder", bad_image(r"cannot be read \(Empty: ", b"")),
    "half an image": ("folder", bad_image(r"cannot be read \(Truncated: ", photo("x")[:200])),
    "a table with a key twice": (
        "folder",
        class_table(r"is not JSON \(0 stands twice", '{"names": ["sky", "road"], "ids": {"0": 0, "0": 1}}'),
    ),
    "a table with an id twice": (
        "folder",
        class_table("classes.ids=7: the id is given twice", '{"names": ["sky", "road"], "ids": {"7": 0, "07": 1}}'),
    ),
    "a table with another key": (
        "folder",
        class_table("classes.ignore_index=0: choose from", '{"names": ["sky", "road"], "ignore_index": 0}'),
    ),
    "a list with a mark": ("list", lines(f"\ufeff{GOOD}".replace("\n", "\r\n"), Told())),
    "a list with ./": ("list", lines(GOOD.replace("in/", "./in/").replace("out/", "in/../out/"), Told())),
    "a list that names a pair again": (
        "list",
        lines(GOOD + "/in/a.png ./out/a.png\n", Told(warning=r"a split names again: 1, taken once \(in/a\.png\)")),
    ),
    "a list of two masks": (
        "list",
        lines(
            GOOD + "in/a.png out/d.png\n",
            Told(
                warning=r"images with several masks: 1 \(in/a\.png\); each mask makes a pair of its own",
                masks={"train/in/a": ids(0, 1), "train/in/a#2": ids(0, 1)},
            ),
        ),
    ),
    "a list of one mask": (
        "list",
        lines(
            GOOD.replace("out/b", "out/a"),
            Told(warning=r"masks that several images share: 1 \(out/a\.png\); make sure"),
        ),
    ),
    "a list of one file": (
        "list",
        lines(
            GOOD + "in/a.png in/a.png\n", Told(error=r"train\.txt line 4: names in/a\.png as an image and as its own")
        ),
    ),
    "a list of what is not there": (
        "list",
        lines(GOOD + "in/A.png out/a.png\n", Told(error=r"train\.txt line 4: names in/A\.png, but there is no such")),
    ),
    "an empty list": (
        "list",
        lines(
            "\n\n",
            Told(
                error=r"train\.txt: names no image, as UTF-8 text; remove it, or correct its lines$",
                packing="split=train: no labelled images there; splits found: val",
            ),
        ),
    ),
    "a list for nobody": ("list", a_list_that_nobody_asks_for),
    **{
        each.__name__: ("list", each)
        for each in (
            *(texts_that_are_no_lists, a_list_of_images_alone),
            *(suffixes_that_tell_images_apart, both_forms_of_unicode_in_a_list),
        )
    },
    "dummies": ("cityscapes", dummies),
    "dummies for nobody": ("cityscapes", dummies_that_nobody_asks_for),
    "an image without the ending": ("cityscapes", image_without_the_ending),
    "a mask of another format": ("voc2012", mask_of_another_format),
    "a labelled test": ("cityscapes", a_labelled_test),
    "a README among the lists of VOC2012": ("voc2012", a_readme_among_lists),
    "SBD alone": ("voc2012", sbd_alone),
}

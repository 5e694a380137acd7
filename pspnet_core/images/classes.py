"""Class tables: names, colours, the ignore id and what other ids stand for, with the built-in tables.

A class id is an index into ``names``; a raw id is what a mask file holds, which may be something else.
Colours are RGB, 0 to 255 each. ``CLASS_TABLES`` names the built-in tables; any other comes from a
``classes.json`` file through :meth:`ClassTable.from_json`. Shapes: ``H W`` pixels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from pspnet_core.errors import ConfigError
from pspnet_core.images import class_tables

Color = tuple[int, int, int]
Mask = NDArray[np.uint8] | NDArray[np.uint16]

MAX_CLASS_ID = 65535
"""The largest id a mask can hold (16 bits)."""


@dataclass(frozen=True, kw_only=True)
class ClassTable:
    """What the class ids of a mask mean.

    Attributes:
        names: one unique name per class; the index is the class id.
        colors: one RGB colour per class, 0 to 255; two classes may share a colour.
        ignore: the id of pixels that carry no label; outside ``0 .. len - 1``, at most 65535.
        ids: raw id, 0 to 65535, -> class id or ``ignore``, for masks that hold other ids than the
            classes'; raw ids that it leaves out are ignored. None where masks hold class ids.

    Raises:
        ConfigError: when a rule above is broken.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    ignore: int = 255
    ids: Mapping[int, int] | None = field(default=None, hash=False)  # a dict has no hash; the rest has one

    def __post_init__(self) -> None:
        _check_names(self.names)
        _check_colors(self.colors, len(self.names))
        _check_ignore(self.ignore, len(self.names))
        if self.ids is not None:
            _check_ids(self.ids, len(self.names), self.ignore)

    def __len__(self) -> int:
        return len(self.names)

    def to_json(self) -> dict[str, object]:
        """Return what ``classes.json`` holds: ``{"names", "colors", "ignore"}`` in plain JSON types.

        With raw ids there is ``"ids"`` too, an object whose keys are text, as JSON wants them.
        """
        content: dict[str, object] = {
            "names": list(self.names),
            "colors": [list(color) for color in self.colors],
            "ignore": self.ignore,
        }
        if self.ids is not None:
            content["ids"] = {str(raw): index for raw, index in self.ids.items()}
        return content

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> ClassTable:
        """Read what :meth:`to_json` writes; ``colors``, ``ignore`` and ``ids`` may be missing.

        ``{"table": "cityscapes"}`` stands for a built-in table, by a name that :func:`class_table` knows.
        Missing colours are made up: the same distinct colour for the same id, every time.
        A missing ignore id is 255, or 65535 where 255 is a class.

        Raises:
            ConfigError: when a key is missing, of the wrong type, or breaks a rule of the table.
        """
        if not isinstance(value, Mapping):
            raise ConfigError("classes", type(value).__name__, 'expected {"names": [...], "colors": [...]}')
        if "table" in value:
            return _named_table(value)
        if others := sorted(value.keys() - {"names", "colors", "ignore", "ids"}):
            raise ConfigError(f"classes.{others[0]}", value[others[0]], "choose from names, colors, ignore and ids")
        names = _strings(value.get("names"))
        colors = value.get("colors")
        ignore = value.get("ignore", 255 if len(names) <= 255 else MAX_CLASS_ID)
        if not _is_whole(ignore):
            raise ConfigError("classes.ignore", repr(ignore), "expected a whole number")
        return cls(
            names=names,
            # Counted from 1, so that no class is black, the usual colour of unlabelled pixels.
            colors=_colormap(1, len(names)) if colors is None else _triples(colors),
            ignore=ignore,
            ids=_id_map(value["ids"]) if "ids" in value else None,
        )

    def remap(self, mask: Mask) -> Mask:
        """Turn the raw ids of a mask file into class ids.

        Args:
            mask: (H, W), or any other shape, uint8 or uint16.

        Returns:
            The mask itself when the table has no ``ids``. Otherwise a new array of the same shape, uint8
            (uint16 when ``ignore`` is above 255), that holds class ids and ``ignore`` only.

        Raises:
            ValueError: for a mask of another type, since negative ids would be taken for others.
        """
        if mask.dtype.kind != "u":
            raise ValueError(f"a mask of {mask.dtype}; raw ids are uint8 or uint16")
        if self.ids is None:
            return mask
        # One entry more than the largest raw id: all ids above it are clipped to that one.
        lookup = np.full(max(self.ids) + 2, self.ignore, np.min_scalar_type(self.ignore))
        lookup[list(self.ids.keys())] = list(self.ids.values())
        return lookup.take(mask, mode="clip")

    def leaves_out(self, raw: int) -> bool:
        """Whether an id in a mask file is neither in ``ids`` nor the ignore id: perhaps a class that was forgotten."""
        return self.ids is not None and raw not in self.ids and raw != self.ignore

    @property
    def is_built_in(self) -> bool:
        """Whether it is a built-in table, by whatever name: what such a table leaves out, it leaves out on purpose."""
        return self in CLASS_TABLES.values()

    def palette(self) -> bytes:
        """Return the colours of ids 0 to 255 as 768 bytes ``RGBRGB...``; black where there is no class."""
        flat = bytes(channel for color in self.colors[:256] for channel in color)
        return flat.ljust(768, b"\0")


def _strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ConfigError("classes.names", repr(value), "expected a list of class names")
    return tuple(value)


def _triples(value: object) -> tuple[Color, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(color, list | tuple) for color in value):
        raise ConfigError("classes.colors", repr(value), "expected a list of [r, g, b] colours")
    # The table itself checks the length and the channels of each colour.
    return tuple(tuple(color) for color in value)


def _id_map(value: object) -> dict[int, int]:
    if not isinstance(value, Mapping) or not all(re.fullmatch("[0-9]+", str(raw)) for raw in value):
        raise ConfigError("classes.ids", repr(value), 'expected {"<id in the masks>": <class id>, ...}')
    if twice := [raw for raw, count in Counter(map(int, value)).items() if count > 1]:
        raise ConfigError("classes.ids", twice[0], "the id is given twice, with zeros before it; leave one of them out")
    # The table itself checks the class ids.
    return {int(raw): index for raw, index in value.items()}


def _named_table(value: Mapping[str, object]) -> ClassTable:
    if others := sorted(value.keys() - {"table"}):
        raise ConfigError(f"classes.{others[0]}", value[others[0]], "a built-in table is complete; give it alone")
    return class_table(str(value["table"]))


def _check_names(names: tuple[str, ...]) -> None:
    if not 2 <= len(names) <= MAX_CLASS_ID:
        raise ConfigError("classes.names", f"{len(names)} names", f"give 2 to {MAX_CLASS_ID} classes")
    if empty := [index for index, name in enumerate(names) if not name.strip()]:
        raise ConfigError("classes.names", repr(names[empty[0]]), f"give class {empty[0]} a name")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError("classes.names", twice[0], "the name is given twice; make the names unique")


def _check_colors(colors: Sequence[Sequence[object]], classes: int) -> None:
    if len(colors) != classes:
        raise ConfigError(
            "classes.colors", f"{len(colors)} colours", f"give one colour for each of the {classes} classes"
        )
    for color in colors:
        if len(color) != 3 or not all(_is_whole(channel) and 0 <= channel <= 255 for channel in color):
            raise ConfigError("classes.colors", color, "a colour is three whole numbers, 0 to 255")


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_ignore(ignore: int, classes: int) -> None:
    if not classes <= ignore <= MAX_CLASS_ID:
        raise ConfigError(
            "classes.ignore", ignore, f"with {classes} classes it must be from {classes} to {MAX_CLASS_ID}"
        )


def _check_ids(ids: Mapping[int, int], classes: int, ignore: int) -> None:
    if not ids:
        raise ConfigError("classes.ids", "{}", "every pixel would be ignored; leave ids out, or fill it")
    for raw, index in ids.items():
        if not _is_whole(raw) or not 0 <= raw <= MAX_CLASS_ID:
            raise ConfigError("classes.ids", raw, f"an id in a mask is a whole number, 0 to {MAX_CLASS_ID}")
        if not _is_whole(index) or not (0 <= index < classes or index == ignore):
            allowed = f"0..{classes - 1} or ignore {ignore}"
            raise ConfigError(f"classes.ids.{raw}", repr(index), f"the classes allow {allowed}")


def _colormap(first: int, count: int) -> tuple[Color, ...]:
    """Return the PASCAL VOC colours of ids ``first .. first + count - 1``; distinct below 2**24.

    The bits of the id are dealt to red, green and blue in turn, the lowest into the top bit of each
    (``VOCcolormap.m`` of the VOC2012 development kit).
    """
    ids = np.arange(first, first + count)[:, None, None]
    bits = ids >> np.arange(24).reshape(8, 3) & 1
    colors = (bits << np.arange(7, -1, -1)[:, None]).sum(axis=1)
    return tuple((red, green, blue) for red, green, blue in colors.tolist())


def _table(rows: str, *, ignore: int = 255) -> ClassTable:
    """Build a table from ``name rrggbb`` rows, divided by commas or line breaks."""
    pairs = [row.rsplit(maxsplit=1) for row in rows.replace("\n", ",").split(",") if row.strip()]
    return ClassTable(
        names=tuple(name.strip() for name, _ in pairs),
        colors=tuple((int(code[:2], 16), int(code[2:4], 16), int(code[4:], 16)) for _, code in pairs),
        ignore=ignore,
    )


CAMVID = _table(class_tables.CAMVID, ignore=11)
CITYSCAPES = _table(class_tables.CITYSCAPES)
VOC2012 = ClassTable(names=tuple(class_tables.VOC2012.split()), colors=_colormap(0, 21))
ADE20K = _table(class_tables.ADE20K)
COCO_STUFF = _table(class_tables.COCO_STUFF)

CLASS_TABLES: dict[str, ClassTable] = {
    "camvid": CAMVID,
    "cityscapes": CITYSCAPES,
    "cityscapes-raw": replace(CITYSCAPES, ids=class_tables.CITYSCAPES_IDS),
    "voc2012": VOC2012,
    "ade20k": ADE20K,
    "ade20k-raw": replace(ADE20K, ids=class_tables.ADE20K_IDS),
    "coco-stuff-164k": COCO_STUFF,
    "coco-stuff-164k-raw": replace(COCO_STUFF, ids=class_tables.COCO_STUFF_IDS),
}
"""The built-in tables. A ``-raw`` one reads the data set's masks as they are distributed; without it,
masks hold class ids (Cityscapes: train ids), which for CamVid and VOC2012 are those distributed."""

_ALIASES = {"ade": "ade20k", "cocostuff": "cocostuff164k", "pascalvoc": "voc2012", "voc": "voc2012", "voc12": "voc2012"}


def class_table(name: str) -> ClassTable:
    """Return a row of ``CLASS_TABLES``; case, ``-``, ``_`` and blanks do not matter, and usual short names do.

    Raises:
        ConfigError: for a name that is not known.
    """
    plain = re.sub("[-_ ]", "", name.lower())
    base = plain.removesuffix("raw")
    found = _ALIASES.get(base, base) + plain[len(base) :]
    tables = {key.replace("-", ""): table for key, table in CLASS_TABLES.items()}
    if found not in tables:
        raise ConfigError("classes.table", name, f"choose one of {', '.join(CLASS_TABLES)}")
    return tables[found]

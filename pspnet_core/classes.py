"""Class tables: names, colours and the ignore id, with the built-in ones.

A class id is an index into ``names``. Colours are RGB, 0 to 255 each. ``CLASS_TABLES`` names the
built-in tables; any other comes from a ``classes.json`` file through :meth:`ClassTable.from_json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pspnet_core.errors import ConfigError

Color = tuple[int, int, int]

MAX_CLASS_ID = 65535
"""The largest id a mask can hold (16 bits)."""


@dataclass(frozen=True, kw_only=True)
class ClassTable:
    """What the class ids of a mask mean.

    Attributes:
        names: one unique name per class; the index is the class id.
        colors: one RGB colour per class, 0 to 255; two classes may share a colour.
        ignore: the id of pixels that carry no label; outside ``0 .. len - 1``, at most 65535.

    Raises:
        ConfigError: when a rule above is broken.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    ignore: int = 255

    def __post_init__(self) -> None:
        _check_names(self.names)
        _check_colors(self.colors, len(self.names))
        _check_ignore(self.ignore, len(self.names))

    def __len__(self) -> int:
        return len(self.names)

    def to_json(self) -> dict[str, object]:
        """Return what ``classes.json`` holds: ``{"names", "colors", "ignore"}`` in plain JSON types."""
        return {
            "names": list(self.names),
            "colors": [list(color) for color in self.colors],
            "ignore": self.ignore,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> ClassTable:
        """Read what :meth:`to_json` writes; ``colors`` and ``ignore`` may be missing.

        Missing colours are made up: the same distinct colour for the same id, every time.
        A missing ignore id is 255, or 65535 where 255 is a class.

        Raises:
            ConfigError: when a key is missing, of the wrong type, or breaks a rule of the table.
        """
        if not isinstance(value, Mapping):
            raise ConfigError("classes", type(value).__name__, 'expected {"names": [...], "colors": [...]}')
        names = _strings(value.get("names"))
        colors = value.get("colors")
        ignore = value.get("ignore", 255 if len(names) <= 255 else MAX_CLASS_ID)
        if not isinstance(ignore, int) or isinstance(ignore, bool):
            raise ConfigError("classes.ignore", repr(ignore), "expected a whole number")
        return cls(
            names=names,
            # Counted from 1, so that no class is black, the usual colour of unlabelled pixels.
            colors=_colormap(1, len(names)) if colors is None else _triples(colors),
            ignore=ignore,
        )

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


def _check_names(names: tuple[str, ...]) -> None:
    if not 2 <= len(names) <= MAX_CLASS_ID:
        raise ConfigError("classes.names", f"{len(names)} names", f"give 2 to {MAX_CLASS_ID} classes")
    if empty := [index for index, name in enumerate(names) if not name.strip()]:
        raise ConfigError("classes.names", repr(names[empty[0]]), f"give class {empty[0]} a name")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError("classes.names", name, "the name is given twice; make the names unique")
        seen.add(name)


def _check_colors(colors: Sequence[Sequence[object]], classes: int) -> None:
    if len(colors) != classes:
        raise ConfigError(
            "classes.colors", f"{len(colors)} colours", f"give one colour for each of the {classes} classes"
        )
    for color in colors:
        if len(color) != 3 or not all(_is_byte(channel) for channel in color):
            raise ConfigError("classes.colors", color, "a colour is three whole numbers, 0 to 255")


def _is_byte(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def _check_ignore(ignore: int, classes: int) -> None:
    if not classes <= ignore <= MAX_CLASS_ID:
        raise ConfigError(
            "classes.ignore", ignore, f"with {classes} classes it must be from {classes} to {MAX_CLASS_ID}"
        )


def _colormap(first: int, count: int) -> tuple[Color, ...]:
    """Return the PASCAL VOC colours of ids ``first .. first + count - 1``; distinct below 2**24.

    The bits of the id are dealt to red, green and blue in turn, the lowest into the top bit of each
    (``VOCcolormap.m`` of the VOC2012 development kit).
    """
    return tuple(_deal_bits(index) for index in range(first, first + count))


def _deal_bits(index: int) -> Color:
    red = green = blue = 0
    for place in range(7, -1, -1):
        red |= (index & 1) << place
        green |= (index >> 1 & 1) << place
        blue |= (index >> 2 & 1) << place
        index >>= 3
    return red, green, blue


def _table(rows: str, *, ignore: int = 255) -> ClassTable:
    """Build a table from ``name rrggbb`` rows, divided by commas or line breaks."""
    pairs = [row.rsplit(maxsplit=1) for row in rows.replace("\n", ",").split(",") if row.strip()]
    return ClassTable(
        names=tuple(name.strip() for name, _ in pairs),
        colors=tuple((int(code[:2], 16), int(code[2:4], 16), int(code[4:], 16)) for _, code in pairs),
        ignore=ignore,
    )


# The 11 classes and colours of the SegNet release of CamVid; its unlabelled pixels are id 11.
CAMVID = _table(
    """
    Sky 808080, Building 800000, Pole c0c080, Road 804080, Pavement 3c28de, Tree 808000
    SignSymbol c08080, Fence 404080, Car 400080, Pedestrian 404000, Bicyclist 0080c0
    """,
    ignore=11,
)

# The 19 train ids of Cityscapes (labels.py of the cityscapesScripts).
CITYSCAPES = _table(
    """
    road 804080, sidewalk f423e8, building 464646, wall 66669c, fence be9999, pole 999999
    traffic light faaa1e, traffic sign dcdc00, vegetation 6b8e23, terrain 98fb98, sky 4682b4
    person dc143c, rider ff0000, car 00008e, truck 000046, bus 003c64, train 005064
    motorcycle 0000e6, bicycle 770b20
    """
)

_VOC2012_NAMES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
)
VOC2012 = ClassTable(names=tuple(_VOC2012_NAMES.split()), colors=_colormap(0, 21))

# The 150 classes of the MIT Scene Parsing Benchmark: the first synonym of objectInfo150 and the
# colours of color150, with id 0 = wall (the files' 0, "other", is the ignore id here).
ADE20K = _table(
    """
    wall 787878, building b47878, sky 06e6e6, floor 503232, tree 04c803, ceiling 787850, road 8c8c8c
    bed cc05ff, windowpane e6e6e6, grass 04fa07, cabinet e005ff, sidewalk ebff07, person 96053d
    earth 787846, door 08ff33, table ff0652, mountain 8fff8c, plant ccff04, curtain ff3307, chair cc4603
    car 0066c8, water 3de6fa, painting ff0633, sofa 0b66ff, shelf ff0747, house ff09e0, sea 0907e6
    mirror dcdcdc, rug ff095c, field 7009ff, armchair 08ffd6, seat 07ffe0, fence ffb806, desk 0aff47
    rock ff290a, wardrobe 07ffff, lamp e0ff08, bathtub 6608ff, railing ff3d06, cushion ffc207
    base ff7a08, box 00ff14, column ff0829, signboard ff0599, chest of drawers 0633ff, counter eb0cff
    sand a09614, sink 00a3ff, skyscraper 8c8c8c, fireplace fa0a0f, refrigerator 14ff00
    grandstand 1fff00, path ff1f00, stairs ffe000, runway 99ff00, case 0000ff, pool table ff4700
    pillow 00ebff, screen door 00adff, stairway 1f00ff, river 0bc8c8, bridge ff5200, bookcase 00fff5
    blind 003dff, coffee table 00ff70, toilet 00ff85, flower ff0000, book ffa300, hill ff6600
    bench c2ff00, countertop 008fff, stove 33ff00, palm 0052ff, kitchen island 00ff29, computer 00ffad
    swivel chair 0a00ff, boat adff00, bar 00ff99, arcade machine ff5c00, hovel ff00ff, bus ff00f5
    towel ff0066, light ffad00, truck ff0014, tower ffb8b8, chandelier 001fff, awning 00ff3d
    streetlight 0047ff, booth ff00cc, television receiver 00ffc2, airplane 00ff52, dirt track 000aff
    apparel 0070ff, pole 3300ff, land 00c2ff, bannister 007aff, escalator 00ffa3, ottoman ff9900
    bottle 00ff0a, buffet ff7000, poster 8fff00, stage 5200ff, van a3ff00, ship ffeb00, fountain 08b8aa
    conveyer belt 8500ff, canopy 00ff5c, washer b800ff, plaything ff001f, swimming pool 00b8ff
    stool 00d6ff, barrel ff0070, basket 5cff00, waterfall 00e0ff, tent 70e0ff, bag 46b8a0
    minibike a300ff, cradle 9900ff, oven 47ff00, ball ff00a3, food ffcc00, step ff008f, tank 00ffeb
    trade name 85ff00, microwave ff00eb, pot f500ff, animal ff007a, bicycle fff500, lake 0abed4
    dishwasher d6ff00, screen 00ccff, blanket 1400ff, sculpture ffff00, hood 0099ff, sconce 0029ff
    vase 00ffcc, traffic light 2900ff, tray 29ff00, ashcan ad00ff, fan 00f5ff, pier 4700ff
    crt screen 7a00ff, plate 00ffb8, monitor 005cff, bulletin board b8ff00, shower 0085ff
    radiator ffd600, glass 19c2c2, clock 66ff00, flag 5c00ff
    """
)

CLASS_TABLES: dict[str, ClassTable] = {
    "camvid": CAMVID,
    "cityscapes": CITYSCAPES,
    "voc2012": VOC2012,
    "ade20k": ADE20K,
}

"""Other projects' PSPNets as ours: the same logits from the same weights under our names.

The walk: the names of the weights tell the source, a row of ``IMPORTERS`` -> its patterns give them our names -> their
shapes give most fields of the config -> the row's function adds those that leave no trace in shapes -> each weight of
the network must be there in its shape. A new source is a row and a function.
"""

import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pspnet_core.checkpoints import mmseg_metadata
from pspnet_core.checkpoints.weight_files import first_keys, read_weight_file
from pspnet_core.checkpoints.weight_shapes import (
    Fields,
    Weights,
    backbone_fields,
    fit_state,
    grid_fields,
    head_fields,
    normalisation,
)
from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import ADE20K, CLASS_TABLES, ClassTable
from pspnet_core.network.pspnet import PSPNetConfig

log = logging.getLogger(__name__)
Meta = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Imported:
    """A network of another project.

    Attributes:
        kind: the project, ``Importer.kind``.
        config: the network.
        weights: its state, float32 on the CPU.
        classes: what its outputs mean.
        leftover: names in the file that nothing was taken from.
        backbone_only: whether the head is untrained.
    """

    kind: str
    config: PSPNetConfig
    weights: dict[str, Tensor]
    classes: ClassTable
    leftover: tuple[str, ...]
    backbone_only: bool


@dataclass(frozen=True, kw_only=True)
class Importer:
    """A source of checkpoints.

    Attributes:
        kind: the project.
        recognises: whether the names of a file's weights are the project's.
        names: pattern of its names -> ours.
        parts: pattern of the names that make up its network; none of them may be left over.
        settings: fields of the config that leave no trace in shapes, from those that do and the file's metadata.
        backbone_only: whether it has no head; ours is then freshly initialised.
    """

    kind: str
    recognises: Callable[[Collection[str]], bool]
    names: Mapping[str, str]
    parts: str
    settings: Callable[[Fields, Meta], Fields] = lambda shown, meta: {}
    backbone_only: bool = False


def import_checkpoint(
    file: Path,
    *,
    source: str | None = None,
    key: str | None = None,
    classes: ClassTable | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Imported:
    """Read a checkpoint of another project.

    Args:
        file: ``.safetensors``, an index of such files, or what ``torch.save`` wrote.
        source: what errors call it; its path by default.
        key: which part of the file to take, where it holds several copies of the weights.
        classes: what the outputs mean; by default what the metadata says, else the built-in table of as many classes,
            else made-up names. A bare backbone gets ADE20K's.
        overrides: fields of ``PSPNetConfig`` to set in any case.

    Raises:
        ConfigError: the file cannot be read, its source is unknown, it is another network than a PSPNet, or a weight is
            missing or of another shape.
    """
    weights, meta = read_weight_file(file, source=source, key=key)
    importer = _recognise(weights, source or str(file))
    if importer.backbone_only:
        classes = classes or ADE20K
        log.info("a backbone alone: the head for %d classes is untrained, a start for training (--init)", len(classes))
    averaged = any(".downsample.2." in name for name in weights)  # average, convolution, BatchNorm
    ours = {name: _rename(name, importer.names, averaged=averaged) for name in weights}
    own = {name: weights[theirs] for theirs, name in ours.items() if name is not None}

    shown: Fields = {"avg_down": averaged} | backbone_fields(own)
    shown |= {"classes": len(classes or ADE20K)} if importer.backbone_only else head_fields(own, shown["backbone"])
    fields = shown | importer.settings(shown, meta) | dict(overrides or {})
    config = PSPNetConfig(**fields | grid_fields(own, fields) | normalisation(own, fields))

    state = fit_state(config, own, backbone_only=importer.backbone_only)
    leftover = tuple(name for name in weights if ours[name] not in state)
    unused = tuple(f"backbone.layer{stage}." for stage in range(config.stages + 1, 5))
    strange = [name for name in leftover if re.match(importer.parts, name) and not str(ours[name]).startswith(unused)]
    if strange:
        raise ConfigError("weights", strange[0], f"a PSPNet of {importer.kind} has no such weight: another network")
    return Imported(
        kind=importer.kind,
        config=config,
        weights=state,
        classes=classes or _class_table(config.classes, meta),
        leftover=leftover,
        backbone_only=importer.backbone_only,
    )


def _recognise(weights: Weights, source: str) -> Importer:
    for importer in IMPORTERS:
        if importer.recognises(weights.keys()):
            return importer
    kinds = ", ".join(dict.fromkeys(importer.kind for importer in IMPORTERS))
    raise ConfigError("source", source, f"is none of {kinds}; its first keys: {first_keys(weights)}")


def _rename(name: str, names: Mapping[str, str], *, averaged: bool) -> str | None:
    """Our name of a weight; None where there is no place for it."""
    for pattern, template in names.items():
        if match := re.fullmatch(pattern, name):
            ours = match.expand(template)
            if averaged:  # that layer is their first and has no number here
                ours = ours.replace("downsample.1.", "downsample.0.").replace("downsample.2.", "downsample.1.")
            return ours
    return None


# Classes


def _class_table(count: int, meta: Meta) -> ClassTable:
    """Names and colours from the metadata, else the built-in table of as many classes, else made up."""
    names, colors = mmseg_metadata.per_class(meta, "classes"), mmseg_metadata.per_class(meta, "palette")
    if names is not None and len(names) == count:
        log.info("class names of the metadata")
        content: dict[str, object] = {"names": names}
        return ClassTable.from_json(content | {"colors": colors} if colors and len(colors) == count else content)
    if names is not None:
        log.warning("the metadata names %d classes, the network has %d: names not used", len(names), count)
    for name, table in CLASS_TABLES.items():
        if len(table) == count:
            log.warning("no class names: those of %s assumed, which has as many; see --classes", name)
            return table
    log.warning("no class names: class_0 to class_%d made up; see --classes", count - 1)
    return ClassTable.from_json({"names": [f"class_{index}" for index in range(count)]})


# Sources


def _has(*names: str) -> Callable[[Collection[str]], bool]:
    return lambda found: all(name in found for name in names)


def _only(pattern: str) -> Callable[[Collection[str]], bool]:
    """Whether all names match, those of a ResNet among them."""
    first = "layer1.0.conv1.weight"
    return lambda found: all(re.match(pattern, name) for name in found) and any(n.endswith(first) for n in found)


def _semseg(shown: Fields, meta: Meta) -> Fields:
    return {"dilation": "full", "align_corners": True, "dropout": 0.1}


def _segmentation_models(shown: Fields, meta: Meta) -> Fields:
    # Its encoder is not dilated; two stages have stride 8 anyway.
    stride = 8 if shown["stages"] == 2 else 32
    return {"output_stride": stride, "align_corners": True, "fusion_order": "feature_last", "dropout": 0.2}


_STAGES = r"(layer[1-4]\..+)"
_CLASSIFIER = r"(?:fc|head)\."

IMPORTERS: tuple[Importer, ...] = (
    Importer(
        kind="semseg",
        recognises=_has("layer0.0.weight", "ppm.features.0.1.weight", "cls.0.weight"),
        names={
            r"layer0\.([01346]\..+)": r"backbone.conv1.\1",
            r"layer0\.7\.(.+)": r"backbone.bn1.\1",
            _STAGES: r"backbone.\1",
            r"ppm\.features\.(\d+)\.1\.(.+)": r"pyramid.stages.\1.0.\2",
            r"ppm\.features\.(\d+)\.2\.(.+)": r"pyramid.stages.\1.1.\2",
            r"cls\.([01]\..+)": r"fusion.\1",
            r"cls\.4\.(.+)": r"decoder.1.\1",
            r"aux\.([014]\..+)": r"auxiliary.\1",
        },
        parts=r"(layer[0-4]|ppm|psa|cls|aux)\.",
        settings=_semseg,
    ),
    Importer(
        kind="mmsegmentation",
        recognises=_has("decode_head.psp_modules.0.1.conv.weight", "decode_head.bottleneck.conv.weight"),
        names={
            r"backbone\.stem\.([01346]\..+)": r"backbone.conv1.\1",
            r"backbone\.stem\.7\.(.+)": r"backbone.bn1.\1",
            r"backbone\.((?:conv1|bn1)\..+)": r"backbone.\1",
            r"backbone\." + _STAGES: r"backbone.\1",
            r"decode_head\.psp_modules\.(\d+)\.1\.conv\.(.+)": r"pyramid.stages.\1.0.\2",
            r"decode_head\.psp_modules\.(\d+)\.1\.bn\.(.+)": r"pyramid.stages.\1.1.\2",
            r"decode_head\.bottleneck\.conv\.(.+)": r"fusion.0.\1",
            r"decode_head\.bottleneck\.bn\.(.+)": r"fusion.1.\1",
            r"decode_head\.conv_seg\.(.+)": r"decoder.1.\1",
            r"auxiliary_head\.convs\.0\.conv\.(.+)": r"auxiliary.0.\1",
            r"auxiliary_head\.convs\.0\.bn\.(.+)": r"auxiliary.1.\1",
            r"auxiliary_head\.conv_seg\.(.+)": r"auxiliary.4.\1",
        },
        parts=r"(backbone|neck|decode_head|auxiliary_head)\.",
        settings=lambda shown, meta: mmseg_metadata.settings_of(meta),
    ),
    Importer(
        kind="segmentation_models",
        recognises=_has("decoder.psp.blocks.0.pool.1.0.weight", "segmentation_head.0.weight"),
        names={
            r"encoder\.((?:conv1|bn1)\..+)": r"backbone.\1",
            r"encoder\." + _STAGES: r"backbone.\1",
            r"decoder\.psp\.blocks\.(\d+)\.pool\.1\.(.+)": r"pyramid.stages.\1.\2",
            r"decoder\.conv\.([01]\..+)": r"fusion.\1",
            r"segmentation_head\.0\.(.+)": r"decoder.1.\1",
        },
        parts=r"(encoder|decoder|segmentation_head)\.",
        settings=_segmentation_models,
    ),
    Importer(  # torchvision's ResNet; with mmpretrain's deep stem, too, and with timm's
        kind="torchvision",
        recognises=_only(rf"(backbone\.)?(conv1|bn1|stem|layer[1-4])\.|{_CLASSIFIER}"),
        names={
            r"(?:backbone\.)?stem\.([01346]\..+)": r"backbone.conv1.\1",
            r"(?:backbone\.)?stem\.7\.(.+)": r"backbone.bn1.\1",
            r"(?:backbone\.)?((?:conv1|bn1)\..+)": r"backbone.\1",
            r"(?:backbone\.)?" + _STAGES: r"backbone.\1",
        },
        parts=r"(backbone|conv1|bn1|stem|layer[1-4])\.",
        backbone_only=True,
    ),
    Importer(  # the ImageNet weights of semseg: a deep stem in torchvision's manner
        kind="torchvision",
        recognises=_only(rf"(conv|bn)[1-3]\.|layer[1-4]\.|{_CLASSIFIER}"),
        names={
            r"conv1\.(.+)": r"backbone.conv1.0.\1",
            r"bn1\.(.+)": r"backbone.conv1.1.\1",
            r"conv2\.(.+)": r"backbone.conv1.3.\1",
            r"bn2\.(.+)": r"backbone.conv1.4.\1",
            r"conv3\.(.+)": r"backbone.conv1.6.\1",
            r"bn3\.(.+)": r"backbone.bn1.\1",
            _STAGES: r"backbone.\1",
        },
        parts=r"(conv|bn|layer)\d\.",
        backbone_only=True,
    ),
)
"""Sources in the order in which they are tried."""

"""Find the network that weights under our names fit: its config, read from names and shapes, and its state.

``own`` maps names of our state to the tensors of another program.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pspnet_core.errors import ConfigError
from pspnet_core.network.backbones import BACKBONES, STEMS, BackboneSpec, Bottleneck
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig

log = logging.getLogger(__name__)
Fields = dict[str, Any]  # of PSPNetConfig
Weights = Mapping[str, Tensor]


def backbone_fields(own: Weights) -> Fields:
    """``backbone`` and ``stem``, from the blocks of each stage and the widths of the first convolutions."""
    blocks = [len({name.split(".")[2] for name in own if name.startswith(f"backbone.layer{n}.")}) for n in range(1, 5)]
    deep = "backbone.layer1.0.conv3.weight" in own
    backbone = next((name for name, spec in BACKBONES.items() if _matches(spec, blocks, deep=deep)), None)
    if backbone is None:
        kind = "bottleneck" if deep else "basic"
        raise ConfigError("backbone", blocks, f"no ResNet of so many {kind} blocks; known: {', '.join(BACKBONES)}")
    names = (f"backbone.conv1.{index}.weight" for index in (0, 3, 6))
    widths = tuple(_kernel(own, name).outputs for name in names if name in own)
    stem = next((name for name, known in STEMS.items() if known == widths), None)
    if stem is None:
        raise ConfigError("stem", widths, f"no stem of these widths; known: {STEMS}")
    return {"backbone": backbone, "stem": stem}


def _matches(spec: BackboneSpec, blocks: Sequence[int], *, deep: bool) -> bool:
    """Whether a file with so many blocks in each stage holds this network; stages 3 and 4 may be missing."""
    counts = zip(blocks, spec.blocks, strict=True)
    same = [found == count or (found == 0 and index >= 2) for index, (found, count) in enumerate(counts)]
    return all(same) and (spec.block is Bottleneck) == deep


def head_fields(own: Weights, backbone: str) -> Fields:
    """Sizes of pyramid, fusion and classifiers, and the stage that they follow."""
    grid, fusion, last = (_kernel(own, f"{name}.weight") for name in ("pyramid.stages.0.0", "fusion.0", "decoder.1"))
    stages = next((stage for stage in (2, 3, 4) if BACKBONES[backbone].channels(stage) == grid.inputs), None)
    if stages is None:
        raise ConfigError("weights", "pyramid.stages.0.0.weight", f"no stage of {backbone} has {grid.inputs} channels")
    auxiliary = "auxiliary.0.weight" in own
    return {
        "stages": stages,
        "bin_width": grid.outputs,
        "fusion_width": fusion.outputs,
        "fusion_kernel": fusion.side,
        "classes": last.outputs,
        "classifier_kernel": last.side,
        "auxiliary": auxiliary,
        "auxiliary_width": _kernel(own, "auxiliary.0.weight").outputs if auxiliary else None,
    }


def grid_fields(own: Weights, fields: Fields) -> Fields:
    """The pyramid's grids: their number shows, their sizes do not."""
    grids = sum(re.fullmatch(r"pyramid\.stages\.\d+\.0\.weight", name) is not None for name in own)
    bins = tuple(fields.get("bins") or PSPNetConfig.bins)  # by default the paper's
    if grids and len(bins) != grids:
        raise ConfigError("bins", bins, f"the network has {grids} grids; give their sizes with --bins")
    biased = (size for index, size in enumerate(bins) if f"pyramid.stages.{index}.0.bias" in own)
    return {"bins": bins, "biased_bins": tuple(biased)}


def normalisation(own: Weights, fields: Fields) -> Fields:
    """Mean and standard deviation for as many bands as the first convolution takes."""
    name = "backbone.conv1.weight" if fields["stem"] == "plain" else "backbone.conv1.0.weight"
    bands = _kernel(own, name).inputs
    known = {field: tuple(fields[field]) for field in ("mean", "std") if fields.get(field) is not None}
    for field, values in known.items():
        if len(values) != bands:
            raise ConfigError(field, values, f"the network takes {bands} bands; give as many numbers")
    if bands == 3 or len(known) == 2:
        return known
    log.warning("%d bands: mean 0 and standard deviation 255 assumed, the range [0, 1]; see --mean and --std", bands)
    return {"mean": (0.0,) * bands, "std": (255.0,) * bands} | known


class _Kernel(NamedTuple):
    outputs: int
    inputs: int
    side: int


def _kernel(own: Weights, name: str) -> _Kernel:
    if name not in own:
        raise _absent(name)
    shape = own[name].shape
    if len(shape) != 4:
        raise ConfigError("weights", name, f"{tuple(shape)} in the source: no convolution's kernel")
    return _Kernel(*shape[:3])


def _absent(name: str) -> ConfigError:
    return ConfigError("weights", name, "the source has nothing for it: not all of a PSPNet is there")


def fit_state(config: PSPNetConfig, own: Weights, *, backbone_only: bool) -> dict[str, Tensor]:
    """The state of a network of this config, each weight from ``own``; a missing head is drawn from a fixed seed."""
    # On the meta device names and shapes cost no time.
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if backbone_only else "meta"):
        torch.manual_seed(0)
        state: dict[str, Tensor] = PSPNet(config).state_dict()
    for name, value in state.items():
        given = own.get(name)
        if given is None:
            state[name] = _fill_in(name, value, config, may_be_fresh=backbone_only and not name.startswith("backbone."))
        elif given.shape != value.shape:
            shapes = f"{tuple(given.shape)} in the source, {tuple(value.shape)} in a PSPNet with {config.backbone}"
            raise ConfigError("weights", name, shapes)
        elif value.is_floating_point() and not given.is_floating_point():
            raise ConfigError("weights", name, f"{given.dtype} in the source; convert a copy that is not quantised")
        else:
            state[name] = given.detach().to(value.dtype, copy=True).contiguous()
    return state


def _fill_in(name: str, value: Tensor, config: PSPNetConfig, *, may_be_fresh: bool) -> Tensor:
    """What the source need not give."""
    if name in ("mean", "std"):
        return torch.tensor(getattr(config, name)).view(value.shape)
    if name.endswith(".num_batches_tracked"):  # older versions of torch did not keep it; inference ignores it
        return torch.zeros_like(value, device="cpu")
    if may_be_fresh:
        return value
    raise _absent(name)

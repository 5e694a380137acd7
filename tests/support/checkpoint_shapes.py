"""Checkpoints as training programs write them, each a function that makes the content of a file, and a row of SHAPES.

The programs are not needed: while a file is written, their classes are stood in for under the same names.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import pickle
import struct
import sys
import tarfile
import types
import unittest.mock
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from tests.support.public_models import MmsegPSPNet, SmpPSPNet, randomise

State = dict[str, Tensor]
NAMES = ("road", "river", "roof", "tree", "sky")
COLOURS = [[128, 64, 128], [0, 0, 255], [200, 10, 10], [0, 99, 0], [70, 130, 180]]
CONFIG = """
data_preprocessor = dict(bgr_to_rgb=True, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
model = dict(
    backbone=dict(contract_dilation=True, dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1), type='ResNetV1c'),
    decode_head=dict(align_corners=True, dropout_ratio=0.2, pool_scales=(1, 2, 3, 6), type='PSPHead'))
"""


@functools.cache
def smp_network() -> nn.Module:
    """The smallest PSPNet of all, 5 classes. Not to be changed."""
    network = SmpPSPNet(5, width=32)
    del network.encoder.layer3, network.encoder.layer4  # not used
    return randomise(network)


@functools.cache
def mmseg_network() -> nn.Module:
    """A PSPNet of mmsegmentation, whose settings ``CONFIG`` tells. Not to be changed."""
    return randomise(MmsegPSPNet(5, bins=(1, 2, 3, 6), align=True))


@contextlib.contextmanager
def classes(*paths: str) -> Iterator[list[type]]:
    """Classes of modules that are not installed; importable until leaving."""
    made, modules = [], dict[str, types.ModuleType]()
    for path in paths:
        module, _, name = path.rpartition(".")
        made.append(type(name, (dict,) if name == "AttributeDict" else (), {"__module__": module}))
        for end in range(1, module.count(".") + 2):
            parent = ".".join(module.split(".")[:end])
            modules.setdefault(parent, types.ModuleType(parent))
        setattr(modules[module], name, made[-1])
    with unittest.mock.patch.dict(sys.modules, modules):
        yield made


def prefixed(state: State, prefix: str) -> State:
    """A state under the names that a wrapper gives it."""
    return OrderedDict((f"{prefix}{name}", value) for name, value in state.items())


def other(state: State) -> State:
    """The same network with other weights."""
    return OrderedDict((name, value + 1 if value.is_floating_point() else value) for name, value in state.items())


def momenta(state: State) -> dict[str, Any]:
    """The state of an optimiser (SGD) that has taken a step."""
    buffers = {
        number: {"momentum_buffer": value[:1].clone()} for number, value in enumerate(state.values()) if value.ndim
    }
    return {"state": buffers, "param_groups": [{"lr": 0.01, "momentum": 0.9, "foreach": None, "params": list(buffers)}]}


def mmengine(state: State, **more: Any) -> Any:
    """What the runner of mmengine saves in training."""
    with classes("mmengine.logging.history_buffer.HistoryBuffer") as (history_buffer,):
        buffer = history_buffer()
        buffer.__dict__.update(max_length=1000000, _log_history=np.arange(50.0), _count_history=np.ones(50, np.int64))
        content = {
            "meta": {
                "epoch": 3,
                "iter": 4000,
                "cfg": CONFIG,
                "seed": np.int64(1),
                "experiment_name": "pspnet_20240101_000000",
                "mmengine_version": "0.10.4",
                "dataset_meta": {"classes": NAMES, "palette": COLOURS, "label_map": None, "reduce_zero_label": False},
            },
            "state_dict": OrderedDict(state),
            "message_hub": {
                "log_scalars": {"train/lr": buffer, "train/loss": buffer},
                "runtime_info": {"iter": 4000, "loop_stage": "train", "val/mIoU": np.float64(41.5), "seen": {1, 2}},
                "resumed_keys": {"train/lr": True},
            },
            "optimizer": momenta(state),
            "param_schedulers": [{"power": 0.9, "_last_lr": [np.float32(0.01)], "verbose": False}],
            **more,
        }
        return _written(content)


def mmengine_ema(state: State) -> Any:
    """Its EMAHook swaps the two, so that the average can be deployed as it is; what learns lies under the other key."""
    return mmengine(state, ema_state_dict={"steps": torch.tensor(9), **prefixed(other(state), "module.")})


def mmcv_ema(state: State) -> Any:
    """mmcv's EMAHook keeps buffers of the model, and mmsegmentation 0.x a palette that it has drawn."""
    copies = {f"ema_{name.replace('.', '_')}": value for name, value in other(state).items()}
    meta = {"mmseg_version": "0.30.0", "CLASSES": NAMES, "PALETTE": np.array(COLOURS), "config": CONFIG}
    return {"meta": meta | {"hook_msgs": {"best_score": np.float64(0.4)}}, "state_dict": OrderedDict(state | copies)}


def lightning(state: State, prefix: str = "model.") -> Any:
    """What the Trainer of Lightning saves."""
    with classes("lightning.fabric.utilities.data.AttributeDict", "omegaconf.dictconfig.DictConfig") as (kind, config):
        monitored = {"monitor": "val_loss", "best_model_score": torch.tensor(0.3), "dirpath": Path("/runs/1")}
        return _written(
            {
                "epoch": 3,
                "global_step": 4000,
                "pytorch-lightning_version": "2.4.0",
                "state_dict": prefixed(state, prefix) | {"criterion.weight": torch.ones(5)},
                "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
                "callbacks": {"ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min'}": monitored},
                "optimizer_states": [momenta(state)],
                "lr_schedulers": [{"base_lrs": [np.float64(0.1)], "_last_lr": [0.05]}],
                "hparams_name": "kwargs",
                "hyper_parameters": kind(lr=0.1, config=config(), arguments=argparse.Namespace(arch="pspnet")),
            }
        )


def timm(state: State) -> Any:
    """timm's CheckpointSaver; its validation takes the average."""
    arguments = argparse.Namespace(model="pspnet", model_ema=True, lr=0.1, data=Path("/data"))
    content = {"epoch": 3, "arch": "pspnet", "state_dict": other(state), "optimizer": momenta(state), "version": 2}
    return content | {"args": arguments, "state_dict_ema": OrderedDict(state), "metric": np.float64(70.1)}


def torchvision(state: State) -> Any:
    """torchvision's reference scripts, whose average is an AveragedModel."""
    average = {"n_averaged": torch.tensor(5), **prefixed(state, "module.")}
    return {"model": other(state), "model_ema": average, "args": argparse.Namespace(device="cuda"), "epoch": 1}


def _written(content: Any) -> Any:
    """As bytes, because the classes in it are about to vanish."""
    buffer = BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def save(content: Any, file: Path) -> None:
    """``torch.save``."""
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)


def save_stream(content: Any, file: Path) -> None:
    """The format before torch 1.6."""
    torch.save(content, file, _use_new_zipfile_serialization=False)


def save_tar(content: Any, file: Path) -> None:
    """The format before torch 0.1.10, of a state dict of float32 and int64."""
    tensors = {str(number): value.contiguous() for number, value in enumerate(content.values())}
    identity = {id(value): key for key, value in zip(tensors, content.values(), strict=True)}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> str | None:
            return identity.get(id(value))

    def dumped(value: Any) -> bytes:
        return pickle.dumps(value, 2)

    storages, shapes, tree = [dumped(len(tensors))], [dumped(len(tensors))], BytesIO()
    for key, value in tensors.items():
        kind, width = (torch.FloatStorage, 4) if value.dtype == torch.float32 else (torch.LongStorage, 8)
        data = value.numpy().tobytes()
        storages += [dumped((int(key), "cpu", kind)), struct.pack("<q", len(data) // width), data]
        axes = [*value.shape, *value.stride()]
        shapes += [dumped((int(key), int(key), torch.FloatTensor))]
        shapes += [struct.pack(f"<ii{len(axes)}qq", value.ndim, 0, *axes, 0)]
    Pickler(tree, 2).dump(OrderedDict(content))
    parts = {"sys_info": dumped({}), "pickle": tree.getvalue()}
    parts |= {"storages": b"".join([*storages, dumped([])]), "tensors": b"".join(shapes)}
    with tarfile.open(file, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, data in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, BytesIO(data))


def save_without_sums(content: Any, file: Path) -> None:
    """The zip format without its check sums."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, file)
    finally:
        torch.serialization.set_crc32_options(True)


def save_shards(content: State, file: Path) -> None:
    """An index of safetensors, and two of them beside it."""
    names = list(content)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, some in shards.items():
        safetensors.torch.save_file({name: content[name] for name in some}, file.parent / shard)
    listed = {name: shard for shard, some in shards.items() for name in some}
    file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A way in which people have checkpoints.

    Attributes:
        content: of a state dict.
        save: how the content is written.
        name: of the file.
        network: whose state it is.
        told: a part of what is logged.
        within: how far the logits may differ from those of the network, relative to the largest.
    """

    content: Callable[[State], Any] = OrderedDict
    save: Callable[[Any, Path], None] = save
    name: str = "x.pth"
    network: Callable[[], nn.Module] = smp_network
    told: str = ""
    within: float = 1e-4


SHAPES: dict[str, Shape] = {
    "mmengine": Shape(content=mmengine, network=mmseg_network, told="class names of the metadata"),
    "mmengine-ema": Shape(
        content=mmengine_ema, network=mmseg_network, told="under state_dict are taken, of state_dict, ema_state_dict"
    ),
    "mmcv-ema": Shape(
        content=mmcv_ema, network=mmseg_network, save=save_stream, told="named ema_... are a second copy"
    ),
    "lightning": Shape(content=lightning, name="x.ckpt"),
    "lightning-compiled": Shape(content=lambda state: lightning(state, "model._orig_mod."), name="x.ckpt"),
    "ddp-compiled": Shape(content=lambda state: {"state_dict": prefixed(state, "module._orig_mod.")}),
    "compiled-ddp": Shape(content=lambda state: {"model": {"state_dict": prefixed(state, "_orig_mod.module.")}}),
    "compiled-encoder": Shape(
        content=lambda state: {name.replace("encoder.", "encoder._orig_mod."): value for name, value in state.items()}
    ),
    "timm-ema": Shape(content=timm, told="under state_dict_ema are taken, of state_dict_ema, state_dict"),
    "torchvision-ema": Shape(content=torchvision, told="under model_ema are taken, of model_ema, model"),
    "ema": Shape(
        content=lambda state: {"state_dict": other(state), "ema_state_dict": state},
        told="under ema_state_dict are taken, of ema_state_dict, state_dict",
    ),
    "half": Shape(content=lambda state: {name: value.half() for name, value in state.items()}, within=1e-2),
    "protocol-5": Shape(save=lambda content, file: torch.save(content, file, pickle_protocol=5)),
    "no-sums": Shape(save=save_without_sums),
    "stream": Shape(save=save_stream),
    "tar": Shape(save=save_tar),
    "safetensors": Shape(
        save=lambda content, file: safetensors.torch.save_file(dict(content), file), name="x.safetensors"
    ),
    "shards": Shape(save=save_shards, name="model.safetensors.index.json"),
}

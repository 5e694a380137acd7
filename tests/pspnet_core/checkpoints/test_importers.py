"""Checkpoints of other projects: the logits of their own networks, and what is told of files that do not fit."""

from __future__ import annotations

import functools
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from pspnet_core.checkpoints.importers import IMPORTERS, Imported, import_checkpoint
from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import ADE20K, CITYSCAPES, CLASS_TABLES, ClassTable
from pspnet_core.network.pspnet import IMAGENET_MEAN, IMAGENET_STD, PSPNet, PSPNetConfig
from tests.support.networks import random_images
from tests.support.public_models import (
    RESNET18,
    RESNET50,
    MmsegPSPNet,
    SemsegPSPNet,
    SmpPSPNet,
    TorchvisionResNet,
    deep_stem,
    randomise,
)

State = dict[str, Tensor]
MEAN, STD = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))


@functools.cache
def small() -> nn.Module:
    """The smallest network of all, 5 classes, without the stages that it does not use. Not to be changed."""
    network = drawn(lambda: SmpPSPNet(5, width=32))
    del network.encoder.layer3, network.encoder.layer4  # type: ignore[union-attr]
    return network


@functools.cache
def mmseg() -> nn.Module:
    return drawn(lambda: MmsegPSPNet(5))


def changed(network: nn.Module, values: dict[str, Tensor | None]) -> State:
    """Its state with some entries replaced or added, those given as None removed."""
    state = {**network.state_dict(), **values}
    return {name: value for name, value in state.items() if value is not None}


def imported(content: object, folder: Path, **arguments: Any) -> Imported:
    file = folder / "source.pth"
    torch.save(content, file)
    try:
        return import_checkpoint(file, **arguments)
    finally:
        file.unlink()  # pytest keeps the folders of its last runs


def built(found: Imported) -> PSPNet:
    with torch.device("meta"):  # initialising what is replaced takes longer than all the rest
        model = PSPNet(found.config)
    model.load_state_dict(found.weights, assign=True)
    return model.eval()


def drawn(build: Callable[[], nn.Module]) -> nn.Module:
    """A network of another project with random weights."""
    with torch.device("meta"):
        network = build()
    return randomise(network.to_empty(device="cpu"))


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


OLD = "model = dict(backbone=dict({}), decode_head=dict(type='PSPHead', align_corners={}, pool_scales={}))"
STANDARD = "dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1), contract_dilation=True"
FULL = STANDARD.replace("True", "False")
STRIDE_16 = "dilations=(1, 1, 1, 2), strides=(1, 2, 2, 1), contract_dilation=True"
STRIDE_32 = "dilations=(1, 1, 1, 1), strides=(1, 2, 2, 2)"
D32 = "dilations=(1, 1, 2, 4), strides=(1, 2, 2, 2), contract_dilation=True"
PAPER = (1, 2, 3, 6)


def mm(text: str = STANDARD, align: bool = False, bins: tuple[int, ...] = PAPER) -> dict[str, Any]:
    return {"meta": {"config": OLD.format(text, align, bins)}}


Case = tuple[Callable[[], nn.Module], dict[str, Any], tuple[int, int]]
CASES: dict[str, Case] = {
    "semseg": (lambda: SemsegPSPNet(6), {"epoch": 1}, (65, 73)),
    "mmseg-V1b": (lambda: MmsegPSPNet(6, "V1b"), {}, (65, 65)),
    "mmseg-V1c-aligned": (lambda: MmsegPSPNet(6, "V1c", align=True), mm(align=True), (97, 129)),
    "mmseg-V1d": (lambda: MmsegPSPNet(6, "V1d"), mm(), (66, 87)),
    "mmseg-V1d-50": (lambda: MmsegPSPNet(6, "V1d", RESNET50), mm(), (41, 50)),
    "mmseg-full": (lambda: MmsegPSPNet(6, contract=False), mm(FULL), (65, 72)),
    "mmseg-16": (lambda: MmsegPSPNet(6, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)), mm(STRIDE_16), (97, 101)),
    "mmseg-d32": (lambda: MmsegPSPNet(6, strides=(1, 2, 2, 2)), mm(D32), (129, 97)),
    "mmseg-32": (lambda: MmsegPSPNet(6, strides=(1, 2, 2, 2), dilations=(1,) * 4), mm(STRIDE_32), (97, 129)),
    "mmseg-bins": (lambda: MmsegPSPNet(6, bins=(1, 4, 5)), mm(bins=(1, 4, 5)), (65, 90)),
    "mmseg-no-auxiliary": (lambda: MmsegPSPNet(6, auxiliary=False), mm(), (65, 65)),
    "smp": (lambda: SmpPSPNet(6), {}, (72, 96)),
    "smp-depth-4": (lambda: SmpPSPNet(6, depth=4), {}, (96, 80)),
    "smp-depth-5": (lambda: SmpPSPNet(6, depth=5, width=64), {}, (96, 128)),
    "smp-50": (lambda: SmpPSPNet(6, RESNET50, width=128), {}, (64, 104)),
}

# Beside what every case shows: six classes, and an auxiliary head unless there is none.
FIELDS: dict[str, dict[str, Any]] = {
    "semseg": {"backbone": "resnet50", "stem": "deep", "dilation": "full", "align_corners": True}
    | {"bin_width": 512, "fusion_width": 512, "auxiliary_width": 256},
    "mmseg-V1d": {"backbone": "resnet18", "stem": "deep32", "avg_down": True}
    | {"bin_width": 128, "fusion_width": 128, "auxiliary_width": 64},
    "smp": {"backbone": "resnet18", "stages": 2, "bin_width": 32, "biased_bins": (1,), "fusion_width": 512}
    | {"fusion_kernel": 1, "fusion_order": "feature_last", "classifier_kernel": 3}
    | {"align_corners": True, "dropout": 0.2, "auxiliary": False},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_source(case: str, tmp_path: Path) -> None:
    build, around, size = CASES[case]
    network = drawn(build)
    found = imported({"state_dict": network.state_dict(), **around}, tmp_path)
    assert case not in FIELDS or found.config == PSPNetConfig(classes=6, **FIELDS[case])
    images = random_images(1, *size)
    with torch.no_grad():
        ours, theirs = built(found)(images), network((images - MEAN) / STD)
    assert difference(ours.main, theirs[0]) < 1e-4
    assert (ours.aux is None) == (theirs[1] is None)
    if ours.aux is not None:
        assert difference(ours.aux, theirs[1]) < 1e-4


def test_what_leaves_no_trace_in_the_weights_matters(tmp_path: Path) -> None:
    """Else the comparison above would prove little."""
    images = random_images(1, 65, 97)
    wrong = {"align_corners": True, "dilation": "full", "bins": (1, 2, 3, 5), "output_stride": 16, "std": (60.0,) * 3}
    with torch.no_grad():
        theirs = mmseg()((images - MEAN) / STD)[0]
        for field, value in wrong.items():
            found = imported(mmseg().state_dict(), tmp_path, overrides={field: value})
            assert difference(built(found)(images).main, theirs) > 1e-2, field


def test_other_bands_are_scaled_to_0_and_1(tmp_path: Path) -> None:
    network = drawn(lambda: SmpPSPNet(6, bands=5, width=32))
    found = imported(network.state_dict(), tmp_path)
    images = random_images(1, 64, 72, bands=5)
    with torch.no_grad():
        assert difference(built(found)(images).main, network(images / 255)[0]) < 1e-4
    given = imported(network.state_dict(), tmp_path, overrides={"mean": (9.0,) * 5, "std": (7.0,) * 5})
    with torch.no_grad():
        assert difference(built(given)(images).main, network((images - 9.0) / 7)[0]) < 1e-4


def _prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def _trained(state: State) -> object:
    return {"epoch": 3, "state_dict": _prefixed(state, "module."), "optimizer": {"state": {}, "param_groups": [{}]}}


def _parameters(state: State) -> object:
    return {name: nn.Parameter(value) if value.is_floating_point() else value for name, value in state.items()}


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (safetensors.torch.save_file, "x.safetensors"),
        (lambda state, file: torch.save(state, file, _use_new_zipfile_serialization=False), "x.pth"),
        (lambda state, file: torch.save(_trained(state), file), "x.pth"),
        (lambda state, file: torch.save({"state_dict": _prefixed(state, "model._orig_mod.")}, file), "x.ckpt"),
        (lambda state, file: torch.save({"model": {"state_dict": state}, "step": 4}, file), "x.pth"),
        (lambda state, file: torch.save(_parameters(state), file), "x.pth"),
    ],
)
def test_the_wrapping_does_not_matter(write: Callable[[State, Path], None], name: str, tmp_path: Path) -> None:
    plain = imported(small().state_dict(), tmp_path)
    write(small().state_dict(), tmp_path / name)
    wrapped = import_checkpoint(tmp_path / name)
    assert wrapped.kind == plain.kind == "segmentation_models"
    assert wrapped.config == plain.config
    assert sorted(wrapped.leftover) == sorted(plain.leftover)
    for key, value in plain.weights.items():
        assert not wrapped.weights[key].requires_grad
        assert torch.equal(value, wrapped.weights[key])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in small().state_dict().items()
    }
    found = imported(state, tmp_path).weights
    assert found["fusion.0.weight"].dtype == torch.float32
    assert torch.equal(found["fusion.0.weight"], state["decoder.conv.0.weight"].float())
    assert found["backbone.bn1.num_batches_tracked"].dtype == torch.int64
    assert found["backbone.bn1.num_batches_tracked"] == 7


def test_weights_that_share_memory_are_taken_apart(tmp_path: Path) -> None:
    state = small().state_dict()
    flat = torch.cat([value.flatten() for value in state.values() if value.is_floating_point()])
    start = 0
    for name, value in state.items():
        if value.is_floating_point():
            state[name] = flat[start : start + value.numel()].view(value.shape)
            start += value.numel()
    weights = imported(state, tmp_path).weights
    safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")  # refuses tensors of one memory


def test_counts_that_old_versions_of_torch_did_not_keep_are_zero(tmp_path: Path) -> None:
    state = {name: value for name, value in small().state_dict().items() if not name.endswith("num_batches_tracked")}
    weights = imported(state, tmp_path).weights
    assert weights["backbone.bn1.num_batches_tracked"] == 0


class Marker:
    """Unpickling it for real would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_pickle_is_executed(tmp_path: Path) -> None:
    made = tmp_path / "made"
    imported({"state_dict": small().state_dict(), "meta": Marker(made)}, tmp_path)
    told = (
        r"^source=theirs: holds an object of posix\.mkdir; its first keys: none; where it was made, save its state_dict"
    )
    with pytest.raises(ConfigError, match=told):
        imported(Marker(made), tmp_path, source="theirs")
    assert not made.exists()
    pickle.loads(pickle.dumps(Marker(made)))  # what the file could have done
    assert made.exists()


def _write_half(file: Path) -> None:
    torch.save(small().state_dict(), file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _write_script(file: Path) -> None:
    with torch.no_grad():
        torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(file))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("write", "remedy"),
    [
        (lambda file: file.write_text("hello world, not weights"), "no file of weights, or a damaged one"),
        (_write_half, "no file of weights, or a damaged one"),
        (_write_script, "holds a TorchScript program; where it was made"),
        (lambda file: file.write_bytes(pickle.dumps({"a": [1, 2]})), "no file of weights, or a damaged one"),
        (Path.mkdir, "cannot be read"),
        (lambda file: None, "cannot be read \\(No such file or directory\\)"),
        (lambda file: torch.save([torch.ones(1)], file), "holds no weights by name; its first keys: none"),
        (lambda file: torch.save({"epoch": 1, "lr": 0.1}, file), "holds no weights by name; its first keys: epoch, lr"),
        (lambda file: torch.save({"state_dict": {}}, file), "holds no weights by name"),
        (lambda file: torch.save({"a.b": torch.ones(1), "module.a.b": torch.ones(1)}, file), "several networks"),
    ],
)
def test_a_file_that_is_none_of_weights(write: Callable[[Path], object], remedy: str, tmp_path: Path) -> None:
    file = tmp_path / "source.pth"
    write(file)
    with pytest.raises(ConfigError, match=remedy) as raised:
        import_checkpoint(file)
    assert (raised.value.field, raised.value.value) == ("source", str(file))
    assert "\n" not in str(raised.value)


def test_a_damaged_safetensors_file(tmp_path: Path) -> None:
    file = tmp_path / "source.safetensors"
    file.write_text("garbage")
    with pytest.raises(ConfigError, match="is no file of weights, or a damaged one"):
        import_checkpoint(file)


def test_an_unknown_checkpoint_shows_its_first_keys(tmp_path: Path) -> None:
    state = {f"layer{index}.weight": torch.ones(1) for index in range(9)}
    with pytest.raises(ConfigError) as raised:
        imported(state, tmp_path)
    for part in ("semseg, mmsegmentation, segmentation_models, torchvision", "layer0.weight, layer1.weight"):
        assert part in raised.value.remedy
    assert "layer6.weight" not in raised.value.remedy


BIAS, ONE = torch.zeros(32), torch.ones(1)
OTHERS: list[tuple[Callable[[], nn.Module], dict[str, Tensor | None], str]] = [
    (small, {"decoder.conv.0.weight": None}, "weights=fusion.0.weight: the source has nothing for it"),
    (small, {"decoder.conv.1.running_var": None}, "weights=fusion.1.running_var: the source has nothing for it"),
    (small, {"encoder.layer2.1.bn2.bias": None}, "weights=backbone.layer2.1.bn2.bias: the source has nothing for it"),
    (  # a grouped convolution
        small,
        {"encoder.layer1.0.conv2.weight": torch.ones(64, 8, 3, 3)},
        "weights=backbone.layer1.0.conv2.weight: (64, 8, 3, 3) in the source, (64, 64, 3, 3) in a PSPNet with resnet18",
    ),
    (small, {"decoder.conv.0.bias": BIAS}, "weights=decoder.conv.0.bias: a PSPNet of segmentation_models has no such"),
    (
        small,
        {"segmentation_head.0.weight": torch.ones(5, 32)},
        "weights=decoder.1.weight: (5, 32) in the source: no convolution's kernel",
    ),
    (small, {"segmentation_head.0.weight": torch.ones(1, 32, 3, 3), "segmentation_head.0.bias": ONE}, "classes=1: "),
    (small, {"encoder.layer1.2.conv1.weight": torch.ones(64, 64, 3, 3)}, "backbone=[3, 2, 0, 0]: no ResNet of so many"),
    (
        small,
        {"decoder.psp.blocks.0.pool.1.0.weight": torch.ones(32, 100, 1, 1)},
        "weights=pyramid.stages.0.0.weight: no stage of resnet18 has 100 channels",
    ),
    (small, {"decoder.conv.1.weight": torch.ones(32, dtype=torch.int8)}, "weights=fusion.1.weight: torch.int8 in the"),
    (mmseg, {"backbone.stem.3.weight": torch.ones(48, 32, 3, 3)}, "stem=(32, 48, 64): no stem of these widths"),
    # UPerNet has a pyramid as well, FastFCN an upsampling neck.
    (mmseg, {"decode_head.lateral_convs.0.weight": ONE}, "weights=decode_head.lateral_convs.0.weight: a PSPNet of"),
    (mmseg, {"neck.conv.weight": ONE}, "weights=neck.conv.weight: a PSPNet of mmsegmentation has no such weight"),
    (mmseg, {"auxiliary_head.convs.1.conv.weight": ONE}, "weights=auxiliary_head.convs.1.conv.weight: a PSPNet of"),
    (
        mmseg,
        {"decode_head.psp_modules.4.1.conv.weight": torch.ones(128, 512, 1, 1)},
        "bins=(1, 2, 3, 6): the network has 5",
    ),
]


@pytest.mark.parametrize(("base", "changes", "told"), OTHERS, ids=[told for _, _, told in OTHERS])
def test_another_network_is_told_in_one_line(
    base: Callable[[], nn.Module], changes: dict[str, Tensor | None], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(told)}"):
        imported(changed(base(), changes), tmp_path)


@pytest.mark.parametrize("field", ["mean", "std"])
def test_preprocessing_must_have_as_many_numbers_as_bands(field: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes 3 bands; give as many numbers"):
        imported(small().state_dict(), tmp_path, overrides={field: (1.0, 2.0)})


def test_what_the_network_does_not_use_is_left_over(tmp_path: Path) -> None:
    extra: dict[str, Tensor | None] = {"mean": torch.ones(3), "criterion.weight": torch.ones(5)}
    network = drawn(lambda: SmpPSPNet(5))
    found = imported(changed(network, extra), tmp_path)
    unused = {name for name in network.state_dict() if name.startswith(("encoder.layer3", "encoder.layer4"))}
    assert len(unused) == 60
    assert set(found.leftover) == unused | set(extra)
    assert imported(mmseg().state_dict(), tmp_path).leftover == ()


NAMES = ("a", "b", "c", "d", "e")
COLOURS = [[index, 0, 255] for index in range(5)]


@pytest.mark.parametrize(
    ("meta", "names", "colours"),
    [
        ({"CLASSES": NAMES, "PALETTE": COLOURS}, NAMES, COLOURS),
        ({"CLASSES": NAMES}, NAMES, None),
        ({"CLASSES": NAMES, "PALETTE": COLOURS[:3]}, NAMES, None),
        ({"CLASSES": NAMES[:3], "PALETTE": COLOURS[:3]}, tuple(f"class_{index}" for index in range(5)), None),
        ({}, tuple(f"class_{index}" for index in range(5)), None),
    ],
)
def test_names_and_colours_of_the_metadata(
    meta: dict[str, Any], names: tuple[str, ...], colours: list[list[int]] | None, tmp_path: Path
) -> None:
    table = imported({"meta": meta, "state_dict": mmseg().state_dict()}, tmp_path).classes
    assert table.names == names
    assert table.ignore == 255
    if colours is not None:
        assert [list(colour) for colour in table.colors] == colours
    assert len(set(table.colors)) == 5


@pytest.mark.parametrize(
    ("count", "table"), [(11, "camvid"), (19, "cityscapes"), (21, "voc2012"), (150, "ade20k"), (171, "coco-stuff-164k")]
)
def test_without_names_the_built_in_table_of_as_many_is_taken(
    count: int, table: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert imported(with_classes(count), tmp_path).classes == CLASS_TABLES[table]
    assert f"those of {table} assumed" in caplog.text


def with_classes(count: int) -> State:
    names = ("segmentation_head.0.weight", "segmentation_head.0.bias")
    return small().state_dict() | dict(zip(names, (torch.ones(count, 32, 3, 3), torch.ones(count)), strict=True))


def test_many_classes_without_names(tmp_path: Path) -> None:
    table = imported(with_classes(300), tmp_path).classes
    assert (len(table), table.names[299], table.ignore) == (300, "class_299", 65535)


def test_classes_that_are_given_are_taken(tmp_path: Path) -> None:
    table = ClassTable(names=NAMES, colors=((1, 2, 3),) * 5, ignore=77)
    meta = {"CLASSES": ("v", "w", "x", "y", "z")}
    assert imported({"meta": meta, "state_dict": mmseg().state_dict()}, tmp_path, classes=table).classes == table


def _deep(spelling: str) -> State:
    """The backbone of torchvision with three 3x3 convolutions first, in the spelling of another project."""
    state = drawn(lambda: TorchvisionResNet(RESNET18)).state_dict()
    stem = randomise(nn.Sequential(*deep_stem(3, (32, 32, 64)))).state_dict()
    body = {name: value for name, value in state.items() if name.startswith("layer")}
    if spelling == "mmpretrain":
        prefixed = {f"backbone.{name}": value for name, value in body.items()}
        return prefixed | {f"backbone.stem.{name}": value for name, value in stem.items()} | {"head.fc.bias": BIAS}
    if spelling == "mmcv":
        return body | {f"stem.{name}": value for name, value in stem.items()}
    names = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}
    if spelling == "timm":
        names = {index: f"conv1.{index}" for index in "01346"} | {"7": "bn1"}
    return body | {f"{names[name[0]]}{name[1:]}": value for name, value in stem.items()} | {"fc.bias": BIAS}


@pytest.mark.parametrize(
    ("spelling", "leftover"),
    [("mmpretrain", ("head.fc.bias",)), ("mmcv", ()), ("semseg", ("fc.bias",)), ("timm", ("fc.bias",))],
)
def test_a_deep_stem_in_every_spelling(spelling: str, leftover: tuple[str, ...], tmp_path: Path) -> None:
    found = imported(_deep(spelling), tmp_path)
    stem = randomise(nn.Sequential(*deep_stem(3, (32, 32, 64)))).state_dict()
    assert (found.kind, found.config.stem, found.leftover) == ("torchvision", "deep32", leftover)
    for name, value in stem.items():
        ours = f"backbone.bn1{name[1:]}" if name.startswith("7") else f"backbone.conv1.{name}"
        assert torch.equal(found.weights[ours], value)


def test_a_bare_backbone_gets_a_fresh_head_always_the_same(tmp_path: Path) -> None:
    network = drawn(lambda: TorchvisionResNet(RESNET18))
    before = torch.get_rng_state()
    first, second = (imported(network.state_dict(), tmp_path) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert first.kind == "torchvision"
    assert first.config == PSPNetConfig(classes=150, backbone="resnet18")
    assert first.classes == ADE20K
    assert first.leftover == ("fc.weight", "fc.bias")
    for name, value in first.weights.items():
        theirs = network.state_dict().get(name.removeprefix("backbone."))
        assert torch.equal(value, second.weights[name] if theirs is None else theirs)
    assert first.weights["decoder.1.weight"].std() > 0
    assert built(first)(random_images(1, 33, 40)).main.isfinite().all()


def test_a_bare_backbone_takes_the_classes_that_are_given(tmp_path: Path) -> None:
    found = imported(drawn(lambda: TorchvisionResNet(RESNET18)).state_dict(), tmp_path, classes=CITYSCAPES)
    assert (found.config.classes, found.classes) == (19, CITYSCAPES)


def test_a_backbone_with_another_head_is_not_taken_for_a_bare_one(tmp_path: Path) -> None:
    state = {f"backbone.{name}": value for name, value in _deep("mmcv").items()}
    with pytest.raises(ConfigError, match="is none of"):
        imported(state | {"classifier.0.weight": torch.ones(1)}, tmp_path)
    with pytest.raises(ConfigError, match="is none of"):
        imported({"fc.weight": torch.ones(1), "fc.bias": torch.ones(1)}, tmp_path)


@pytest.mark.parametrize("importer", IMPORTERS, ids=lambda importer: importer.kind)
def test_sources_do_not_take_each_others_files(importer: Any) -> None:
    with torch.device("meta"):
        states = {
            "semseg": SemsegPSPNet(3).state_dict(),
            "mmsegmentation": MmsegPSPNet(3).state_dict(),
            "segmentation_models": SmpPSPNet(3).state_dict(),
        }
        ours = PSPNet(PSPNetConfig(classes=2, backbone="resnet18")).state_dict()
    assert [kind for kind in states if importer.recognises(states[kind])] == [k for k in states if k == importer.kind]
    assert not importer.recognises(ours.keys())

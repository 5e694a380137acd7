"""Training that starts from a PSPNet of any project: before the first step it is that network, to the last logit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines.demo.scenes import SCENE_CLASSES
from pipelines.training.config import TrainConfig
from pipelines.training.initial_weights import NetworkConfig, read_initial_weights
from pipelines.training.loading import Rank
from pipelines.training.resume import RECORD, RunRecord, check_resumable
from pipelines.training.setup import Setup
from pipelines.training.trainer import Trainer
from pspnet_core.checkpoints.checkpoint import Checkpoint
from pspnet_core.checkpoints.importers import IMPORTERS, import_checkpoint
from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import ClassTable
from pspnet_core.network.pspnet import IMAGENET_MEAN, IMAGENET_STD, PSPNet, PSPNetConfig
from tests.support.public_models import RESNET18, MmsegPSPNet, SemsegPSPNet, SmpPSPNet, TorchvisionResNet, randomise
from tests.support.setups import config_of, setup_of

CLASSES = len(SCENE_CLASSES)
CPU = torch.device("cpu")
FULL_16 = """model = dict(backbone=dict(dilations=(1, 1, 1, 2), strides=(1, 2, 2, 1), contract_dilation=False),
    decode_head=dict(type='PSPHead', align_corners=True, pool_scales=(1, 4, 5)))
img_norm_cfg = dict(mean=[110.0, 120.0, 130.0], std=[50.0, 60.0, 70.0], to_rgb=True)"""
STRIDE_16: dict[str, Any] = {"strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2)}

Build = Callable[[], nn.Module]
WHOLE: dict[str, tuple[Build, dict[str, Any], int]] = {
    "semseg": (lambda: SemsegPSPNet(CLASSES), {}, 65),
    "mmsegmentation": (lambda: MmsegPSPNet(CLASSES), {}, 70),
    "mmsegmentation-changed": (
        lambda: MmsegPSPNet(CLASSES, "V1d", bins=(1, 4, 5), align=True, contract=False, auxiliary=False, **STRIDE_16),
        {"meta": {"config": FULL_16}},
        97,
    ),
    "segmentation_models": (lambda: SmpPSPNet(CLASSES, width=32), {}, 72),
    "segmentation_models-deep": (lambda: SmpPSPNet(CLASSES, depth=5, width=32), {}, 96),
}
"""Networks, what their files hold beside the weights, and a side that they take."""


def config(data: Path, **flags: Any) -> TrainConfig:
    return config_of(data, **{"crop": 193, "batch": 4} | flags)


def begun(data: Path, file: Path, **flags: Any) -> Setup:
    return setup_of(config(data, init=str(file), **flags))


def drawn(build: Build) -> nn.Module:
    """A network of another project with random weights."""
    with torch.device("meta"):  # initialising what is replaced takes longer than all the rest
        network = build()
    return randomise(network.to_empty(device="cpu"))


def saved(network: nn.Module, folder: Path, **content: Any) -> Path:
    torch.save({"state_dict": network.state_dict()} | content, folder / "theirs.pth")
    return folder / "theirs.pth"


def pixels(side: int) -> Tensor:
    return torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(side))


@torch.no_grad()
def assert_same_logits(loop: Setup, theirs: nn.Module, side: int) -> None:
    model = Trainer(loop, Rank(), CPU).model.eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (loop.network.mean, loop.network.std))
    expected, auxiliary = theirs((pixels(side) - mean) / std)
    found = model(pixels(side))
    for ours, wanted in ((found.main, expected), (found.aux, auxiliary)):
        if wanted is not None:
            assert ours.shape == wanted.shape
            assert (ours - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_every_project_with_whole_networks_is_started_from() -> None:
    kinds = {importer.kind for importer in IMPORTERS if not importer.backbone_only}
    assert kinds == {name.partition("-")[0] for name in WHOLE}


@pytest.mark.parametrize("name", WHOLE)
def test_the_network_is_what_its_weights_were_made_for(name: str, data: Path, tmp_path: Path) -> None:
    build, content, side = WHOLE[name]
    theirs = drawn(build)
    loop = begun(data, saved(theirs, tmp_path, **content))
    assert_same_logits(loop, theirs, side)
    changed = ((110.0, 120.0, 130.0), (50.0, 60.0, 70.0))
    normalised = changed if name == "mmsegmentation-changed" else (IMAGENET_MEAN, IMAGENET_STD)
    assert (loop.network.mean, loop.network.std) == normalised
    # Crops are padded with what the network takes for the mean, and its head for training is there whatever theirs was.
    assert loop.crops.mean == loop.network.mean
    assert loop.network.auxiliary
    # What is said of the run names the network as it is.
    settled = loop.config.network
    found = (settled.backbone, settled.stem, settled.output_stride, settled.bins)
    assert found == (loop.network.backbone, loop.network.stem, loop.network.output_stride, loop.network.bins)


def test_other_classes_leave_the_rest_of_the_network_as_it_was(data: Path, tmp_path: Path) -> None:
    file = saved(drawn(lambda: SmpPSPNet(CLASSES + 3, width=32)), tmp_path)
    loop = begun(data, file)
    theirs = import_checkpoint(file).config
    own = {"classes": CLASSES, "auxiliary": True, "dropout": 0.1}
    assert loop.network == dataclasses.replace(theirs, **own)  # type: ignore[arg-type]


def test_flags_that_do_not_fit_the_weights_are_refused(data: Path, tmp_path: Path) -> None:
    file = saved(drawn(lambda: MmsegPSPNet(CLASSES)), tmp_path)
    with pytest.raises(ConfigError, match=r"^init=.*: its backbone resnet18 differs; .* or leave out --backbone$"):
        begun(data, file, backbone="resnet50")
    with pytest.raises(ConfigError, match=r"^init=.*: its stem deep32 differs; .* or leave out --stem$"):
        begun(data, file, stem="plain")
    assert begun(data, file, backbone="resnet18", stem="deep32").network.stem == "deep32"
    with pytest.raises(ConfigError, match=r"^bins=1,2,3,6: .* --crop 40 at --output-stride 8 has 5x5 cells"):
        begun(data, file, crop=40)


def test_flags_that_weights_allow_are_taken_with_a_warning(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = saved(drawn(lambda: MmsegPSPNet(CLASSES, bins=(1, 2, 4))), tmp_path)
    with pytest.raises(ConfigError, match=r"^init=.*: the network has 3 grids; give their sizes with --bins"):
        begun(data, file)
    network = begun(data, file, bins=(1, 2, 4), output_stride=16).network
    assert (network.bins, network.output_stride) == ((1, 2, 4), 16)
    (warning,) = [line for line in caplog.messages if line.startswith("the network of ")]
    assert warning.endswith("differs from the one to train: it has output_stride 8")


def test_images_of_other_bands_are_refused(data: Path, tmp_path: Path) -> None:
    file = saved(drawn(lambda: SmpPSPNet(CLASSES, bands=4, width=32)), tmp_path)
    with pytest.raises(ConfigError, match=r"^init=.*: takes 4 bands; image files are read as 3, RGB$"):
        begun(data, file)


def test_a_bare_backbone_brings_its_layers_and_nothing_else(data: Path, tmp_path: Path) -> None:
    theirs = drawn(lambda: TorchvisionResNet(RESNET18)).state_dict()
    torch.save(theirs, tmp_path / "theirs.pth")
    loop = begun(data, tmp_path / "theirs.pth", output_stride=16)
    assert loop.network == NetworkConfig(backbone="resnet18", output_stride=16).resolve(CLASSES)
    own = Trainer(loop, Rank(), CPU).model.backbone.state_dict()
    assert all(tensor.equal(theirs[name]) for name, tensor in own.items())


@pytest.mark.parametrize("auxiliary", [True, False])
def test_other_classes_take_all_weights_but_the_classifiers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, auxiliary: bool
) -> None:
    config = PSPNetConfig(classes=3, backbone="resnet18", output_stride=32, bins=(1, 2), auxiliary=auxiliary)
    names = [f"class {index}" for index in range(3)]
    given = Checkpoint.from_model(PSPNet(config), name="three", classes=ClassTable.from_json({"names": names}))
    given.save(tmp_path / "three")
    start, wanted = read_initial_weights(str(tmp_path / "three")), dataclasses.replace(config, classes=7)
    with caplog.at_level("INFO", "pipelines.training.initial_weights"):
        found = start.state(wanted, seed=1)
    fresh = {name for name, tensor in given.weights.items() if tensor.shape[:1] == (3,) and tensor.ndim in (1, 4)}
    assert fresh == {name for name in found if name.startswith(("decoder.1.", "auxiliary.4."))}
    assert len(fresh) == (4 if auxiliary else 2)
    assert all(found[name].shape == (7, *given.weights[name].shape[1:]) for name in fresh)
    assert all(found[name].equal(tensor) for name, tensor in given.weights.items() if name not in fresh)
    PSPNet(wanted).load_state_dict(found)
    (line,) = caplog.messages
    assert "but for the classifiers (it has 3 classes, the data 7): " in line
    assert all(name in line for name in fresh)
    # The seed draws them.
    again, other = (start.state(wanted, seed=seed) for seed in (1, 2))
    assert all(again[name].equal(tensor) for name, tensor in found.items())
    assert not other["decoder.1.weight"].equal(found["decoder.1.weight"])
    # Another network is refused all the same, and named where its weights would fit.
    caplog.clear()
    start.state(dataclasses.replace(config, align_corners=True))
    assert caplog.messages == [
        f"the network of {tmp_path / 'three'} differs from the one to train: it has align_corners False"
    ]
    with pytest.raises(ConfigError, match="differs; start from the same backbone"):
        start.state(dataclasses.replace(wanted, backbone="resnet34"))


def test_a_run_goes_on_only_with_the_network_that_it_began_with(data: Path, tmp_path: Path) -> None:
    """The weights of its checkpoint would fit; what they compute would be something else from that step on."""
    flags = {"backbone": "resnet18", "stem": "deep32"}
    given = begun(data, saved(drawn(lambda: MmsegPSPNet(CLASSES)), tmp_path), **flags)
    before, now = (RunRecord.of(setup, "0") for setup in (setup_of(config(data, **flags)), given))
    check_resumable(RECORD.validate_json(RECORD.dump_json(before)), before, init=None)
    with pytest.raises(ConfigError, match=r"^init=.*: the run to resume has another network; give the --init that"):
        check_resumable(before, now, init="theirs.pth")


def test_the_record_of_a_run_keeps_no_credentials(data: Path) -> None:
    given = config(data, output="s3://KEY:geheim@bucket/runs")
    setup = dataclasses.replace(setup_of(config(data)), config=given)
    written = RECORD.dump_json(RunRecord.of(setup, "0")).decode()
    assert "bucket/runs" in written
    assert "geheim" not in written


def test_what_changes_the_course_of_a_run_is_told(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {
        "seed": (0, 1),
        "train": ("train", "val"),
        "rotate": (10.0, 5.0),
        "norm": ("auto", "frozen"),
        "loss": ("cross_entropy", "dice"),
        "lr": (0.01, 0.5),
        "epochs": (100, 3),
    }
    setup = setup_of(config(data))
    other = dataclasses.replace(setup, config=config(data, **{flag: new for flag, (_, new) in changes.items()}))
    check_resumable(RunRecord.of(setup, "0"), RunRecord.of(other, "0"), init=None)
    (line,) = caplog.messages
    told = [f"--{flag} {new} (before: {old})" for flag, (old, new) in changes.items()]
    assert sorted(line.removeprefix("the run goes on in another way than it began: ").split(", ")) == sorted(told)


def test_data_that_changed_since_the_run_began_is_told(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    setup = setup_of(config(data))
    classes = dataclasses.replace(setup.dataset.classes, ignore=254)
    crops = dataclasses.replace(setup.crops, dataset=dataclasses.replace(setup.dataset, classes=classes))
    before, now = (RunRecord.of(each, "0") for each in (setup, dataclasses.replace(setup, crops=crops)))
    check_resumable(before, before, init=None)
    check_resumable(RECORD.validate_python(RECORD.dump_python(before, exclude={"content"})), now, init=None)
    assert not caplog.messages, "a record without it tells of no change"
    check_resumable(before, now, init=None)
    (line,) = caplog.messages
    assert line.endswith("since the run began, files or class table: split train and val; scores do not compare")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda names: (*names, "moon"), r"^classes=7: the run to resume has 6; give that, or another --name$"),
        (
            lambda names: (*names[:-1], "moon"),
            r"^classes=moon: class 5 of the run to resume is Person; give its",
        ),
        (lambda names: (names[1], names[0], *names[2:]), r"^classes=Building: class 0 of the run to resume is Sky; "),
    ],
    ids=["more", "others", "in another order"],
)
def test_a_resume_with_other_classes_is_refused(
    data: Path, change: Callable[[tuple[str, ...]], tuple[str, ...]], line: str
) -> None:
    setup = setup_of(config(data))
    classes = ClassTable.from_json({"names": list(change(SCENE_CLASSES.names))})
    crops = dataclasses.replace(setup.crops, dataset=dataclasses.replace(setup.dataset, classes=classes))
    network = dataclasses.replace(setup.network, classes=len(classes))
    other = dataclasses.replace(setup, crops=crops, network=network)
    with pytest.raises(ConfigError, match=line):
        check_resumable(RunRecord.of(setup, "0"), RunRecord.of(other, "0"), init=None)

"""Checkpoint folders: what goes in comes out, damage is told in one line, and the fingerprint is what it should be."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pspnet_core.checkpoints.checkpoint import FORMAT, Checkpoint, check_name, load_checkpoint
from pspnet_core.checkpoints.settings import InferenceSettings
from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import ClassTable
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig

CONFIG = PSPNetConfig(classes=2, backbone="resnet18", output_stride=32, bins=(1, 2))
SMALL = PSPNetConfig(classes=2, backbone="resnet18", stages=2, bins=(1, 2))
CLASSES = ClassTable(names=("Himmel", "Straße"), colors=((1, 2, 3), (4, 5, 6)))
SETTINGS = InferenceSettings(resize="short", size=40.0, scales=(1.0, 1.25), flip=True)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    return Checkpoint.from_model(PSPNet(SMALL), name="small", classes=CLASSES, settings=SETTINGS)


@pytest.fixture(scope="module")
def saved(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that tests read and never write."""
    folder = tmp_path_factory.mktemp("model")
    checkpoint.save(folder)
    return folder


def _tiny(**changes: Any) -> Checkpoint:
    """A checkpoint for fingerprints: two weights that fit no network."""
    weights = {"a": torch.arange(4, dtype=torch.float32).view(2, 2), "b": torch.tensor(3)}
    fields: dict[str, Any] = {"name": "tiny", "config": CONFIG, "classes": CLASSES, "weights": weights}
    return Checkpoint(**(fields | changes))


def test_everything_comes_back(checkpoint: Checkpoint, saved: Path) -> None:
    images = torch.randint(0, 256, (1, 3, 33, 47), dtype=torch.uint8)
    for folder in (saved, str(saved)):
        back = load_checkpoint(folder)
        assert (back.name, back.config, back.classes, back.settings) == ("small", SMALL, CLASSES, SETTINGS)
        assert back.weights.keys() == checkpoint.weights.keys()
        for name, value in back.weights.items():
            assert value.dtype == checkpoint.weights[name].dtype
            assert torch.equal(value, checkpoint.weights[name])
        assert back.fingerprint == checkpoint.fingerprint
        assert not back.model.training
        with torch.no_grad():
            assert torch.equal(back.model(images).main, checkpoint.model(images).main)


def test_saving_makes_the_folder_and_replaces_what_is_there(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er"
    checkpoint.save(folder)
    other = checkpoint.with_settings(resize="scale", size=1, scales=(1, 0.5))
    other.save(folder)
    assert load_checkpoint(folder).fingerprint == other.fingerprint != checkpoint.fingerprint


def test_the_folder_holds_json_and_tensors_and_nothing_to_execute(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["model.json", "weights.safetensors"]
    data = (saved / "weights.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["backbone.conv1.weight"]["shape"] == [64, 3, 7, 7]
    content = json.loads((saved / "model.json").read_text())
    assert content["format"] == FORMAT == 2
    assert content["config"]["backbone"] == "resnet18"
    assert content["inference"]["scales"] == [1.0, 1.25]


def test_loading_unpickles_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert load_checkpoint(saved).model.config == SMALL


def test_a_checkpoint_is_a_copy_of_the_model() -> None:
    model = PSPNet(SMALL)
    taken = Checkpoint.from_model(model, name="small", classes=CLASSES)
    before = {name: value.clone() for name, value in taken.weights.items()}
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
        for parameter in taken.model.parameters():
            parameter.add_(1)
    for name, value in taken.weights.items():
        assert torch.equal(value, before[name])
        assert not value.requires_grad
    assert taken.settings == InferenceSettings()


def test_the_fingerprint_is_pinned() -> None:
    """Labels are filed under it: another one, in whatever process, makes every user label everything again."""
    assert _tiny().fingerprint == "a959ef63d86a"
    assert _tiny().partition == "tiny-a959ef63d86a"


def test_what_the_fingerprint_does_not_depend_on() -> None:
    weights = _tiny().weights
    other = ClassTable(names=("sky", "road"), colors=((1, 2, 3), (4, 5, 6)))
    same = [
        _tiny(name="other"),
        _tiny(classes=other),
        _tiny(weights=dict(reversed(weights.items()))),
        _tiny(weights=weights | {"a": weights["a"].t().contiguous().t()}),
        _tiny(settings=InferenceSettings(size=0, scales=(1,), window=0)),
        _tiny(config=dataclasses.replace(CONFIG, std=cast(Any, [*CONFIG.std]))),
        _tiny().with_settings(flip=None, scales=None, window=None),
    ]
    assert not same[3].weights["a"].is_contiguous()
    assert {checkpoint.fingerprint for checkpoint in same} == {_tiny().fingerprint}


def test_what_the_fingerprint_depends_on() -> None:
    value = _tiny().weights["a"]
    least = value.clone()
    least[1, 1] = torch.nextafter(least[1, 1], torch.tensor(9.0))
    casts = [value.double(), value.bfloat16(), value.to(torch.int32), value.view(torch.int32), value.view(4)]
    weights = [_tiny().weights | {"a": other} for other in [least, *casts]]
    weights += [_tiny().weights | {"c": value}, {"a": value, "c": torch.tensor(3)}]
    configs: list[dict[str, Any]] = [{"bins": (1, 2, 3)}, {"mean": (1.0, 2.0, 3.0)}, {"align_corners": True}]
    settings: list[dict[str, Any]] = [{"flip": True}, {"scales": (1.0, 1.5)}, {"window": 64}]
    settings += [{"resize": "short", "size": 40}, {"resize": "long", "size": 40}]
    checkpoints = [_tiny(weights=each) for each in weights]
    checkpoints += [_tiny(config=dataclasses.replace(CONFIG, **each)) for each in configs]
    checkpoints += [_tiny().with_settings(**each) for each in settings]
    fingerprints = [_tiny().fingerprint, *(checkpoint.fingerprint for checkpoint in checkpoints)]
    assert len(set(fingerprints)) == len(fingerprints)
    assert all(len(value) == 12 and int(value, 16) >= 0 for value in fingerprints)


def test_overrides_change_the_inference_settings_only(checkpoint: Checkpoint) -> None:
    other = checkpoint.with_settings(window=64, flip=None)
    assert other.settings == dataclasses.replace(SETTINGS, window=64)
    assert other.weights is checkpoint.weights
    assert checkpoint.settings == SETTINGS
    with pytest.raises(ConfigError, match=r"^window=5: "):
        checkpoint.with_settings(window=5)


def test_a_checkpoint_travels_between_processes(checkpoint: Checkpoint) -> None:
    bytes_of_weights = sum(value.nbytes for value in checkpoint.weights.values())
    assert checkpoint.model.config == SMALL  # cached from here on
    data = pickle.dumps(checkpoint)
    assert len(data) < 1.1 * bytes_of_weights
    back = pickle.loads(data)
    assert back.fingerprint == checkpoint.fingerprint
    assert back.partition == checkpoint.partition
    assert back.model.state_dict().keys() == checkpoint.weights.keys()


def test_checkpoints_can_be_compared_and_kept_in_sets() -> None:
    one, other = _tiny(), _tiny()
    assert one != other
    assert len({one, other, one}) == 2


@pytest.mark.parametrize("name", ["a", "pspnet-50_v2", "x" * 64])
def test_good_names(name: str) -> None:
    assert check_name(name) == name
    assert _tiny(name=name).partition.startswith(f"{name}-")


@pytest.mark.parametrize(
    "name", ["", "1a", "-a", "_a", "A", "aB", "a.b", "a/b", "a=b", "a b", "a\n", "ä", "x" * 65, "../a"]
)
def test_names_that_cannot_be_a_partition_value(name: str) -> None:
    for refuse in (check_name, lambda value: _tiny(name=value)):
        with pytest.raises(ConfigError, match="start with a letter") as caught:
            refuse(name)
        assert caught.value.field == "name"


Damage = Callable[[Path], object]


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).unlink()  # a link to the file that all tests share
        (folder / name).write_bytes(change(data))

    return damage


def _write(name: str, data: bytes) -> Damage:
    return _rewrite(name, lambda _: data)


def _edit(change: Callable[[dict[str, Any]], object]) -> Damage:
    def edited(data: bytes) -> bytes:
        content = json.loads(data)
        change(content)
        return json.dumps(content).encode()

    return _rewrite("model.json", edited)


def _edit_weights(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def edited(data: bytes) -> bytes:
        weights = safetensors.torch.load(data)
        change(weights)
        return safetensors.torch.save(weights)

    return _rewrite("weights.safetensors", edited)


DAMAGE: dict[str, tuple[Damage, str]] = {
    "no config": (lambda folder: (folder / "model.json").unlink(), "no model.json there"),
    "no weights": (lambda folder: (folder / "weights.safetensors").unlink(), "no weights.safetensors there"),
    "config is no JSON": (_write("model.json", b'{"format": 1,'), "damaged"),
    "config is no text": (_write("model.json", b"\xff\xfe\x00"), "damaged"),
    "config is lists in lists": (_write("model.json", b"[" * 100_000), "damaged"),
    "a width of 2^62": (_edit(lambda content: content["config"].update(bin_width=2**62)), "damaged"),
    "a million grids": (
        _edit(lambda content: content["config"].update(bins=[1] * 10**6)),
        "bins=1000000: give 1 to 64",
    ),
    "config is a list": (_write("model.json", b"[1]"), "format"),
    "newer format": (_edit(lambda content: content.update(format=3)), "checkpoint format 3; this version reads 2"),
    "no format": (_edit(lambda content: content.pop("format")), "format"),
    "no name": (_edit(lambda content: content.pop("name")), "'name' is missing"),
    "bad name": (_edit(lambda content: content.update(name="A B")), "name=A B"),
    "network is a list": (_edit(lambda content: content.update(config=[])), "damaged"),
    "unknown setting": (_edit(lambda content: content["config"].update(depth=50)), "depth"),
    "wrong type": (_edit(lambda content: content["config"].update(classes="two")), "damaged"),
    "unknown stem": (_edit(lambda content: content["config"].update(stem="wide")), "stem=wide"),
    "other classes": (_edit(lambda content: content["config"].update(classes=3)), "classes=2: the network has 3"),
    "no class names": (_edit(lambda content: content["classes"].pop("names")), "classes.names"),
    "bad settings": (_edit(lambda content: content["inference"].update(scales=[])), "scales="),
    "another network": (_edit(lambda content: content["config"].update(backbone="resnet34")), "layer"),
    "empty weights": (_write("weights.safetensors", b""), "damaged"),
    "half the weights": (_rewrite("weights.safetensors", lambda data: data[: len(data) // 2]), "damaged"),
    "a weight missing": (_edit_weights(lambda weights: weights.pop("mean")), "weights=mean: absent in the file"),
    "a weight too many": (_edit_weights(lambda weights: weights.update(more=torch.zeros(2))), "weights=more: (2,)"),
    "another value": (_edit_weights(lambda weights: weights["mean"].add_(1)), "damaged checkpoint (its content is "),
    "another setting": (_edit(lambda content: content["inference"].update(flip=False)), "damaged checkpoint"),
    "a wrong shape": (_edit_weights(lambda weights: weights.update(std=torch.ones(3))), "weights=std: (3,)"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_in_one_line(kind: str, saved: Path, tmp_path: Path) -> None:
    for path in saved.iterdir():
        os.link(path, tmp_path / path.name)
    damage, expected = DAMAGE[kind]
    damage(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"model={tmp_path}: ")
    assert expected in message
    assert "\n" not in message
    assert len(message) < len(str(tmp_path)) + 250


@pytest.mark.parametrize("place", ["nowhere", "file", "file/inside"])
def test_no_folder(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"no model\.json there; give a folder that train\.py wrote"):
        load_checkpoint(tmp_path / place)


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.json").mkdir()
    with pytest.raises(ConfigError, match=r"cannot be read .*; check its permissions"):
        load_checkpoint(tmp_path)

"""What ``torch.save`` wrote, read as data: every format, every kind of tensor, and bytes that are damaged."""

from __future__ import annotations

import logging
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pspnet_core.checkpoints import weight_files
from pspnet_core.checkpoints.weight_files import read_weight_file
from pspnet_core.errors import ConfigError
from tests.support.checkpoint_shapes import classes, save, save_shards, save_stream, save_tar


def tensors() -> dict[str, Tensor]:
    """One of each kind that weights have."""
    flat, parameter = torch.arange(20.0), nn.Parameter(torch.ones(2))
    parameter.note = 3  # type: ignore[attr-defined]
    types = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
    kinds = {str(kind): torch.arange(6.0).to(kind).view(2, 3) for kind in types}
    views = {"part": flat[3:9].view(2, 3), "rest": flat[10:], "turned": flat.view(4, 5).t()}
    return {**kinds, **views, "parameter": parameter, "number": torch.tensor(7.0), "empty": torch.empty(0, 3)}


@pytest.mark.parametrize("write", [save, save_stream])
def test_every_kind_of_tensor_is_read(write: Callable[[Any, Path], None], tmp_path: Path) -> None:
    write(tensors(), tmp_path / "x.pth")
    found = read_weight_file(tmp_path / "x.pth").weights
    assert list(found) == list(tensors())
    for name, value in tensors().items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(found[name].double(), value.detach().double()), name


def test_the_first_format_is_what_torch_reads(tmp_path: Path) -> None:
    state = OrderedDict(a=torch.randn(3, 2), b=torch.tensor(4), c=torch.randn(5))
    save_tar(state, tmp_path / "x.pth")
    found, theirs = read_weight_file(tmp_path / "x.pth").weights, torch.load(tmp_path / "x.pth", weights_only=False)
    assert list(found) == list(theirs) == list(state)
    assert all(torch.equal(found[name], state[name]) and torch.equal(theirs[name], state[name]) for name in state)


class Pairs:
    """Pickles as Python 2 did an OrderedDict."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ([[name, value] for name, value in self.state.items()],)


def test_entries_as_python_2_wrote_them(tmp_path: Path) -> None:
    torch.save({"state_dict": Pairs({"a": torch.ones(2)})}, tmp_path / "x.pth")
    assert read_weight_file(tmp_path / "x.pth").weights["a"].tolist() == [1, 1]


def test_metadata_is_plain(tmp_path: Path) -> None:
    with classes("mmengine.config.config.AttributeDict", "mmengine.other.Thing") as (kind, thing):
        meta = {
            "numbers": (np.float64(0.5), np.int32(3), np.bool_(True), True, 2.5),
            "arrays": [
                np.arange(6).reshape(2, 3),
                np.asfortranarray(np.eye(2)),
                np.array(["a", "bc"]),
                np.zeros((9, 0)),
            ],
            "dict": kind(a=OrderedDict(b="c")),
            "none": [None, thing(), torch.ones(1), np.array([{}]), b"bytes", 2**70, thing],
        }
        torch.save({"meta": meta, "state_dict": {"a": torch.ones(1)}}, tmp_path / "x.pth")
    assert read_weight_file(tmp_path / "x.pth").meta == {
        "numbers": [0.5, 3, True, True, 2.5],
        "arrays": [[[0, 1, 2], [3, 4, 5]], [[1, 0], [0, 1]], ["a", "bc"], []],
        "dict": {"a": {"b": "c"}},
        "none": [None] * 7,
    }


def test_metadata_that_is_too_large_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    losses = [[0.5] * 1000] * 1000
    meta = {"before": 1, "losses": losses, "scores": losses, "config": "model = dict()" * 1000, "CLASSES": ("a", "b")}
    torch.save({"meta": meta, "state_dict": {"a": torch.ones(1)}}, tmp_path / "x.pth")
    with caplog.at_level(logging.WARNING):
        found = read_weight_file(tmp_path / "x.pth")
    assert found.weights["a"] == 1
    assert found.meta == {"before": 1, "config": meta["config"], "CLASSES": ["a", "b"]}
    assert caplog.messages == ["of the metadata 2 are too large and not read: losses, scores"]


@pytest.mark.parametrize("write", [save, save_stream])
def test_an_array_beside_the_weights_may_be_large(write: Callable[[Any, Path], None], tmp_path: Path) -> None:
    write({"state_dict": {"a": torch.ones(1)}, "scores": np.zeros(2**26 + 1, np.uint8)}, tmp_path / "x.pth")
    assert read_weight_file(tmp_path / "x.pth").weights["a"] == 1


ONES, TWOS = {"a": torch.ones(1)}, {"a": torch.full((1,), 2.0)}
PARTS: dict[str, dict[str, Any]] = {
    "settings": {"model": {"arch": "pspnet", "classes": 21}, "model_state_dict": ONES},
    "settings in parts": {"model_ema": {"state_dict": {"decay": 0.9}}, "model": {"state_dict": ONES}},
    "counters": {"model_ema": {"decay": 0.9, "updates": torch.tensor(3)}, "model": ONES},
    "a list": {"state_dict": ONES, "ema_state_dict": {"decay": 0.9, "shadow_params": [torch.ones(1)]}},
    "numbers": {"state_dict": {0: torch.ones(1)}, "model": ONES},
    "an average": {"state_dict": TWOS, "ema_state_dict": ONES},
    "mmengine in training": {"message_hub": {}, "state_dict": ONES, "ema_state_dict": TWOS},
    "mmengine": {"meta": {"mmengine_version": "0.10.4"}, "state_dict": ONES, "ema_state_dict": TWOS},
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_with_weights_is_taken(name: str, tmp_path: Path) -> None:
    torch.save(PARTS[name], tmp_path / "x.pth")
    found = read_weight_file(tmp_path / "x.pth").weights
    assert {name: value.tolist() for name, value in found.items()} == {"a": [1.0]}


@pytest.mark.parametrize("value", [torch.ones(2) * 1j, torch.ones(2, dtype=torch.cfloat)])
def test_numbers_of_another_sign_are_refused(value: Tensor, tmp_path: Path) -> None:
    for name, lazy in {"conj": value.conj(), "neg": value.conj().imag}.items():
        torch.save({name: lazy}, tmp_path / f"{name}.pth")
        with pytest.raises(ConfigError, match=r"holds a tensor whose numbers are to be negated .* after resolve_neg"):
            read_weight_file(tmp_path / f"{name}.pth")
        torch.save({name: lazy.resolve_conj().resolve_neg()}, tmp_path / f"{name}.pth")
        assert torch.equal(read_weight_file(tmp_path / f"{name}.pth").weights[name], lazy)


def test_a_key_chooses_a_copy(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}, "model_ema": {"module.a": torch.ones(1)}}, tmp_path / "x.pth")
    assert read_weight_file(tmp_path / "x.pth").weights["a"] == 1
    assert read_weight_file(tmp_path / "x.pth", key="model").weights["a"] == 0
    with pytest.raises(ConfigError, match=r"^key=ema: .* has no part of that name; its first keys: model, model_ema"):
        read_weight_file(tmp_path / "x.pth", key="ema")


def test_an_index_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_shards({"a": torch.ones(1), "b": torch.ones(2)}, tmp_path / "x.index.json")
    assert read_weight_file(tmp_path / "x.index.json").weights["b"].tolist() == [1, 1]
    monkeypatch.setattr(weight_files, "LARGEST_INDEX", 50)
    with pytest.raises(ConfigError, match="is no index of weights"):
        read_weight_file(tmp_path / "x.index.json")


def mutated(data: bytes, dice: random.Random) -> bytes:
    """A file with a few bytes changed, or a piece left out, doubled or cut off."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 5, 20))):
        place, width = dice.randrange(len(changed) + 1), dice.choice((1, 1, 1, 4, 100))
        piece = changed[place : place + width]
        new = [dice.randbytes(len(piece)), b"\xff" * len(piece), b"", piece * 2, bytes(len(piece))]
        changed[place : place + width] = dice.choice(new)
    return bytes(changed[: dice.randrange(len(changed) + 1)] if dice.random() < 0.1 else changed)


SMALL = {"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2), "steps": torch.tensor(3)}
AROUND = {"meta": {"CLASSES": ("a", "b"), "PALETTE": np.eye(3), "seed": np.int64(1)}, "lr": [0.1, {"x": {1, 2}}]}


@pytest.mark.parametrize(
    ("write", "content"),
    [(save, {"state_dict": SMALL} | AROUND), (save_stream, {"state_dict": SMALL} | AROUND), (save_tar, SMALL)],
)
def test_damage_is_one_line(write: Callable[[Any, Path], None], content: Any, tmp_path: Path) -> None:
    file, dice, read = tmp_path / "x.pth", random.Random(0), 0
    write(content, file)
    data = file.read_bytes()
    for _ in range(300):
        file.write_bytes(mutated(data, dice))
        try:
            read += bool(read_weight_file(file).weights)
        except ConfigError as error:
            assert "\n" not in str(error)
    assert 0 < read < 300

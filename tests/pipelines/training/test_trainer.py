"""A worker's steps by themselves: one process, passes and two real processes take the same step; nothing is lost."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from pipelines.demo.scenes import SCENE_CLASSES
from pipelines.storage import open_store
from pipelines.training.checkpointing import CheckpointFolder, Snapshot
from pipelines.training.loading import Batch
from pipelines.training.loop import load_batches
from pipelines.training.setup import Setup
from pipelines.training.trainer import NotFinite, Trainer
from pspnet_core.training.losses import LOSSES, pspnet_loss
from tests.support.ranks import make_trainer, take_steps
from tests.support.setups import SMALL, config_of, setup_of

IGNORE = 255


def _setup(data: Path, *, dropout: float = 0.0, **changes: Any) -> Setup:
    """Two steps an epoch of a small network, whose statistics do not depend on the batch."""
    flags = SMALL | {"norm": "frozen", "lr": 0.01, "epochs": 2, "image_scale": 0.5}
    flags |= {"precision": "float32"}  # whatever the processor is fastest in
    setup = setup_of(config_of(data, **flags | changes))
    return dataclasses.replace(setup, network=dataclasses.replace(setup.network, stages=2, dropout=dropout))


def _batch(shares: tuple[float, ...] = (0.0, 0.9, 1.0, 0.4)) -> tuple[Tensor, Tensor]:
    """Four images, and masks with these shares of ignored pixels."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (4, 3, 48, 48), dtype=np.uint8)
    masks = random.integers(0, len(SCENE_CLASSES), (4, 48, 48))
    for mask, share in zip(masks, shares, strict=True):
        mask[random.random(mask.shape) < share] = IGNORE
    return torch.from_numpy(images), torch.from_numpy(masks)


def _state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def _same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """The same way from the start, to a thousandth of its length and the rounding of what is reached."""
    for name, tensor in expected.items():
        way = (tensor.double() - start[name].double()).abs().max().item()
        assert (found[name].double() - tensor.double()).abs().max() <= 1e-3 * way + 2.4e-7 * tensor.abs().max(), name


def test_every_few_epochs_and_the_last_one_are_validated(data: Path) -> None:
    config = _setup(data, epochs=5, val_every=2)
    assert config.steps == 10
    assert [step for step in range(1, 11) if config.validates(step)] == [4, 8, 10]


@pytest.mark.parametrize(("accumulate", "balance"), [(2, 0.0), (4, 0.5)])
def test_passes_make_the_same_step(data: Path, accumulate: int, balance: float) -> None:
    """However unevenly the ignored pixels are spread over the passes."""
    whole, parts = (
        make_trainer(_setup(data, class_balance=balance, label_smoothing=0.1, accumulate=passes))
        for passes in (1, accumulate)
    )
    start = _state(whole)
    expected, found = (trainer.step(*_batch(), lr=0.1).item() for trainer in (whole, parts))
    assert found == pytest.approx(expected, rel=1e-5)
    _assert_close(_state(parts), _state(whole), start)


def test_two_processes_make_the_step_of_one(data: Path, tmp_path: Path) -> None:
    """In one pass or two. The first has two thirds of the pixels that count; the mean is over all of them."""
    config = _setup(data, class_balance=0.5)
    single = make_trainer(config)
    start = _state(single)
    images, masks = _batch()
    expected = single.step(images, masks, lr=0.1)
    configs = [config, _setup(data, class_balance=0.5, accumulate=2)]
    batches = list(zip(images.split(2), masks.split(2), strict=True))
    spawn(take_steps, (configs, batches, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for (one, first), (two, second) in zip(*ranks, strict=True):
        assert _same(first, second)
        assert one.item() == two.item() == pytest.approx(expected.item(), rel=1e-5)
        _assert_close(first, _state(single), start)


@pytest.mark.parametrize("kind", ["cross_entropy", "lovasz"])
def test_nothing_but_ignored_pixels_changes_nothing(data: Path, kind: str) -> None:
    trainer = make_trainer(_setup(data, loss=kind, weight_decay=0.0, accumulate=2, grad_clip=1.0))
    start = _state(trainer)
    loss = trainer.step(*_batch((1.0, 1.0, 1.0, 1.0)), lr=0.1)
    assert loss.item() == 0
    assert _same(_state(trainer), start)
    assert trainer.step(*_batch(), lr=0.1).isfinite()
    assert not _same(_state(trainer), start)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_is_the_chosen_one(data: Path, kind: str) -> None:
    config = _setup(data, loss=kind, ohem_min_kept=500, focal_gamma=3.0, aux_weight=0.9, class_balance=0.5)
    trainer = make_trainer(config)
    images, masks = _batch()
    with torch.no_grad():
        logits = trainer.model.train()(images)
    expected = pspnet_loss(logits, masks, ignore=IGNORE, weight=trainer.weights, config=config.config.loss)
    assert trainer.step(images, masks, lr=0.1).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_gradient_is_clipped_to_its_norm(data: Path) -> None:
    gradients = []
    for clip in (0.0, 0.01):
        trainer = make_trainer(_setup(data, grad_clip=clip))
        trainer.step(*_batch(), lr=0.1)
        slopes = [parameter.grad for parameter in trainer.model.parameters()]
        gradients.append(torch.cat([slope.flatten() for slope in slopes if slope is not None]))
    free, clipped = gradients
    assert free.norm() > 0.1
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped, free * (0.01 / free.norm()), rtol=1e-3, atol=1e-7)


def train_steps(trainer: Trainer, steps: int) -> list[float]:
    """Take the next steps of the run; returns the rate of each."""
    rates = []
    start = trainer.steps_done
    with load_batches(trainer.setup, trainer.rank, start, 1) as batches:
        for batch in itertools.islice(batches, steps):
            rates.append(trainer.lr)
            trainer.train_step(batch)
    assert trainer.steps_done == start + steps
    return rates


def through_a_folder(snapshot: Snapshot, folder: Path) -> Snapshot:
    """What is read of it after it was written."""
    checkpoints_of = CheckpointFolder(open_store(str(folder), field="output"), "run")
    checkpoints_of.write(snapshot, checkpoints_of.new(snapshot))
    found = checkpoints_of.newest()
    assert found is not None
    return found


def test_the_average_is_what_is_scored_and_saved(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(_setup(data, ema=0.9, norm="auto"))
    start = _state(trainer)
    train_steps(trainer, 2)
    assert trainer.average is not None
    average, raw = trainer.average.model.state_dict(), _state(trainer)
    model = trainer.scored_model()
    assert _same(model.weights, average)
    moved = "decoder.1.weight", "backbone.bn1.running_mean"
    for name in moved:  # between the start and the weights of now
        assert (average[name] - start[name]).norm() < (raw[name] - start[name]).norm()
        assert (average[name] - raw[name]).norm() < (raw[name] - start[name]).norm()
    found = through_a_folder(trainer.snapshot(model=model), tmp_path)
    assert _same(found.model.weights, average)
    assert found.weights is not None
    assert _same(found.weights, raw)


@pytest.mark.parametrize(
    ("steps", "changes"),
    [
        (2, {"optimiser": "sgd"}),
        (1, {"optimiser": "sgd", "momentum": 0.5}),
        (3, {"optimiser": "adamw", "ema": 0.9}),
        # CPUs are slow in float16.
        (1, {"optimiser": "adamw", "precision": "float16", "deterministic": True, "crop": 16, "bins": (1,)}),
    ],
)
def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(
    data: Path, tmp_path: Path, steps: int, changes: dict[str, Any], deterministic_again: None
) -> None:
    """At the end of an epoch or within it: dropout, order, augmentation, rate, momenta, averages, loss scale go on."""
    loop = _setup(data, norm="auto", warmup=2, grad_clip=5.0, dropout=0.5, **changes)
    whole = make_trainer(loop)
    rates = train_steps(whole, 4)
    broken = make_trainer(loop)
    train_steps(broken, steps)
    found = through_a_folder(broken.snapshot(model=broken.scored_model()), tmp_path)
    again = make_trainer(loop)
    again.restore(found)
    assert not _same(_state(again), _state(whole))
    assert train_steps(again, 4 - steps) == rates[steps:]
    assert _same(_state(again), _state(whole))
    assert again.losses == whole.losses
    assert again.scored_model().fingerprint == whole.scored_model().fingerprint
    assert again.scaler.state_dict() == whole.scaler.state_dict()


@pytest.fixture
def deterministic_again() -> Iterator[None]:
    """Leave the process as it was."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_other_formats_learn_the_same_way(data: Path, precision: str) -> None:
    start, expected, found = (make_trainer(_setup(data, precision=kind)) for kind in ("float32", "float32", precision))
    assert found.scaler.is_enabled() == (precision == "float16")
    for trainer in (expected, found):
        loss = trainer.step(*_batch(), lr=0.1)
        assert loss.dtype == torch.float32
    names = [name for name, parameter in expected.model.named_parameters() if parameter.ndim > 1]
    ways = [
        torch.cat([(trainer.model.get_parameter(name) - start.model.get_parameter(name)).flatten() for name in names])
        for trainer in (expected, found)
    ]
    assert torch.cosine_similarity(ways[0], ways[1], dim=0) > 0.95
    assert all(parameter.dtype == torch.float32 for parameter in found.model.parameters())


def test_an_overflow_of_float16_is_left_out_and_the_scale_falls(data: Path) -> None:
    trainer = make_trainer(_setup(data, precision="float16"))
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0**60})
    start = _state(trainer)
    assert trainer.step(*_batch(), lr=0.1).isfinite()
    assert _same(_state(trainer), start)
    assert trainer.scaler.get_scale() == 2.0**59


def test_a_loss_that_is_no_number_stops_before_it_does_harm(data: Path) -> None:
    trainer = make_trainer(_setup(data))
    train_steps(trainer, 1)
    with torch.no_grad():
        next(trainer.model.decoder.parameters()).fill_(float("inf"))
    start = _state(trainer)
    keys = ", ".join(trainer.setup.crops.keys(1))
    with pytest.raises(NotFinite, match=rf"^the loss is nan at step 2 on images {keys}$"):
        train_steps(trainer, 1)
    assert _same(_state(trainer), start)


@pytest.mark.parametrize(("clip", "value"), [(0.0, float("inf")), (1.0, float("nan"))])
def test_a_gradient_that_is_no_number_stops_before_it_does_harm(data: Path, clip: float, value: float) -> None:
    trainer = make_trainer(_setup(data, grad_clip=clip, ema=0.9))
    train_steps(trainer, 1)
    before = trainer.snapshot(model=trainer.current_model())
    next(trainer.model.decoder.parameters()).register_hook(lambda slope: slope.index_fill(0, torch.tensor(0), value))
    keys = ", ".join(trainer.setup.crops.keys(1))
    with pytest.raises(NotFinite, match=rf"^the norm of the gradient is {value} at step 2 on images {keys}$"):
        train_steps(trainer, 1)
    after = trainer.snapshot(model=trainer.current_model())
    assert before.weights is not None and after.weights is not None
    assert _same(after.weights, before.weights)
    assert _same(after.model.weights, before.model.weights)
    assert _same(after.optimiser, before.optimiser)


@pytest.mark.parametrize("spoilt", ["running_var", "average"])
def test_what_cannot_be_gone_on_from_is_not_saved(data: Path, spoilt: str) -> None:
    """Statistics overflow although loss and gradient are finite: only the steps with a checkpoint look for it."""
    trainer = make_trainer(_setup(data, ema=0.9, checkpoint_every=3, epochs=4))
    assert [step for step in range(1, 9) if trainer.setup.saves(step)] == [2, 3, 4, 6, 8]
    assert trainer.average is not None
    train_steps(trainer, 2)
    state = trainer.average.model.state_dict() if spoilt == "average" else trainer.model.state_dict()
    state["backbone.bn1.running_var"].fill_(float("inf"))
    with pytest.raises(NotFinite, match=r"^weights or statistics of BatchNorm are not finite at step 3 on images "):
        train_steps(trainer, 1)


def test_a_compiled_network_has_the_same_names(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: asked.append(self))
    trainer = make_trainer(_setup(data, compile=True))
    assert asked == [trainer.model]


@pytest.mark.parametrize(("dropout", "losses"), [(0.0, 1), (0.5, 3)])
def test_workers_drop_out_other_channels_and_each_step_others(data: Path, dropout: float, losses: int) -> None:
    setup = _setup(data, dropout=dropout)
    found = set()
    for index, steps_done in ((0, 0), (1, 0), (0, 1)):
        trainer = make_trainer(setup, rank=index)
        trainer.steps_done = steps_done
        trainer.train_step(Batch(*_batch()))
        found.add(trainer.loss)
    assert len(found) == losses

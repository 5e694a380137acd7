"""The moving average against a loop over numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pspnet_core.training.ema import WeightAverage


def _model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    for parameter in model[1].parameters():
        nn.init.normal_(parameter)
    model(torch.randn(4, 2, 8, 8))  # moves the statistics
    return model


def test_weights_and_statistics_follow_with_a_rising_decay() -> None:
    model = _model(0)
    average = WeightAverage(model, 0.3)
    expected = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for step in range(5):
        model = _model(step + 1)
        average.update(model, step)
        decay = min(0.3, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    found = average.model.state_dict()
    assert found["1.num_batches_tracked"] == 1
    for name in found.keys() - {"1.num_batches_tracked"}:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(found[name], model.state_dict()[name])


def test_the_decay_reaches_its_value_and_stays() -> None:
    """A unit step of the weights shows the decay: what is left of the old value."""
    for step, expected in ((0, 0.1), (8, 0.5), (80, 0.9), (10**6, 0.99)):
        model = nn.Conv2d(1, 1, 1)
        nn.init.ones_(model.weight)
        average = WeightAverage(model, 0.99)
        nn.init.zeros_(model.weight)
        average.update(model, step)
        assert average.model.weight.item() == pytest.approx(expected, abs=1e-6)


def test_what_does_not_change_keeps_its_bits() -> None:
    model = _model(0)
    average = WeightAverage(model, 0.999)
    for step in range(20):
        average.update(model, step)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in average.model.state_dict().items())


def test_the_average_stands_beside_the_model() -> None:
    model = _model(0).train()
    average = WeightAverage(model, 0.9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average.update(_model(1), 0)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert model.training and not average.model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in average.model.parameters())

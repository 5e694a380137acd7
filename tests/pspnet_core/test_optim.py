"""The schedule as a pure function of the step, and the two parameter groups."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pspnet_core.errors import ConfigError
from pspnet_core.optim import HEAD_FACTOR, OPTIMISERS, build_optimiser, poly, set_learning_rate
from pspnet_core.pspnet import PSPNet, PSPNetConfig


@functools.cache
def _network() -> PSPNet:
    torch.manual_seed(0)
    return PSPNet(PSPNetConfig(classes=2, backbone="resnet18", output_stride=32))


@pytest.mark.parametrize(
    ("step", "power", "expected"),
    [
        (0, 0.9, 1.0),
        (25, 1.0, 0.75),
        (50, 0.9, 0.5358867),
        (75, 0.5, 0.5),
        (90, 2.0, 0.01),
        (99, 0.9, 0.0158489),
        (100, 0.9, 0.0),
        (250, 0.9, 0.0),
    ],
)
def test_poly_values(step: int, power: float, expected: float) -> None:
    assert poly(step, steps=100, power=power) == pytest.approx(expected, rel=1e-5)


def test_the_power_of_the_paper_is_the_default() -> None:
    assert poly(50, steps=100) == poly(50, steps=100, power=0.9)


def test_warmup_rises_linearly_under_the_schedule() -> None:
    shares = [poly(step, steps=1000, warmup=4) / poly(step, steps=1000) for step in range(6)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


@given(st.integers(1, 10_000), st.integers(0, 100), st.floats(0.1, 3), st.data())
@settings(deadline=None, derandomize=True)
def test_the_rate_falls_from_the_end_of_the_warmup_to_zero(
    steps: int, warmup: int, power: float, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, steps - 1))
    here, after = (poly(at, steps=steps, power=power, warmup=warmup) for at in (step, step + 1))
    assert 0 < here <= 1
    assert poly(steps, steps=steps, power=power, warmup=warmup) == 0
    if step + 1 >= warmup:
        assert after < here


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_parameter_is_in_exactly_one_group(name: str) -> None:
    network = _network()
    optimiser = build_optimiser(network, name, weight_decay=1e-4, head_factor=HEAD_FACTOR)
    grouped = [id(parameter) for group in optimiser.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in network.parameters())
    names = {id(parameter): label for label, parameter in network.named_parameters()}
    backbone, head = optimiser.param_groups
    assert all(names[id(parameter)].startswith("backbone.") for parameter in backbone["params"])
    parts = {names[id(parameter)].split(".")[0] for parameter in head["params"]}
    assert parts == {"pyramid", "fusion", "decoder", "auxiliary"}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_head_learns_faster_by_its_factor(name: str) -> None:
    optimiser = build_optimiser(_network(), name, weight_decay=0.01, head_factor=7.0)
    set_learning_rate(optimiser, 0.2)
    assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([0.2, 1.4])
    set_learning_rate(optimiser, 0.1)
    assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([0.1, 0.7])
    assert {group["weight_decay"] for group in optimiser.param_groups} == {0.01}


def test_sgd_is_the_papers() -> None:
    """One parameter by hand: momentum 0.9, the decay added to the gradient, ten times the rate in the head."""
    network = copy.deepcopy(_network())
    optimiser = build_optimiser(network, "sgd", weight_decay=0.1, head_factor=HEAD_FACTOR)
    bias = network.decoder.get_parameter("1.bias")
    value, speed = bias.detach().clone(), torch.zeros_like(bias)
    for step, gradient in enumerate((1.0, -2.0, 0.5)):
        rate = 0.01 * poly(step, steps=3)
        set_learning_rate(optimiser, rate)
        bias.grad = torch.full_like(bias, gradient)
        optimiser.step()
        speed = 0.9 * speed + gradient + 0.1 * value
        value = value - 10 * rate * speed
        torch.testing.assert_close(bias.detach(), value)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_resumed_run_takes_the_steps_of_an_unbroken_one(name: str) -> None:
    def run(bias: torch.nn.Parameter, optimiser: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            set_learning_rate(optimiser, 0.05 * poly(step, steps=6, warmup=2))
            bias.grad = (step + 1) * torch.ones_like(bias) - bias.detach()
            optimiser.step()

    def fresh() -> tuple[PSPNet, torch.nn.Parameter, torch.optim.Optimizer]:
        network = copy.deepcopy(_network())
        optimiser = build_optimiser(network, name, weight_decay=1e-4, head_factor=HEAD_FACTOR)
        return network, network.decoder.get_parameter("1.bias"), optimiser

    _, whole, optimiser = fresh()
    run(whole, optimiser, range(6))
    broken, first, optimiser = fresh()
    run(first, optimiser, range(3))
    network, second, again = fresh()
    network.load_state_dict(broken.state_dict())
    again.load_state_dict(optimiser.state_dict())
    run(second, again, range(3, 6))
    assert torch.equal(second, whole)


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^optimiser=lion: choose one of sgd, adamw$"):
        build_optimiser(_network(), "lion", weight_decay=0.0, head_factor=1.0)

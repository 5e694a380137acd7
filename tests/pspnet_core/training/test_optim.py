"""The schedule as a pure function of the step, the four parameter groups, and the state by name."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pspnet_core.errors import ConfigError
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig
from pspnet_core.training.optim import (
    OPTIMISERS,
    OptimiserConfig,
    ScheduleConfig,
    build_optimiser,
    load_optimiser_state,
    optimiser_state,
    poly,
    set_lr,
)


@functools.cache
def _network() -> PSPNet:
    torch.manual_seed(0)
    return PSPNet(PSPNetConfig(classes=2, backbone="resnet18", stages=2))


@pytest.mark.parametrize(
    ("step", "power", "expected"),
    [(0, 0.9, 1.0), (25, 1.0, 0.75), (50, 0.9, 0.5358867), (90, 2.0, 0.01), (250, 0.9, 0.0)],
)
def test_poly_values(step: int, power: float, expected: float) -> None:
    assert poly(step, 100, ScheduleConfig(power=power)) == pytest.approx(expected, rel=1e-5)


def test_warmup_rises_linearly_under_the_schedule() -> None:
    warm, cold = ScheduleConfig(warmup=4), ScheduleConfig()
    shares = [poly(step, 1000, warm) / poly(step, 1000, cold) for step in range(6)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


@given(st.integers(1, 10_000), st.integers(0, 100), st.floats(0.1, 3), st.data())
def test_the_rate_falls_from_the_end_of_the_warmup_to_zero(
    steps: int, warmup: int, power: float, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, steps - 1))
    schedule = ScheduleConfig(power=power, warmup=warmup)
    here, after = (poly(at, steps, schedule) for at in (step, step + 1))
    assert 0 < here <= 1
    assert poly(steps, steps, schedule) == 0
    if step + 1 >= warmup:
        assert after < here


@pytest.mark.parametrize(("name", "key", "momentum"), [("sgd", "momentum", 0.8), ("adamw", "betas", (0.8, 0.999))])
def test_each_parameter_has_its_decay_and_rate(name: str, key: str, momentum: object) -> None:
    """By the layers themselves: norms and biases do not decay, and the head learns faster by its factor."""
    network = _network()
    config = OptimiserConfig(kind=name, weight_decay=0.05, head_lr_factor=7.0, momentum=0.8)
    optimiser = build_optimiser(network, config)
    set_lr(optimiser, 0.2)
    found = [
        (id(parameter), group["weight_decay"], round(group["lr"], 9))
        for group in optimiser.param_groups
        for parameter in group["params"]
    ]
    expected = [
        (
            id(parameter),
            0.0 if isinstance(module, torch.nn.BatchNorm2d) or label == "bias" else 0.05,
            0.2 if path.startswith("backbone.") else 1.4,
        )
        for path, module in network.named_modules()
        for label, parameter in module.named_parameters(recurse=False)
    ]
    assert sorted(found) == sorted(expected)
    assert all(group[key] == momentum and group["fused"] for group in optimiser.param_groups)
    kinds = {type(module) for module in network.modules() if list(module.parameters(recurse=False))}
    assert kinds == {torch.nn.Conv2d, torch.nn.BatchNorm2d}  # another kind of layer needs a thought about its decay


@pytest.mark.parametrize(("which", "decay"), [("weight", 0.1), ("bias", 0.0)])
def test_sgd_is_the_papers(which: str, decay: float) -> None:
    """One parameter by hand: momentum 0.9, the decay added to the gradient, ten times the rate in the head."""
    network = copy.deepcopy(_network())
    optimiser = build_optimiser(network, OptimiserConfig(kind="sgd", weight_decay=0.1, head_lr_factor=10.0))
    parameter = network.decoder.get_parameter(f"1.{which}")
    value, speed = parameter.detach().clone(), torch.zeros_like(parameter)
    for step, gradient in enumerate((1.0, -2.0, 0.5)):
        rate = 0.01 * (1 - step / 3) ** 0.9  # the power of the paper, which is the default
        set_lr(optimiser, rate)
        parameter.grad = torch.full_like(parameter, gradient)
        optimiser.step()
        speed = 0.9 * speed + gradient + decay * value
        value = value - 10 * rate * speed
        torch.testing.assert_close(parameter.detach(), value)


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_resumed_run_takes_the_steps_of_an_unbroken_one(name: str, layout: torch.memory_format) -> None:
    """In either memory layout: the fused kernels mix up the entries of a momentum that has another one."""

    def run(network: PSPNet, optimiser: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            set_lr(optimiser, 0.05 * poly(step, 6, ScheduleConfig(warmup=2)))
            for parameter in network.decoder.parameters():
                parameter.grad = (step + 1) * torch.ones_like(parameter) - parameter.detach()
            kernel = network.backbone.get_parameter("layer1.0.conv1.weight")
            kernel.grad = 0.5 * kernel.detach()
            optimiser.step()

    def fresh() -> tuple[PSPNet, torch.optim.Optimizer]:
        network = copy.deepcopy(_network()).to(memory_format=layout)  # type: ignore[call-overload]
        return network, build_optimiser(network, OptimiserConfig(kind=name, weight_decay=1e-4, head_lr_factor=10.0))

    whole, optimiser = fresh()
    run(whole, optimiser, range(6))
    broken, optimiser = fresh()
    run(broken, optimiser, range(3))
    network, again = fresh()
    network.load_state_dict(broken.state_dict())
    load_optimiser_state(again, network, optimiser_state(optimiser, broken))
    run(network, again, range(3, 6))
    assert all(map(torch.equal, network.parameters(), whole.parameters()))
    assert not torch.equal(whole.decoder.get_parameter("1.bias"), _network().decoder.get_parameter("1.bias"))


def test_the_state_is_named_after_the_parameters() -> None:
    network = copy.deepcopy(_network())
    optimiser = build_optimiser(network, OptimiserConfig(kind="adamw", weight_decay=0.0, head_lr_factor=1.0))
    assert optimiser_state(optimiser, network) == {}
    network.decoder.get_parameter("1.bias").grad = torch.ones(2)
    optimiser.step()
    state = optimiser_state(optimiser, network)
    assert set(state) == {f"decoder.1.bias.{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
    before = state["decoder.1.bias.exp_avg"].clone()
    optimiser.step()
    assert torch.equal(state["decoder.1.bias.exp_avg"], before)  # a copy: later steps do not touch it


def test_the_state_of_another_network_is_refused() -> None:
    optimiser = build_optimiser(_network(), OptimiserConfig(kind="sgd", weight_decay=0.0, head_lr_factor=1.0))
    with pytest.raises(ConfigError, match=r"^resume=0: the optimiser's state is of another network"):
        load_optimiser_state(optimiser, _network(), {"0.momentum_buffer": torch.zeros(1)})

"""The schedule as a pure function of the step, the four parameter groups, and the state by name."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
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
    assert poly(step, 100, ScheduleConfig(power=power)) == pytest.approx(expected, rel=1e-5)


def test_warmup_rises_linearly_under_the_schedule() -> None:
    warm, cold = ScheduleConfig(warmup=4), ScheduleConfig()
    shares = [poly(step, 1000, warm) / poly(step, 1000, cold) for step in range(6)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


@given(st.integers(1, 10_000), st.integers(0, 100), st.floats(0.1, 3), st.data())
@settings(deadline=None, derandomize=True)
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


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_parameter_is_in_exactly_one_group(name: str) -> None:
    network = _network()
    optimiser = build_optimiser(network, OptimiserConfig(kind=name, weight_decay=1e-4, head_lr_factor=10.0))
    grouped = [id(parameter) for group in optimiser.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in network.parameters())
    names = {id(parameter): label for label, parameter in network.named_parameters()}
    parts = [{names[id(p)].split(".")[0] for p in group["params"]} for group in optimiser.param_groups]
    assert parts[0] == parts[1] == {"backbone"}
    assert {"decoder", "auxiliary"} <= parts[2] | parts[3]
    assert "backbone" not in parts[2] | parts[3]


@pytest.mark.parametrize("name", OPTIMISERS)
def test_norms_and_biases_do_not_decay_and_all_else_does(name: str) -> None:
    """By the layers themselves: what belongs to a norm or is called a bias, and nothing else."""
    network = _network()
    optimiser = build_optimiser(network, OptimiserConfig(kind=name, weight_decay=0.05, head_lr_factor=3.0))
    free = {
        id(parameter)
        for module in network.modules()
        for label, parameter in module.named_parameters(recurse=False)
        if isinstance(module, torch.nn.BatchNorm2d) or label == "bias"
    }
    decays = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    assert {key for key, decay in decays.items() if decay == 0.0} == free
    assert {decay for key, decay in decays.items() if key not in free} == {0.05}
    kinds = {type(module) for module in network.modules() if list(module.parameters(recurse=False))}
    assert kinds == {torch.nn.Conv2d, torch.nn.BatchNorm2d}  # another kind of layer needs a thought about its decay


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_head_learns_faster_by_its_factor(name: str) -> None:
    optimiser = build_optimiser(_network(), OptimiserConfig(kind=name, weight_decay=0.01, head_lr_factor=7.0))
    set_lr(optimiser, 0.2)
    assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([0.2, 0.2, 1.4, 1.4])
    set_lr(optimiser, 0.1)
    assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([0.1, 0.1, 0.7, 0.7])


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_fused_kernels_are_used(name: str) -> None:
    optimiser = build_optimiser(_network(), OptimiserConfig(kind=name, weight_decay=0.01, head_lr_factor=1.0))
    assert all(group["fused"] for group in optimiser.param_groups)


@pytest.mark.parametrize(("which", "decay"), [("weight", 0.1), ("bias", 0.0)])
def test_sgd_is_the_papers(which: str, decay: float) -> None:
    """One parameter by hand: momentum 0.9, the decay added to the gradient, ten times the rate in the head."""
    network = copy.deepcopy(_network())
    optimiser = build_optimiser(network, OptimiserConfig(kind="sgd", weight_decay=0.1, head_lr_factor=10.0))
    parameter = network.decoder.get_parameter(f"1.{which}")
    value, speed = parameter.detach().clone(), torch.zeros_like(parameter)
    for step, gradient in enumerate((1.0, -2.0, 0.5)):
        rate = 0.01 * poly(step, 3, ScheduleConfig())
        set_lr(optimiser, rate)
        parameter.grad = torch.full_like(parameter, gradient)
        optimiser.step()
        speed = 0.9 * speed + gradient + decay * value
        value = value - 10 * rate * speed
        torch.testing.assert_close(parameter.detach(), value)


@pytest.mark.parametrize(("name", "key"), [("sgd", "momentum"), ("adamw", "betas")])
def test_the_momentum_is_the_given_one(name: str, key: str) -> None:
    optimiser = build_optimiser(
        _network(), OptimiserConfig(kind=name, weight_decay=0.0, head_lr_factor=1.0, momentum=0.8)
    )
    assert {group[key] for group in optimiser.param_groups} == {0.8 if key == "momentum" else (0.8, 0.999)}


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

"""BatchNorm in training: whose statistics, and that a checkpoint does not depend on it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import nn

from pspnet_core.errors import ConfigError
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig
from pspnet_core.training.norms import NORMS, FrozenBatchNorm2d, check_norm, set_norm

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def _network() -> PSPNet:
    torch.manual_seed(0)
    return PSPNet(PSPNetConfig(classes=2, backbone="resnet18", stages=2, dropout=0.0))


def _kinds(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}


@pytest.mark.parametrize(
    ("norm", "workers", "device", "kind"),
    [
        ("auto", 2, CPU, nn.BatchNorm2d),
        ("auto", 1, GPU, nn.BatchNorm2d),
        ("auto", 2, GPU, nn.SyncBatchNorm),
        ("batch", 2, GPU, nn.BatchNorm2d),
        ("sync", 1, GPU, nn.SyncBatchNorm),
        ("frozen", 2, GPU, FrozenBatchNorm2d),
    ],
)
def test_the_rule(norm: str, workers: int, device: torch.device, kind: type[nn.Module]) -> None:
    """The device is only named: the layers are exchanged wherever the weights are."""
    network = _network()
    set_norm(network, norm, workers=workers, device=device)
    assert _kinds(network) == {kind}


@pytest.mark.parametrize("norm", NORMS)
def test_names_values_and_parameters_stay(norm: str) -> None:
    network = _network()
    before, parameters = network.state_dict(), list(network.parameters())
    set_norm(network, norm, workers=2, device=GPU)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == tensor.data_ptr() for name, tensor in before.items())
    assert all(new is old for new, old in zip(network.parameters(), parameters, strict=True))


@pytest.mark.parametrize("norm", NORMS)
def test_evaluation_is_the_same(norm: str) -> None:
    network = _network().eval()
    images = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)
    with torch.no_grad():
        before = network(images).main
        set_norm(network, norm, workers=2, device=GPU)
        torch.testing.assert_close(network.eval()(images).main, before)


def test_frozen_layers_keep_their_statistics_and_take_one_image() -> None:
    network = _network()
    images = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)
    with torch.no_grad(), pytest.raises(ValueError, match="more than 1 value per channel"):
        copy.deepcopy(network).train()(images)
    set_norm(network, "frozen", workers=1, device=CPU)
    with torch.no_grad():
        expected = network.eval()(images).main
    before = {name: tensor.clone() for name, tensor in network.named_buffers()}
    network.train()
    main = network(images).main
    torch.testing.assert_close(main.detach(), expected)
    main.sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.named_buffers())
    layers = [module for module in network.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(layer.weight.grad is not None and layer.bias.grad is not None for layer in layers)


def test_frozen_layers_survive_a_copy() -> None:
    network = _network()
    set_norm(network, "frozen", workers=1, device=CPU)
    twin = copy.deepcopy(network).train()
    assert _kinds(twin) == {FrozenBatchNorm2d}
    assert not any(module.training for module in twin.modules() if isinstance(module, nn.BatchNorm2d))


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^norm=layer: choose one of auto, batch, sync, frozen$"):
        set_norm(_network(), "layer", workers=1, device=CPU)
    with pytest.raises(ConfigError, match=r"^norm=sync: torch has it on GPUs only; give auto, batch or frozen$"):
        set_norm(_network(), "sync", workers=2, device=CPU)
    check_norm("sync", gpu=True)


def test_torch_synchronises_on_gpus_only(tmp_path: Path) -> None:
    """The reason for the rule above: when this fails, the rule may go."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="on GPU"):
            nn.SyncBatchNorm(2)(torch.randn(2, 2, 1, 1))
    finally:
        torch.distributed.destroy_process_group()

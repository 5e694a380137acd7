"""The optimiser: parameter groups, state by parameter name, and the learning rate as a pure function of the step."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pspnet_core.errors import ConfigError
from pspnet_core.network.pspnet import PSPNet

MOMENTUM = 0.9  # paper, section 5.1

OPTIMISERS: dict[str, Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]] = {
    "sgd": lambda groups, momentum: torch.optim.SGD(groups, lr=0.0, momentum=momentum, fused=True),
    "adamw": lambda groups, momentum: torch.optim.AdamW(groups, lr=0.0, betas=(momentum, 0.999), fused=True),
}


def build_optimiser(
    model: PSPNet, name: str, *, weight_decay: float, head_lr_factor: float, momentum: float = MOMENTUM
) -> torch.optim.Optimizer:
    """The optimiser called ``name`` over four groups: backbone and head, each with and without weight decay.

    Args:
        model: its parameters outside the backbone are the head.
        name: a row of ``OPTIMISERS``.
        weight_decay: of the convolutions' weights. Norms and biases have none (He et al., "Bag of Tricks for Image
            Classification", CVPR 2019, section 3.1).
        head_lr_factor: learning rate of the head over that of the backbone.
        momentum: of sgd; of adamw it is the decay of the first moment.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in OPTIMISERS:
        raise ConfigError("optimiser", name, f"choose one of {', '.join(OPTIMISERS)}")
    backbone = list(model.backbone.parameters())
    known = {id(parameter) for parameter in backbone}
    head = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [*_groups(backbone, 1.0, weight_decay), *_groups(head, head_lr_factor, weight_decay)]
    return OPTIMISERS[name](groups, momentum)


def _groups(parameters: Iterable[nn.Parameter], factor: float, decay: float) -> list[dict[str, Any]]:
    """Groups of the parameters with weight decay and of those without: vectors, which are biases or scale a norm."""
    listed = list(parameters)
    decayed = [parameter for parameter in listed if parameter.ndim > 1]
    free = [parameter for parameter in listed if parameter.ndim <= 1]
    return [
        {"params": decayed, "lr_factor": factor, "weight_decay": decay},
        {"params": free, "lr_factor": factor, "weight_decay": 0.0},
    ]


def poly(step: int, *, steps: int, power: float = 0.9, warmup: int = 0) -> float:
    """Share of the base learning rate at ``step`` of ``steps``: ``(1 - step / steps) ** power``, after a linear rise.

    The poly schedule of the paper (section 5.1). It depends on the step alone, so a resumed run goes on where it was.

    Args:
        step: from 0; beyond ``steps`` the share is 0.
        steps: of the whole training.
        power: 0.9 is the paper's.
        warmup: steps over which the share rises to the schedule, in equal parts; 0 for none.
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return float(rise * (1 - min(step, steps) / steps) ** power)


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Give every group ``lr`` times its factor."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group["lr_factor"]


def optimiser_state(optimiser: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """What the optimiser remembers (momenta, step counts), on the CPU, named ``<parameter name>.<what>``."""
    return {
        f"{name}.{key}": torch.as_tensor(value).detach().cpu().contiguous().clone()
        for name, parameter in model.named_parameters()
        for key, value in optimiser.state.get(parameter, {}).items()
        if value is not None
    }


def load_optimiser_state(optimiser: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Take up what ``optimiser_state`` gave, for a model whose parameters have the same names.

    Raises:
        ConfigError: when the state is that of another network.
    """
    positions = {
        id(parameter): position
        for position, parameter in enumerate(entry for group in optimiser.param_groups for entry in group["params"])
    }
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        if owner not in parameters:
            raise ConfigError("resume", owner, "the optimiser's state is of another network; give another --name")
        parameter = parameters[owner]
        state.setdefault(positions[id(parameter)], {})[key] = _match_layout(parameter, tensor)
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _match_layout(parameter: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` with the strides of the parameter: the fused kernels walk both in memory order, unchecked."""
    return tensor if tensor.shape != parameter.shape else torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)

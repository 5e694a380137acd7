"""The optimiser: parameter groups, state by parameter name, and the learning rate as a pure function of the step."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pspnet_core.errors import check, check_below_1, check_choice, check_not_negative, check_positive
from pspnet_core.network.pspnet import PSPNet

OPTIMISERS: dict[str, Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]] = {
    "sgd": lambda groups, momentum: torch.optim.SGD(groups, lr=0.0, momentum=momentum, fused=True),
    "adamw": lambda groups, momentum: torch.optim.AdamW(groups, lr=0.0, betas=(momentum, 0.999), fused=True),
}


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """The optimiser, its learning rates, and the moving average of the weights."""

    kind: str = "sgd"
    """sgd (the paper's) or adamw."""
    lr: float = 0.01
    """Base learning rate of the backbone; it falls by the poly rule."""
    head_lr_factor: float = 10.0
    """Factor on the learning rate of all layers but the backbone."""
    momentum: float = 0.9
    """Momentum of sgd; of adamw the decay of the first moment."""
    weight_decay: float = 1e-4
    """Weight decay of the convolutions; norms and biases have none."""
    grad_clip: float = 0.0
    """Largest norm of the gradient of all weights together; 0 for no limit."""
    ema: float = 0.0
    """Decay of a moving average of the weights, such as 0.999, which is then scored and saved; 0 for none."""

    def __post_init__(self) -> None:
        check_choice("optimiser", self.kind, OPTIMISERS)
        check_positive(lr=self.lr, head_lr_factor=self.head_lr_factor)
        check_not_negative(weight_decay=self.weight_decay, grad_clip=self.grad_clip)
        check_below_1(momentum=self.momentum)
        check(0 <= self.ema < 1, "ema", self.ema, "give a decay such as 0.999, or 0 for none")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Length of a run and the curve of its learning rate."""

    epochs: int = 100
    """Passes over the training split."""
    power: float = 0.9
    """Exponent of the poly rule: (1 - step / steps) to this power."""
    warmup: int = 0
    """Steps over which the learning rate rises to its base."""

    def __post_init__(self) -> None:
        check_positive(epochs=self.epochs, power=self.power)
        check_not_negative(warmup=self.warmup)


def build_optimiser(model: PSPNet, config: OptimiserConfig) -> torch.optim.Optimizer:
    """Build the optimiser over four groups: backbone and head, each with and without weight decay.

    Norms and biases have none (He et al., "Bag of Tricks for Image Classification", CVPR 2019, section 3.1). The
    model's parameters outside the backbone are the head.
    """
    backbone = list(model.backbone.parameters())
    known = {id(parameter) for parameter in backbone}
    head = [parameter for parameter in model.parameters() if id(parameter) not in known]
    decay = config.weight_decay
    groups = [*_groups(backbone, 1.0, decay), *_groups(head, config.head_lr_factor, decay)]
    return OPTIMISERS[config.kind](groups, config.momentum)


def _groups(parameters: Sequence[nn.Parameter], factor: float, decay: float) -> list[dict[str, Any]]:
    """Group the parameters with weight decay and of those without: vectors, which are biases or scale a norm."""
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    free = [parameter for parameter in parameters if parameter.ndim <= 1]
    return [
        {"params": decayed, "lr_factor": factor, "weight_decay": decay},
        {"params": free, "lr_factor": factor, "weight_decay": 0.0},
    ]


def poly(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """Share of the base learning rate at ``step`` of ``steps``: ``(1 - step / steps) ** power``, after a linear rise.

    The poly schedule of the paper (section 5.1). It depends on the step alone, so a resumed run goes on where it was.

    Args:
        step: from 0; beyond ``steps`` the share is 0.
        steps: of the whole training.
    """
    rise = min(1.0, (step + 1) / schedule.warmup) if schedule.warmup else 1.0
    return float(rise * (1 - min(step, steps) / steps) ** schedule.power)


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Give every group ``lr`` times its factor."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group["lr_factor"]


def optimiser_state(optimiser: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Copy the optimiser's state (momenta, step counts) to the CPU, named ``<parameter name>.<what>``."""
    return {
        f"{name}.{key}": torch.as_tensor(value).detach().cpu().contiguous().clone()
        for name, parameter in model.named_parameters()
        for key, value in optimiser.state.get(parameter, {}).items()
        if value is not None
    }


def load_optimiser_state(optimiser: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what ``optimiser_state`` gave, for a model whose parameters have the same names.

    Raises:
        ConfigError: when the state is that of another network.
    """
    listed = itertools.chain.from_iterable(group["params"] for group in optimiser.param_groups)
    positions = {id(parameter): position for position, parameter in enumerate(listed)}
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        check(owner in parameters, "resume", owner, "the optimiser's state is of another network; give another --name")
        parameter = parameters[owner]
        state.setdefault(positions[id(parameter)], {})[key] = _match_layout(parameter, tensor)
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _match_layout(parameter: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` with the strides of the parameter: the fused kernels walk both in memory order, unchecked."""
    return tensor if tensor.shape != parameter.shape else torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)

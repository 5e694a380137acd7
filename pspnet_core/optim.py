"""The optimiser: parameter groups, and the learning rate as a pure function of the step."""

from collections.abc import Callable
from typing import Any

import torch

from pspnet_core.errors import ConfigError
from pspnet_core.pspnet import PSPNet

HEAD_FACTOR = 10.0  # the new layers learn ten times as fast as the backbone (paper's code)

OPTIMISERS: dict[str, Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]] = {
    "sgd": lambda groups, decay: torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=decay, fused=True),
    "adamw": lambda groups, decay: torch.optim.AdamW(groups, lr=0.0, weight_decay=decay, fused=True),
}


def build_optimiser(model: PSPNet, name: str, *, weight_decay: float, head_factor: float) -> torch.optim.Optimizer:
    """The optimiser called ``name`` over two groups: the backbone, and the rest at ``head_factor`` times its rate."""
    if name not in OPTIMISERS:
        raise ConfigError("optimiser", name, f"choose one of {', '.join(OPTIMISERS)}")
    backbone = list(model.backbone.parameters())
    known = {id(parameter) for parameter in backbone}
    head = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [{"params": backbone, "factor": 1.0}, {"params": head, "factor": head_factor}]
    return OPTIMISERS[name](groups, weight_decay)


def poly(step: int, *, steps: int, power: float = 0.9, warmup: int = 0) -> float:
    """Share of the base learning rate at ``step`` of ``steps``: ``(1 - step / steps) ** power``, after a linear rise.

    The poly schedule of the paper (section 5.1). It depends on the step alone, so a resumed run goes on where it was.
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return float(rise * (1 - min(step, steps) / steps) ** power)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group ``rate`` times its factor."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["factor"]

"""Exponential moving average of the weights, which scores better than the last weights do."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

ModelT = TypeVar("ModelT", bound=nn.Module)


class WeightAverage(Generic[ModelT]):
    """The exponential moving average of a model's weights and BatchNorm statistics.

    Tarvainen and Valpola, "Mean teachers are better role models" (NeurIPS 2017), section 2. The decay rises with the
    steps, so that the random weights of the start are soon forgotten: ``min(decay, (1 + step) / (10 + step))``.

    Attributes:
        model: a copy of the model that holds the average, in evaluation mode and without gradients.

    Args:
        model: what to average; the average starts at its weights.
        decay: share of the average that a step leaves, in (0, 1); 0.999 remembers about 1000 steps.
    """

    def __init__(self, model: ModelT, decay: float) -> None:
        self.decay = decay
        self.model: ModelT = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: ModelT, step: int) -> None:
        """Move towards the model as it is after ``step``, counted from 0 over the whole training."""
        decay = min(self.decay, (1 + step) / (10 + step))
        own, new = self.model.state_dict(), model.state_dict()
        floats = [name for name, tensor in own.items() if tensor.is_floating_point()]
        get_ema_multi_avg_fn(decay)([own[name] for name in floats], [new[name] for name in floats], step)
        for name in own.keys() - set(floats):  # counts of batches
            own[name].copy_(new[name])

"""How BatchNorm behaves in training: statistics of a worker's own images, of all workers' together, or frozen ones.

None of it changes the names or shapes of the weights, so a checkpoint does not depend on it.
"""

import torch
from torch import nn

from pspnet_core.errors import check, check_choice
from pspnet_core.network.deploy import replace_modules

NORMS = {
    "auto": "sync on several GPUs, else batch",
    "batch": "statistics of each worker's own images",
    "sync": "statistics over the images of all workers; on GPUs only",
    "frozen": "the statistics that the network starts with",
}


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that keeps to its running statistics in training mode, too; scale and shift still learn."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        """Stay in evaluation mode."""
        return super().train(False)


def set_norm(model: nn.Module, norm: str, *, workers: int, device: torch.device) -> None:
    """Make the BatchNorm layers of ``model`` behave as ``norm`` says; parameters and buffers stay the same objects.

    Args:
        norm: a row of ``NORMS``.
        workers: data-parallel workers that train the model together.
        device: where the model is.

    Raises:
        ConfigError: for an unknown norm, or ``sync`` elsewhere than on a GPU (torch has it only there).
    """
    check_norm(norm, gpu=device.type == "cuda")
    if norm == "frozen":
        replace_modules(model, lambda child: isinstance(child, nn.BatchNorm2d), _frozen)
    elif norm == "sync" or (norm == "auto" and workers > 1 and device.type == "cuda"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def check_norm(norm: str, *, gpu: bool = True) -> None:
    """Raise ConfigError for an unknown norm, or for one that needs a GPU where there is none."""
    check_choice("norm", norm, NORMS)
    check(norm != "sync" or gpu, "norm", norm, "torch has it on GPUs only; give auto, batch or frozen")


def _frozen(layer: nn.BatchNorm2d) -> FrozenBatchNorm2d:
    frozen = FrozenBatchNorm2d(layer.num_features, layer.eps, layer.momentum)
    frozen.weight, frozen.bias = layer.weight, layer.bias
    frozen.running_mean, frozen.running_var = layer.running_mean, layer.running_var
    frozen.num_batches_tracked = layer.num_batches_tracked
    return frozen.eval()

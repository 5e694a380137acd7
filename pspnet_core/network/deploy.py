"""Deployment of a network for inference: BatchNorm folded, the fusion's weight split, Winograd's convolutions.

Shapes: ``B`` batch, ``h w`` feature cells, ``b`` cells along a grid, ``r`` channels of a grid, ``O`` outputs of the
fusion.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pspnet_core.network.fusion import PyramidFusion, low_rank_fusion, mixing_matrix
from pspnet_core.network.winograd import WinogradConv2d

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class SplitFusion(nn.Module):
    """``PyramidFusion`` for inference: BatchNorm folded in, the weight split once."""

    def __init__(self, fusion: PyramidFusion) -> None:
        super().__init__()
        conv, norm, _ = fusion
        folded = fuse_conv_bn_eval(cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, norm))
        feature, parts = fusion.split(folded.weight)
        self.kernel, self.align_corners = fusion.kernel, fusion.align_corners
        self.feature = nn.Conv2d(fusion.channels, folded.out_channels, self.kernel, padding=self.kernel // 2)
        self.feature.weight, self.feature.bias = _frozen(feature.contiguous()), folded.bias
        self.mixers = nn.ParameterList(_frozen(mixing_matrix(part).contiguous()) for part in parts)

    def forward(self, x: Tensor, grids: Sequence[Tensor]) -> Tensor:
        """As ``PyramidFusion.forward``."""
        y: Tensor = self.feature(x)
        y += low_rank_fusion(
            grids, list(self.mixers), x.shape[-2:], kernel=self.kernel, align_corners=self.align_corners
        )
        return y.relu_()


def deploy(
    model: ModuleT,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | None = None,
    winograd: bool | None = None,
) -> ModuleT:
    """Copy a network for inference only: the same logits in less time.

    BatchNorm is folded into the convolutions, the fusion's weight is split, the auxiliary head is dropped, and weights
    and activations are ``dtype``, channels last. Normalisation and interpolation stay float32.

    Args:
        model: a PSPNet, in any mode; it stays as it is.
        dtype: float32, bfloat16 or float16.
        device: where the copy goes; by default where the model is.
        winograd: whether large 3x3 convolutions run by ``WinogradConv2d``; by default in float32 on a CPU.
    """
    deployed = copy.deepcopy(model).to(device=device).eval().requires_grad_(False)
    deployed.auxiliary = None  # type: ignore[assignment]
    replace_modules(deployed, lambda child: isinstance(child, PyramidFusion), SplitFusion)
    _fold_norms(deployed)
    for part in deployed.children():  # not the model's own buffers: mean and standard deviation need float32
        part.to(dtype=dtype)
    deployed.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if winograd is None:
        winograd = dtype == torch.float32 and next(deployed.parameters()).device.type == "cpu"
    if winograd:
        replace_modules(
            deployed, lambda child: isinstance(child, nn.Conv2d) and WinogradConv2d.suits(child), WinogradConv2d
        )
    return deployed.requires_grad_(False)


def replace_modules(module: nn.Module, wanted: Callable[[nn.Module], bool], build: Callable[[Any], nn.Module]) -> None:
    """Put ``build(child)`` in the place of every wanted child, at any depth."""
    for name, child in list(module.named_children()):
        if wanted(child):
            setattr(module, name, build(child))
        else:
            replace_modules(child, wanted, build)


def _fold_norms(module: nn.Module) -> tuple[nn.Module, str] | None:
    """Fold each BatchNorm into the convolution before it, in the order of the children.

    Returns:
        Where the last convolution stands whose BatchNorm, if any, comes after ``module``.
    """
    last = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            last = module, name
        elif isinstance(child, _BatchNorm):
            if last is None:
                raise ValueError(f"BatchNorm {name} follows no convolution")
            owner, key = last
            conv = cast(nn.Conv2d, owner.get_submodule(key))
            setattr(owner, key, fuse_conv_bn_eval(conv, cast(nn.BatchNorm2d, child)))
            setattr(module, name, nn.Identity())
            last = None
        else:
            last = _fold_norms(child) or last
    return last


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=False)

"""The training loss: cross-entropy on the main logits plus a weighted one on the auxiliary logits.

Shapes: ``B`` batch, ``C`` classes, ``H W`` pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pspnet_core.pspnet import Logits

AUXILIARY_WEIGHT = 0.4  # paper, section 3.3


def cross_entropy(logits: Tensor, target: Tensor, *, ignore: int, weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the pixels that count.

    Args:
        logits: ``(B, C, H, W)`` float.
        target: ``(B, H, W)`` integer class ids; ``ignore`` marks pixels that do not count.
        ignore: the id to leave out; may be any id, also one beyond ``C``.
        weight: ``(C,)`` weight of each class, or None for equal weights.

    Returns:
        A scalar; zero, with zero gradient, when every pixel is ignored.
    """
    target = target.long()
    total = F.cross_entropy(logits, target, weight=weight, ignore_index=ignore, reduction="sum")
    counted = target != ignore
    # where() first: an ignored id may lie beyond the weights.
    scale = counted.sum() if weight is None else weight[torch.where(counted, target, 0)][counted].sum()
    return total / scale.to(total.dtype).clamp_min(torch.finfo(total.dtype).tiny)


def pspnet_loss(logits: Logits, target: Tensor, *, ignore: int, weight: Tensor | None = None) -> Tensor:
    """Main loss plus 0.4 times the auxiliary loss (paper, section 3.3); arguments as ``cross_entropy``."""
    loss = cross_entropy(logits.main, target, ignore=ignore, weight=weight)
    if logits.aux is None:
        return loss
    return loss + AUXILIARY_WEIGHT * cross_entropy(logits.aux, target, ignore=ignore, weight=weight)


def class_weights(pixels: Tensor, *, power: float) -> Tensor:
    """Weights that fall with a class's frequency: ``frequency ** -power``, scaled to mean 1 over the pixels.

    Args:
        pixels: ``(C,)`` training pixels of each class; a class without any gets weight 1.
        power: 0 for equal weights, 1 for inverse frequency.

    Returns:
        ``(C,)`` float32.
    """
    frequency = pixels.double() / pixels.sum().clamp_min(1)
    present = frequency > 0
    weight = torch.where(present, frequency.clamp_min(1e-12) ** -power, torch.ones_like(frequency))
    scale = (weight * frequency).sum()
    return torch.where(present, weight / scale.clamp_min(1e-12), torch.ones_like(weight)).float()

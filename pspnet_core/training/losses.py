"""Training losses: one function and one row of ``LOSSES`` each, and the PSPNet loss, main plus weighted auxiliary.

Every loss takes float logits ``(B, C, H, W)`` in float32 or wider, int64 class ids ``(B, H, W)`` and an id to leave
out, which may lie beyond ``C``, the weights ``(C,)`` of the classes or None for equal ones, and the config. It returns
a mean over what counts, a scalar. Where nothing counts it is zero with a zero gradient, never NaN.

A step may be spread over workers and over several passes of one worker. Its loss is then the mean of the parts' losses,
each weighted by its share of ``valid_weight``, which is known from the targets alone. For cross-entropy and focal loss
that is exactly the mean over all pixels of the step; OHEM, Dice and Lovasz-softmax look at one part at a time.

Shapes: ``B`` batch, ``C`` classes, ``H W`` pixels, ``P`` pixels that count.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pspnet_core.errors import check, check_choice
from pspnet_core.network.pspnet import Logits


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Kind of the loss, and its settings; a setting of another loss has no effect."""

    kind: str = "cross_entropy"
    """cross_entropy, ohem (cross-entropy of the hard pixels), focal, dice or lovasz: a row of LOSSES."""
    label_smoothing: float = 0.0
    """Label smoothing of cross_entropy and ohem, in [0, 1): share of the label that is spread over all classes."""
    ohem_thresh: float = 0.7
    """ohem: pixels whose true class has a probability below this are hard; in (0, 1]."""
    ohem_min_kept: int = 100_000
    """ohem: pixels of one pass of a worker that are kept at least, at least 1."""
    focal_gamma: float = 2.0
    """focal: how much easy pixels are played down; 0 gives cross-entropy."""
    aux_weight: float = 0.4  # paper, section 3.3
    """Weight of the auxiliary loss beside the main loss; a network trained with 0 has no auxiliary head."""

    def __post_init__(self) -> None:
        check_choice("loss", self.kind, LOSSES)
        smoothing = self.label_smoothing
        check(0 <= smoothing < 1, "label_smoothing", smoothing, "choose a share in [0, 1), such as 0.1")
        fits, remedy = self.kind in SMOOTHED, f"works with {' and '.join(SMOOTHED)}; give 0 or one of them"
        check(not smoothing or fits, "label_smoothing", smoothing, remedy)
        thresh = self.ohem_thresh
        check(0 < thresh <= 1, "ohem_thresh", thresh, "choose a probability in (0, 1], such as 0.7")
        check(self.ohem_min_kept >= 1, "ohem_min_kept", self.ohem_min_kept, "keep at least 1 pixel")
        gamma, aux = self.focal_gamma, self.aux_weight
        check(0 <= gamma < math.inf, "focal_gamma", gamma, "give a number of at least 0, such as 2")
        check(0 <= aux < math.inf, "aux_weight", aux, "give a weight of at least 0, such as 0.4")


def pspnet_loss(
    logits: Logits, target: Tensor, *, config: LossConfig, ignore: int, weight: Tensor | None = None
) -> Tensor:
    """Main loss plus the weighted auxiliary loss (paper, section 3.3).

    Args:
        logits: main and auxiliary ``(B, C, H, W)`` float of any width; without the latter the main loss is all.
        target: ``(B, H, W)`` integer class ids; ``ignore`` marks pixels that do not count.
        ignore: the id to leave out; may be any id, also one beyond ``C``.
        weight: ``(C,)`` weight of each class, or None for equal weights.

    Returns:
        A scalar in float32 or wider.
    """

    def loss(scores: Tensor) -> Tensor:
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = None if weight is None else weight.to(wide.dtype)
        return LOSSES[config.kind](wide, target.long(), ignore, weights, config)

    total = loss(logits.main)
    return total if logits.aux is None else total + config.aux_weight * loss(logits.aux)


def cross_entropy(logits: Tensor, target: Tensor, ignore: int, weight: Tensor | None, config: LossConfig) -> Tensor:
    """Mean cross-entropy over the pixels that count.

    Label smoothing spreads a share of the label evenly over all classes (Szegedy et al., "Rethinking the Inception
    Architecture for Computer Vision", CVPR 2016, section 7).
    """
    options = {"weight": weight, "ignore_index": ignore, "label_smoothing": config.label_smoothing}
    total = _cross_entropy(logits, target, reduction="sum", **options)
    return _divide(total, valid_weight(target, ignore=ignore, weight=weight))


def ohem(logits: Tensor, target: Tensor, ignore: int, weight: Tensor | None, config: LossConfig) -> Tensor:
    """Mean cross-entropy over the hard pixels of the batch: online hard example mining.

    Shrivastava et al., "Training Region-based Object Detectors with Online Hard Example Mining" (CVPR 2016), applied to
    pixels. A pixel is hard when its true class has a probability below ``ohem_thresh``. When fewer than
    ``ohem_min_kept`` pixels are, that many of the hardest are taken, with pixels as hard as the last of them, so that
    the order in memory does not matter; all that count are taken when there are no more. Weights do not make a pixel
    harder. Each worker chooses among its own pixels.
    """
    options = {"weight": weight, "ignore_index": ignore, "label_smoothing": config.label_smoothing}
    losses = _cross_entropy(logits, target, reduction="none", **options)
    weights = pixel_weights(target, ignore=ignore, weight=weight)
    hard = _hard_pixels(logits.detach(), target, ignore, config)
    return _divide(torch.where(hard, losses, 0).sum(), torch.where(hard, weights, 0).sum())


def _cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """``F.cross_entropy``; by rows of pixels in deterministic mode, since CUDA has no such kernel for images."""
    if not torch.are_deterministic_algorithms_enabled():
        return F.cross_entropy(logits, target, **options)
    losses = F.cross_entropy(logits.movedim(1, -1).flatten(0, -2), target.flatten(), **options)
    return losses.view(target.shape) if losses.ndim else losses


def _hard_pixels(logits: Tensor, target: Tensor, ignore: int, config: LossConfig) -> Tensor:
    """``(B, H, W)`` bool: which pixels ``ohem`` takes; where there are too few also ignored ones, of no weight."""
    # The probability of the true class, and 1 where ignored: harder than nothing.
    truth = torch.exp(-_cross_entropy(logits, target, ignore_index=ignore, reduction="none"))
    last = truth.flatten().kthvalue(min(config.ohem_min_kept, truth.numel())).values
    return (truth < config.ohem_thresh) | (truth <= last)


def focal(logits: Tensor, target: Tensor, ignore: int, weight: Tensor | None, config: LossConfig) -> Tensor:
    """Mean of ``-(1 - p) ** gamma * log(p)`` over the pixels that count, ``p`` the true class's probability.

    Lin et al., "Focal Loss for Dense Object Detection" (ICCV 2017), equation 5, with probabilities by softmax and the
    class weights as alpha. A gamma of 0 gives cross-entropy.
    """
    surprise = _cross_entropy(logits, target, ignore_index=ignore, reduction="none")
    # 1 - p without cancellation; kept off 0, where the slope of a power below 1 is infinite.
    doubt = -torch.expm1(-surprise)
    factor = doubt.clamp_min(torch.finfo(doubt.dtype).tiny) ** config.focal_gamma
    weights = pixel_weights(target, ignore=ignore, weight=weight)
    return _divide((weights * factor * surprise).sum(), weights.sum())


def dice(logits: Tensor, target: Tensor, ignore: int, weight: Tensor | None, config: LossConfig) -> Tensor:
    """Mean of ``1 - Dice`` over the classes that the target holds.

    Milletari et al., "V-Net" (3DV 2016), section 3: ``2 sum(p g) / (sum(p ** 2) + sum(g ** 2))``, for each class over
    all pixels of the batch that count, ``p`` its probability and ``g`` 1 where it is the truth. Weights are
    those of the classes in the mean.
    """
    probabilities, truth = _counted_pixels(logits, target, ignore)
    pixels = truth.bincount(minlength=logits.shape[1])
    hits = probabilities.gather(1, truth[:, None]).squeeze(1)
    overlap = torch.zeros_like(pixels, dtype=hits.dtype).index_add(0, truth, hits)
    present = pixels.nonzero().squeeze(1)
    size = probabilities.square().sum(dim=0) + pixels
    return _class_mean(1 - 2 * overlap[present] / size[present], present, weight)


def lovasz(logits: Tensor, target: Tensor, ignore: int, weight: Tensor | None, config: LossConfig) -> Tensor:
    """Lovasz-softmax: the convex surrogate of ``1 - IoU``, its mean over the classes that the target holds.

    Berman et al., "The Lovasz-Softmax loss" (CVPR 2018), equations 9 to 12, over all pixels of the batch that count.
    Weights are those of the classes in the mean.
    """
    probabilities, truth = _counted_pixels(logits, target, ignore)
    present = truth.unique()
    surrogates = [_lovasz_extension(probabilities[:, label], truth == label) for label in present.tolist()]
    # The empty sum ties the loss to the logits when there is no class at all.
    return _class_mean(torch.stack([*surrogates, probabilities[:0].sum()])[:-1], present, weight)


def _lovasz_extension(probability: Tensor, truth: Tensor) -> Tensor:
    """The surrogate for one class: its probability ``(P,)`` and where it is the truth ``(P,)`` bool."""
    errors, order = (truth.to(probability.dtype) - probability).abs().sort(descending=True)
    truth = truth[order]
    # Whole numbers: float32 could not count beyond 2 ** 24 pixels.
    missed, added = truth.cumsum(0), (~truth).cumsum(0)
    total = truth.sum()
    jaccard = 1 - (total - missed).to(errors.dtype) / (total + added)
    return errors @ jaccard.diff(prepend=jaccard.new_zeros(1))


Loss = Callable[[Tensor, Tensor, int, Tensor | None, LossConfig], Tensor]

LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "ohem": ohem,
    "focal": focal,
    "dice": dice,
    "lovasz": lovasz,
}
SMOOTHED = ("cross_entropy", "ohem")


def valid_weight(target: Tensor, *, ignore: int, weight: Tensor | None = None) -> Tensor:
    """Weight of a target: its pixels that are not ignored, or the sum of their classes' weights.

    Args:
        target, ignore, weight: as for ``pspnet_loss``.

    Returns:
        A float64 scalar (float32 cannot count beyond 2 ** 24).
    """
    return pixel_weights(target, ignore=ignore, weight=weight).sum(dtype=torch.float64)


def pixel_weights(target: Tensor, *, ignore: int, weight: Tensor | None = None) -> Tensor:
    """Weight of each pixel ``(B, H, W)``, float32 or of the weights' type: that of its class, 0 where ignored."""
    target = target.long()
    counted = target != ignore
    if weight is None:
        return counted.float()
    # where() first: an ignored id may lie beyond the weights.
    return weight[torch.where(counted, target, 0)] * counted


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


def _divide(total: Tensor, count: Tensor) -> Tensor:
    """``total / count``, and zero where nothing counts."""
    return total / torch.where(count > 0, count, 1).to(total.dtype)


def _counted_pixels(logits: Tensor, target: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """Probabilities ``(P, C)`` and class ids ``(P,)`` of the pixels that count."""
    counted = target != ignore
    return logits.movedim(1, -1)[counted].softmax(dim=1), target[counted]


def _class_mean(losses: Tensor, present: Tensor, weight: Tensor | None) -> Tensor:
    """Weighted mean of the losses of the present classes, given their ids."""
    weights = torch.ones_like(losses) if weight is None else weight[present]
    return _divide((weights * losses).sum(), weights.sum())

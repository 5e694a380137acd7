"""Training losses: one function and one row of ``LOSSES`` each, and the PSPNet loss, main plus weighted auxiliary.

Every loss takes float logits ``(B, C, H, W)`` and integer class ids ``(B, H, W)`` with an id to leave out, and returns
a mean over what counts: a scalar in float32 or wider, whatever the type of the logits. Where nothing counts it is zero
with a zero gradient, never NaN.

A step may be spread over workers and over several passes of one worker. Its loss is then the mean of the parts' losses,
each weighted by its share of ``valid_weight``, which is known from the targets alone. For cross-entropy and focal loss
that is exactly the mean over all pixels of the step; OHEM, Dice and Lovasz-softmax look at one part at a time.

Shapes: ``B`` batch, ``C`` classes, ``H W`` pixels, ``P`` pixels that count.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pspnet_core.errors import ConfigError
from pspnet_core.network.pspnet import Logits

AUX_WEIGHT = 0.4  # paper, section 3.3


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which loss, and its settings; a setting of another loss has no effect."""

    kind: str = "cross_entropy"
    """cross_entropy, ohem (cross-entropy of the hard pixels), focal, dice or lovasz: a row of LOSSES."""
    label_smoothing: float = 0.0
    """Label smoothing of cross_entropy and ohem, in [0, 1): share of the label that is spread over all classes."""
    ohem_thresh: float = 0.7
    """ohem: pixels whose true class has a probability below this are hard; in (0, 1]."""
    ohem_min_kept: int = 100_000
    """ohem: pixels of a batch that are kept at least, at least 1."""
    focal_gamma: float = 2.0
    """focal: how much easy pixels are played down; 0 gives cross-entropy."""
    aux_weight: float = AUX_WEIGHT
    """Weight of the auxiliary loss beside the main loss; a network trained with 0 has no auxiliary head."""

    def __post_init__(self) -> None:
        if self.kind not in LOSSES:
            raise ConfigError("loss", self.kind, f"choose one of {', '.join(LOSSES)}")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError("label_smoothing", self.label_smoothing, "choose a share in [0, 1), such as 0.1")
        if self.label_smoothing and self.kind not in SMOOTHED:
            raise ConfigError(
                "label_smoothing", self.label_smoothing, f"works with {' and '.join(SMOOTHED)}; give 0 or one of them"
            )
        if not 0 < self.ohem_thresh <= 1:
            raise ConfigError("ohem_thresh", self.ohem_thresh, "choose a probability in (0, 1], such as 0.7")
        if self.ohem_min_kept < 1:
            raise ConfigError("ohem_min_kept", self.ohem_min_kept, "keep at least 1 pixel")
        if not 0 <= self.focal_gamma < math.inf:
            raise ConfigError("focal_gamma", self.focal_gamma, "give a number of at least 0, such as 2")
        if not 0 <= self.aux_weight < math.inf:
            raise ConfigError("aux_weight", self.aux_weight, "give a weight of at least 0, such as 0.4")


def pspnet_loss(
    logits: Logits, target: Tensor, *, ignore: int, weight: Tensor | None = None, config: LossConfig | None = None
) -> Tensor:
    """Main loss plus 0.4 times the auxiliary loss (paper, section 3.3).

    Args:
        logits: main and auxiliary ``(B, C, H, W)`` float; without the latter the main loss is all.
        target, ignore, weight: as for ``cross_entropy``.
        config: another loss, or another weight of the auxiliary one.
    """
    config = config or LossConfig()
    loss = LOSSES[config.kind](config)
    total = loss(logits.main, target, ignore=ignore, weight=weight)
    if logits.aux is None:
        return total
    return total + config.aux_weight * loss(logits.aux, target, ignore=ignore, weight=weight)


def cross_entropy(
    logits: Tensor, target: Tensor, *, ignore: int, weight: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy over the pixels that count.

    Args:
        logits: ``(B, C, H, W)`` float.
        target: ``(B, H, W)`` integer class ids; ``ignore`` marks pixels that do not count.
        ignore: the id to leave out; may be any id, also one beyond ``C``.
        weight: ``(C,)`` weight of each class, or None for equal weights.
        label_smoothing: share of the label that is spread evenly over all classes (Szegedy et al., "Rethinking the
            Inception Architecture for Computer Vision", CVPR 2016, section 7), in [0, 1).

    Returns:
        A scalar; zero, with zero gradient, when every pixel is ignored.
    """
    logits, target, weight = _widen(logits, target, weight)
    total = _cross_entropy(
        logits, target, weight=weight, ignore_index=ignore, label_smoothing=label_smoothing, reduction="sum"
    )
    return _divide(total, valid_weight(target, ignore=ignore, weight=weight))


def ohem(
    logits: Tensor,
    target: Tensor,
    *,
    ignore: int,
    weight: Tensor | None = None,
    thresh: float = 0.7,
    min_kept: int = 100_000,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean cross-entropy over the hard pixels of the batch: online hard example mining.

    Shrivastava et al., "Training Region-based Object Detectors with Online Hard Example Mining" (CVPR 2016), applied to
    pixels. A pixel is hard when its true class has a probability below ``thresh``. When fewer than ``min_kept`` pixels
    are, the ``min_kept`` hardest are taken, with pixels as hard as the last of them, so that the order in memory does
    not matter. Each worker chooses among its own pixels.

    Args:
        logits, target, ignore, weight, label_smoothing: as for ``cross_entropy``. Weights do not make a pixel harder.
        thresh: in (0, 1].
        min_kept: at least 1; all pixels that count are taken when there are no more than that.
    """
    logits, target, weight = _widen(logits, target, weight)
    losses = _cross_entropy(
        logits, target, weight=weight, ignore_index=ignore, label_smoothing=label_smoothing, reduction="none"
    )
    weights = pixel_weights(target, ignore=ignore, weight=weight)
    hard = _hard_pixels(logits.detach(), target, ignore=ignore, thresh=thresh, min_kept=min_kept)
    return _divide(torch.where(hard, losses, 0).sum(), torch.where(hard, weights, 0).sum())


def _cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """``F.cross_entropy``; by rows of pixels in deterministic mode, since CUDA has no such kernel for images."""
    if not torch.are_deterministic_algorithms_enabled():
        return F.cross_entropy(logits, target, **options)
    losses = F.cross_entropy(logits.movedim(1, -1).flatten(0, -2), target.flatten(), **options)
    return losses.view(target.shape) if losses.ndim else losses


def _hard_pixels(logits: Tensor, target: Tensor, *, ignore: int, thresh: float, min_kept: int) -> Tensor:
    """``(B, H, W)`` bool: which pixels ``ohem`` takes; where there are too few also ignored ones, of no weight."""
    # The probability of the true class, and 1 where ignored: harder than nothing.
    truth = torch.exp(-_cross_entropy(logits, target, ignore_index=ignore, reduction="none"))
    last = truth.flatten().kthvalue(min(min_kept, truth.numel())).values
    return (truth < thresh) | (truth <= last)


def focal(logits: Tensor, target: Tensor, *, ignore: int, weight: Tensor | None = None, gamma: float = 2.0) -> Tensor:
    """Mean of ``-(1 - p) ** gamma * log(p)`` over the pixels that count, ``p`` the true class's probability.

    Lin et al., "Focal Loss for Dense Object Detection" (ICCV 2017), equation 5, with probabilities by softmax and the
    class weights as alpha.

    Args:
        logits, target, ignore, weight: as for ``cross_entropy``.
        gamma: at least 0; 0 gives cross-entropy.
    """
    logits, target, weight = _widen(logits, target, weight)
    surprise = _cross_entropy(logits, target, ignore_index=ignore, reduction="none")
    # 1 - p without cancellation; kept off 0, where the slope of a power below 1 is infinite.
    doubt = -torch.expm1(-surprise)
    factor = doubt.clamp_min(torch.finfo(doubt.dtype).tiny) ** gamma
    weights = pixel_weights(target, ignore=ignore, weight=weight)
    return _divide((weights * factor * surprise).sum(), weights.sum())


def dice(logits: Tensor, target: Tensor, *, ignore: int, weight: Tensor | None = None) -> Tensor:
    """Mean of ``1 - Dice`` over the classes that the target holds.

    Milletari et al., "V-Net" (3DV 2016), section 3: ``2 sum(p g) / (sum(p ** 2) + sum(g ** 2))``, for each class over
    all pixels of the batch that count, ``p`` its probability and ``g`` 1 where it is the truth.

    Args:
        logits, target, ignore: as for ``cross_entropy``.
        weight: ``(C,)`` weight of each class in the mean.
    """
    logits, target, weight = _widen(logits, target, weight)
    probabilities, truth = _counted_pixels(logits, target, ignore)
    pixels = truth.bincount(minlength=logits.shape[1])
    hits = probabilities.gather(1, truth[:, None]).squeeze(1)
    overlap = torch.zeros_like(pixels, dtype=hits.dtype).index_add(0, truth, hits)
    present = pixels.nonzero().squeeze(1)
    size = probabilities.square().sum(dim=0) + pixels
    return _class_mean(1 - 2 * overlap[present] / size[present], present, weight)


def lovasz(logits: Tensor, target: Tensor, *, ignore: int, weight: Tensor | None = None) -> Tensor:
    """Lovasz-softmax: the convex surrogate of ``1 - IoU``, its mean over the classes that the target holds.

    Berman et al., "The Lovasz-Softmax loss" (CVPR 2018), equations 9 to 12, over all pixels of the batch that count.

    Args:
        logits, target, ignore, weight: as for ``dice``.
    """
    logits, target, weight = _widen(logits, target, weight)
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


class PixelLoss(Protocol):
    """A loss with its settings filled in."""

    def __call__(self, logits: Tensor, target: Tensor, *, ignore: int, weight: Tensor | None) -> Tensor: ...


LOSSES: dict[str, Callable[[LossConfig], PixelLoss]] = {
    "cross_entropy": lambda config: functools.partial(cross_entropy, label_smoothing=config.label_smoothing),
    "ohem": lambda config: functools.partial(
        ohem, thresh=config.ohem_thresh, min_kept=config.ohem_min_kept, label_smoothing=config.label_smoothing
    ),
    "focal": lambda config: functools.partial(focal, gamma=config.focal_gamma),
    "dice": lambda config: dice,
    "lovasz": lambda config: lovasz,
}
SMOOTHED = ("cross_entropy", "ohem")


def valid_weight(target: Tensor, *, ignore: int, weight: Tensor | None = None) -> Tensor:
    """How much a target counts: its pixels that are not ignored, or the sum of their classes' weights.

    Args:
        target, ignore, weight: as for ``cross_entropy``.

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


def _widen(logits: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits and weights in float32 or wider, class ids in int64."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits, target.long(), None if weight is None else weight.to(logits.dtype)


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

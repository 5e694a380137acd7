"""The losses against loops in double precision, and what must not happen: NaN, and gradients of ignored pixels."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pspnet_core.errors import ConfigError
from pspnet_core.network.pspnet import Logits
from pspnet_core.training.losses import LOSSES, LossConfig, class_weights, pspnet_loss, valid_weight

TYPES = [torch.uint8, torch.int32, torch.int64, torch.uint16]
IGNORED = [0, 1, 11, 255]  # a class, and ids beyond the classes
few = settings(max_examples=40)


def _case(
    seed: int, classes: int, ignore: int, dtype: torch.dtype = torch.int64, share: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Logits ``(2, C, 3, 5)`` and targets with ignored pixels."""
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(0, 3, (2, classes, 3, 5))).float()
    target = random.integers(0, classes, (2, 3, 5))
    target[random.random(target.shape) < share] = ignore
    return logits, torch.from_numpy(target).to(dtype)


def _loss(
    logits: Tensor, target: Tensor, ignore: int = 255, *, weight: Tensor | None = None, **settings: Any
) -> Tensor:
    return pspnet_loss(Logits(logits, None), target, config=LossConfig(**settings), ignore=ignore, weight=weight)


def _weights(classes: int, weighted: bool) -> Tensor | None:
    return torch.linspace(0.2, 3, classes) if weighted else None


@dataclasses.dataclass
class Pixel:
    """A pixel that counts: its class, the weight of that class, and the probabilities of all."""

    truth: int
    weight: float
    probabilities: list[float]

    @property
    def surprise(self) -> float:
        return -math.log(self.probabilities[self.truth])


@dataclasses.dataclass
class Case:
    """Any number of classes, of equal weights or not, any id that is ignored and any type of target."""

    logits: Tensor
    target: Tensor
    ignore: int
    weight: Tensor | None

    @classmethod
    def drawn(cls, seed: int, classes: int, ignore: int, dtype: torch.dtype, weighted: bool) -> Case:
        return cls(*_case(seed, classes, ignore, dtype), ignore, _weights(classes, weighted))

    @property
    def pixels(self) -> list[Pixel]:
        """Those that count."""
        scores, ids = self.logits.double().numpy(), self.target.long().numpy()
        pixels = []
        for image, y, x in zip(*np.nonzero(ids != self.ignore), strict=True):
            truth = int(ids[image, y, x])
            powers = [math.exp(score) for score in scores[image, :, y, x]]
            factor = 1.0 if self.weight is None else float(self.weight[truth])
            pixels.append(Pixel(truth, factor, [power / sum(powers) for power in powers]))
        return pixels

    def loss(self, **settings: Any) -> Tensor:
        return _loss(self.logits, self.target, self.ignore, weight=self.weight, **settings)


ignored = st.sampled_from(IGNORED)
each_case = given(
    case=st.builds(Case.drawn, st.integers(0, 2**32), st.integers(2, 8), ignored, st.sampled_from(TYPES), st.booleans())
)


def _mean(values: list[float], weights: list[float]) -> float:
    total = sum(value * weight for value, weight in zip(values, weights, strict=True))
    return total / sum(weights) if sum(weights) else 0.0


def _class_mean(pixels: list[Pixel], weight: Tensor | None, loss: Callable[[int], float]) -> float:
    present = sorted({pixel.truth for pixel in pixels})
    return _mean([loss(label) for label in present], [1.0 if weight is None else float(weight[c]) for c in present])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@each_case
@few
def test_cross_entropy_is_the_mean_over_the_pixels_that_count(smoothing: float, case: Case) -> None:
    """With the soft label ``(1 - s) * truth + s / C``; a class's weight goes with its part of it."""
    pixels = case.pixels
    total = 0.0
    for pixel in pixels:
        for label, probability in enumerate(pixel.probabilities):
            soft = smoothing / len(pixel.probabilities) + (1 - smoothing if label == pixel.truth else 0.0)
            total -= soft * (1.0 if case.weight is None else float(case.weight[label])) * math.log(probability)
    count = sum(pixel.weight for pixel in pixels)
    found = case.loss(label_smoothing=smoothing)
    assert found.shape == ()
    assert found.item() == pytest.approx(total / count if count else 0.0, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kept", [1, 4, 15, 1000])
@pytest.mark.parametrize("threshold", [0.01, 0.4, 1.0])
@each_case
@settings(max_examples=10)
def test_ohem_takes_the_hard_pixels(threshold: float, kept: int, case: Case) -> None:
    pixels = sorted(case.pixels, key=lambda pixel: pixel.probabilities[pixel.truth])
    below = [pixel for pixel in pixels if pixel.probabilities[pixel.truth] < threshold]
    hard = below if len(below) >= kept else pixels[:kept]
    expected = _mean([pixel.surprise for pixel in hard], [pixel.weight for pixel in hard])
    found = case.loss(kind="ohem", ohem_thresh=threshold, ohem_min_kept=kept)
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("truths", "ignored", "thresh", "kept", "touched"),
    [
        # The hardest of the easy pixels top up the minimum.
        ((0.9, 0.6, 0.8, 0.99, 0.95), None, 0.7, 1, [1]),
        ((0.9, 0.6, 0.8, 0.99, 0.95), None, 0.7, 3, [0, 1, 2]),
        ((0.9, 0.6, 0.8, 0.99, 0.95), None, 0.5, 1, [1]),
        # More are hard than the minimum.
        ((0.1, 0.2, 0.3, 0.9), None, 0.7, 2, [0, 1, 2]),
        # Fewer count than the minimum.
        ((0.9, 0.6, 0.8, 0.99), 0, 0.7, 100_000, [1, 2, 3]),
        # The ignored one would be the hardest of all, if its id were taken for a class.
        ((0.95, 0.01, 0.9, 0.8), 1, 0.1, 2, [2, 3]),
        # All that tie with the last are taken.
        ((0.8, 0.8, 0.9, 0.8, 0.75), None, 0.5, 2, [0, 1, 3, 4]),
        ((0.5,) * 5, None, 0.5, 1, [0, 1, 2, 3, 4]),
    ],
)
@pytest.mark.parametrize("ignore", [0, 255])
def test_which_pixels_ohem_takes(
    truths: tuple[float, ...], ignored: int | None, thresh: float, kept: int, touched: list[int], ignore: int
) -> None:
    """A row of pixels of class 1 of 2, with these probabilities."""
    logits = torch.tensor([[0.0, math.log(p / (1 - p))] for p in truths]).T.reshape(1, 2, 1, -1).requires_grad_()
    target = torch.ones(1, 1, len(truths), dtype=torch.int64)
    if ignored is not None:
        target[..., ignored] = ignore
    weight = torch.tensor([1.0, 1e-3])
    loss = _loss(logits, target, ignore, weight=weight, kind="ohem", ohem_thresh=thresh, ohem_min_kept=kept)
    (slope,) = torch.autograd.grad(loss, logits)
    assert [pixel for pixel, moved in enumerate(slope[0, 1, 0] != 0) if moved] == touched


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
@each_case
@settings(max_examples=10)
def test_focal_plays_down_the_easy_pixels(gamma: float, case: Case) -> None:
    pixels = case.pixels
    values = [(1 - pixel.probabilities[pixel.truth]) ** gamma * pixel.surprise for pixel in pixels]
    expected = _mean(values, [pixel.weight for pixel in pixels])
    found = case.loss(kind="focal", focal_gamma=gamma)
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_defaults_are_the_papers() -> None:
    """Focal loss: Lin et al. 2017, section 4.1; the auxiliary weight: Zhao et al. 2017, section 3.3."""
    assert (LossConfig().focal_gamma, LossConfig().aux_weight) == (2.0, 0.4)


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
def test_focal_has_a_slope_where_the_network_is_sure(gamma: float) -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]]).T.reshape(1, 2, 1, 2).requires_grad_()
    _loss(logits, torch.tensor([[[0, 0]]]), kind="focal", focal_gamma=gamma).backward()
    assert logits.grad is not None
    # The right pixel pulls no more, the wrong one pulls with all its weight: half of the mean.
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, -0.5], [0.0, 0.5]]).reshape(1, 2, 1, 2))


@each_case
@few
def test_dice_of_the_classes_that_are_there(case: Case) -> None:
    pixels = case.pixels

    def loss(label: int) -> float:
        overlap = sum(pixel.probabilities[label] for pixel in pixels if pixel.truth == label)
        size = sum(pixel.probabilities[label] ** 2 + (pixel.truth == label) for pixel in pixels)
        return 1 - 2 * overlap / size

    expected = _class_mean(pixels, case.weight, loss)
    assert case.loss(kind="dice").item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@each_case
@few
def test_lovasz_of_the_classes_that_are_there(case: Case) -> None:
    """By the definition of the Lovasz extension: the errors as areas under growing sets of wrong pixels."""
    pixels = case.pixels

    def jaccard_loss(label: int, wrong: list[int]) -> float:
        """1 - IoU when exactly these pixels are wrong about the class."""
        truth = {index for index, pixel in enumerate(pixels) if pixel.truth == label}
        predicted = truth ^ set(wrong)
        return 1 - len(truth & predicted) / len(truth | predicted)

    def loss(label: int) -> float:
        errors = [abs((pixel.truth == label) - pixel.probabilities[label]) for pixel in pixels]
        order = sorted(range(len(errors)), key=lambda index: -errors[index])
        total = 0.0
        for position, index in enumerate(order):
            step = jaccard_loss(label, order[: position + 1]) - jaccard_loss(label, order[:position])
            total += errors[index] * step
        return total

    expected = _class_mean(pixels, case.weight, loss)
    assert case.loss(kind="lovasz").item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
class TestEveryLoss:
    """What holds for every row of the table."""

    @pytest.fixture
    def loss(self, kind: str) -> Callable[..., Tensor]:
        return functools.partial(_loss, kind=kind, ohem_min_kept=4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("ignore", [0, 255])
    @pytest.mark.parametrize("weight", [None, torch.ones(3), torch.zeros(3)], ids=["equal", "weighted", "weightless"])
    def test_nothing_that_counts(
        self, loss: Callable[..., Tensor], dtype: torch.dtype, ignore: int, weight: Tensor | None
    ) -> None:
        """All pixels are ignored, or all classes are of no weight."""
        logits, target = _case(0, 3, ignore)
        logits = logits.to(dtype).requires_grad_()
        if weight is None or weight.any():
            target = torch.full_like(target, ignore)
        value = loss(logits, target, ignore, weight=weight)
        value.backward()
        assert value.item() == 0
        assert logits.grad is not None
        assert torch.equal(logits.grad, torch.zeros_like(logits))

    @pytest.mark.parametrize("ignore", IGNORED)
    def test_ignored_pixels_get_no_gradient(self, loss: Callable[..., Tensor], ignore: int) -> None:
        logits, target = _case(5, 4, ignore)
        logits.requires_grad_()
        loss(logits, target, ignore).backward()
        assert logits.grad is not None
        moved = logits.grad.abs().sum(dim=1) > 0
        assert not moved[target == ignore].any()
        assert moved.any()

    def test_ignored_pixels_do_not_dilute_the_loss(self, loss: Callable[..., Tensor]) -> None:
        """The same pixels with many ignored ones beside them have the same loss."""
        logits, target = _case(7, 4, 255, share=0.0)
        wide = torch.cat([logits, torch.randn(2, 4, 3, 50)], dim=-1)
        padded = F.pad(target, (0, 50), value=255)
        torch.testing.assert_close(loss(wide, padded), loss(logits, target))

    def test_narrow_logits_are_widened_first(self, loss: Callable[..., Tensor]) -> None:
        logits, target = _case(9, 4, 255)
        narrow = (logits * 10).bfloat16().requires_grad_()
        value = loss(narrow, target)
        value.backward()
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(narrow.float(), target))
        assert narrow.grad is not None and narrow.grad.dtype == torch.bfloat16

    def test_gradients_are_those_of_the_values(self, loss: Callable[..., Tensor]) -> None:
        logits, target = _case(11, 3, 255)
        weight = torch.tensor([0.5, 1.0, 2.0]).double()
        wide = logits.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: loss(x, target, weight=weight), wide)

    def test_logits_of_any_size_stay_finite(self, loss: Callable[..., Tensor]) -> None:
        for scale in (0.0, 1e-30, 1e4):
            logits, target = _case(15, 4, 255)
            logits = (logits * scale).requires_grad_()
            value = loss(logits, target)
            (slope,) = torch.autograd.grad(value, logits)
            assert value.isfinite() and slope.isfinite().all()


@pytest.mark.parametrize("kind", ["cross_entropy", "focal"])
@pytest.mark.parametrize("weighted", [True, False])
def test_parts_by_their_share_make_the_whole(kind: str, weighted: bool) -> None:
    """Images with unequal ignored shares, one of them wholly ignored, in parts as workers and passes see them."""
    weight = _weights(4, weighted)
    cases = [_case(seed, 4, 255, share=share) for seed, share in enumerate((0.0, 0.8, 1.0, 0.3))]
    logits, target = (torch.cat(parts).requires_grad_(i == 0) for i, parts in enumerate(zip(*cases, strict=True)))
    whole = _loss(logits, target, weight=weight, kind=kind)
    (expected,) = torch.autograd.grad(whole, logits)
    counts = [valid_weight(part, ignore=255, weight=weight) for part in target.split(2)]
    found = torch.zeros(())
    for part, truth, count in zip(logits.split(2), target.split(2), counts, strict=True):
        found = found + (count / sum(counts)).float() * _loss(part, truth, weight=weight, kind=kind)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(torch.autograd.grad(found, logits)[0], expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_target_counts_by_its_pixels_or_their_weights(dtype: torch.dtype) -> None:
    target = torch.tensor([[[0, 1, 1], [255, 2, 255]]]).to(dtype)
    assert valid_weight(target, ignore=255).item() == 4
    assert valid_weight(target, ignore=0).item() == 5
    weight = torch.tensor([1.0, 10.0, 100.0])
    assert valid_weight(target, ignore=255, weight=weight).item() == pytest.approx(121)


def test_more_pixels_count_than_float32_can() -> None:
    target = torch.zeros(1, 1, dtype=torch.uint8).expand(1, 2**24 + 3)[None]
    assert valid_weight(target, ignore=255).item() == 2**24 + 3


@pytest.mark.parametrize("kind", LOSSES)
def test_the_auxiliary_loss_is_the_same_one_and_counts_by_its_weight(kind: str) -> None:
    """By default two fifths; the settings reach both outputs."""
    main, target = _case(1, 4, 255)
    aux = _case(2, 4, 255)[0]
    given: dict[str, Any] = {"kind": kind, "ohem_thresh": 0.3, "ohem_min_kept": 3, "focal_gamma": 1.5}
    first, second = (_loss(logits, target, **given) for logits in (main, aux))
    for changes, share in (({}, 0.4), ({"aux_weight": 0.7}, 0.7)):
        config = LossConfig(**given | changes)
        found = pspnet_loss(Logits(main, aux), target, config=config, ignore=255)
        torch.testing.assert_close(found, first + share * second)


def test_ohem_smooths_the_labels_as_cross_entropy_does() -> None:
    logits, target = _case(1, 4, 255)
    found = _loss(logits, target, kind="ohem", ohem_thresh=1.0, label_smoothing=0.1)
    torch.testing.assert_close(found, _loss(logits, target, label_smoothing=0.1))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"kind": "hinge"}, "loss=hinge: choose one of cross_entropy, ohem, focal, dice, lovasz"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0: choose a share in [0, 1)"),
        ({"label_smoothing": math.nan}, "label_smoothing=nan: choose a share"),
        ({"label_smoothing": 0.1, "kind": "dice"}, "label_smoothing=0.1: works with cross_entropy and ohem"),
        ({"ohem_thresh": 0.0}, "ohem_thresh=0.0: choose a probability"),
        ({"ohem_thresh": 1.1}, "ohem_thresh=1.1: choose a probability"),
        ({"ohem_min_kept": 0}, "ohem_min_kept=0: keep at least 1 pixel"),
        ({"focal_gamma": -1.0}, "focal_gamma=-1.0: give a number of at least 0"),
        ({"focal_gamma": math.inf}, "focal_gamma=inf: give a number of at least 0"),
        ({"aux_weight": -0.1}, "aux_weight=-0.1: give a weight of at least 0"),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LossConfig(**changes)
    assert str(caught.value).startswith(line)


@given(st.lists(st.integers(1, 10**12), min_size=2, max_size=20), st.floats(0, 1.5))
def test_class_weights_follow_the_frequency_and_have_mean_one(pixels: list[int], power: float) -> None:
    weights = class_weights(torch.tensor(pixels), power=power)
    assert weights.dtype == torch.float32
    frequency = np.array(pixels, np.float64) / sum(pixels)
    expected = frequency**-power
    expected /= (expected * frequency).sum()
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-5)
    assert (weights.double().numpy() * frequency).sum() == pytest.approx(1, rel=1e-5)


def test_a_class_without_pixels_keeps_weight_one() -> None:
    weights = class_weights(torch.tensor([900, 0, 100]), power=0.5)
    assert weights[1] == 1
    torch.testing.assert_close(weights[[0, 2]], class_weights(torch.tensor([900, 100]), power=0.5))
    assert class_weights(torch.zeros(3, dtype=torch.int64), power=0.5).tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", LOSSES)
def test_deterministic_mode_computes_the_same(kind: str) -> None:
    """It takes another way through the kernels, by rows of pixels."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 5, (2, 5, 6), generator=generator)  # 4 is ignored
    found = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            inputs = logits.clone().requires_grad_()
            weight = torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64)
            value = _loss(inputs, target, 4, weight=weight, kind=kind, ohem_min_kept=10)
            value.backward()
        finally:
            torch.use_deterministic_algorithms(False)
        assert inputs.grad is not None
        found.append((value.detach(), inputs.grad))
    torch.testing.assert_close(found[1], found[0])

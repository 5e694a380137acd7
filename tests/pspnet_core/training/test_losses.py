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
from pspnet_core.training.losses import (
    LOSSES,
    LossConfig,
    class_weights,
    cross_entropy,
    dice,
    focal,
    lovasz,
    ohem,
    pspnet_loss,
    valid_weight,
)

TYPES = [torch.uint8, torch.int32, torch.int64, torch.uint16]
IGNORED = [0, 1, 11, 255]  # a class, and ids beyond the classes
cases = given(st.integers(0, 2**32), st.integers(2, 8), st.sampled_from(IGNORED), st.sampled_from(TYPES), st.booleans())
few = settings(deadline=None, derandomize=True, max_examples=40)


def _case(
    seed: int, classes: int, ignore: int, dtype: torch.dtype = torch.int64, share: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Logits ``(2, C, 3, 5)`` and targets with ignored pixels."""
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(0, 3, (2, classes, 3, 5))).float()
    target = random.integers(0, classes, (2, 3, 5))
    target[random.random(target.shape) < share] = ignore
    return logits, torch.from_numpy(target).to(dtype)


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


def _pixels(logits: Tensor, target: Tensor, ignore: int, weight: Tensor | None) -> list[Pixel]:
    scores, ids = logits.detach().double().numpy(), target.long().numpy()
    pixels = []
    for image, y, x in np.ndindex(ids.shape):
        truth = int(ids[image, y, x])
        if truth == ignore:
            continue
        powers = [math.exp(score) for score in scores[image, :, y, x]]
        factor = 1.0 if weight is None else float(weight[truth])
        pixels.append(Pixel(truth, factor, [power / sum(powers) for power in powers]))
    return pixels


def _mean(values: list[float], weights: list[float]) -> float:
    total = sum(value * weight for value, weight in zip(values, weights, strict=True))
    return total / sum(weights) if sum(weights) else 0.0


def _by_loops(logits: Tensor, target: Tensor, ignore: int, weight: Tensor | None) -> float:
    pixels = _pixels(logits, target, ignore, weight)
    return _mean([pixel.surprise for pixel in pixels], [pixel.weight for pixel in pixels])


def _class_mean(pixels: list[Pixel], weight: Tensor | None, loss: Callable[[int], float]) -> float:
    present = sorted({pixel.truth for pixel in pixels})
    return _mean([loss(label) for label in present], [1.0 if weight is None else float(weight[c]) for c in present])


@cases
@few
def test_cross_entropy_is_the_mean_over_the_pixels_that_count(
    seed: int, classes: int, ignore: int, dtype: torch.dtype, weighted: bool
) -> None:
    logits, target = _case(seed, classes, ignore, dtype)
    weight = _weights(classes, weighted)
    found = cross_entropy(logits, target, ignore=ignore, weight=weight)
    assert found.shape == ()
    assert found.item() == pytest.approx(_by_loops(logits, target, ignore, weight), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("ignore", [1, 4, 255, 65535])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_weighted_mean_is_torchs(ignore: int, smoothing: float) -> None:
    logits, target = _case(3, 4, ignore)
    weight = torch.tensor([0.1, 2.0, 0.7, 1.3])
    expected = F.cross_entropy(logits, target, weight=weight, ignore_index=ignore, label_smoothing=smoothing)
    found = cross_entropy(logits, target, ignore=ignore, weight=weight, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected)


@cases
@few
def test_smoothing_spreads_a_share_of_the_label_over_all_classes(
    seed: int, classes: int, ignore: int, dtype: torch.dtype, weighted: bool
) -> None:
    """Cross-entropy with the soft label ``(1 - s) * truth + s / C``; a class's weight goes with its part of it."""
    logits, target = _case(seed, classes, ignore, dtype)
    weight = _weights(classes, weighted)
    pixels = _pixels(logits, target, ignore, weight)
    total = 0.0
    for pixel in pixels:
        for label, probability in enumerate(pixel.probabilities):
            soft = 0.2 / classes + (0.8 if label == pixel.truth else 0.0)
            total -= soft * (1.0 if weight is None else float(weight[label])) * math.log(probability)
    count = sum(pixel.weight for pixel in pixels)
    found = cross_entropy(logits, target, ignore=ignore, weight=weight, label_smoothing=0.2)
    assert found.item() == pytest.approx(total / count if count else 0.0, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kept", [1, 4, 15, 1000])
@pytest.mark.parametrize("threshold", [0.01, 0.4, 1.0])
@cases
@settings(deadline=None, derandomize=True, max_examples=10)
def test_ohem_takes_the_hard_pixels(
    threshold: float, kept: int, seed: int, classes: int, ignore: int, dtype: torch.dtype, weighted: bool
) -> None:
    logits, target = _case(seed, classes, ignore, dtype)
    weight = _weights(classes, weighted)
    pixels = sorted(_pixels(logits, target, ignore, weight), key=lambda pixel: pixel.probabilities[pixel.truth])
    below = [pixel for pixel in pixels if pixel.probabilities[pixel.truth] < threshold]
    hard = below if len(below) >= kept else pixels[:kept]
    expected = _mean([pixel.surprise for pixel in hard], [pixel.weight for pixel in hard])
    found = ohem(logits, target, ignore=ignore, weight=weight, thresh=threshold, min_kept=kept)
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def _by_probability(*truths: float) -> tuple[Tensor, Tensor]:
    """One row of pixels of class 1 of 2, with these probabilities."""
    logits = torch.tensor([[0.0, math.log(p / (1 - p))] for p in truths]).T.reshape(1, 2, 1, -1)
    return logits.requires_grad_(), torch.ones(1, 1, len(truths), dtype=torch.int64)


def _touched(logits: Tensor, target: Tensor, **settings: Any) -> list[int]:
    """Which pixels get a gradient from ``ohem``."""
    (slope,) = torch.autograd.grad(ohem(logits, target, **settings), logits)
    return [pixel for pixel, moved in enumerate(slope[0, 1, 0] != 0) if moved]


def test_ohem_tops_up_with_the_hardest_of_the_easy_pixels() -> None:
    logits, target = _by_probability(0.9, 0.6, 0.8, 0.99, 0.95)
    assert _touched(logits, target, ignore=255, thresh=0.7, min_kept=1) == [1]
    assert _touched(logits, target, ignore=255, thresh=0.7, min_kept=3) == [0, 1, 2]
    assert _touched(logits, target, ignore=255, thresh=0.5, min_kept=1) == [1]


def test_ohem_keeps_more_than_the_minimum_when_more_are_hard() -> None:
    logits, target = _by_probability(0.1, 0.2, 0.3, 0.9)
    assert _touched(logits, target, ignore=255, thresh=0.7, min_kept=2) == [0, 1, 2]


def test_ohem_with_fewer_pixels_than_the_minimum_takes_them_all() -> None:
    logits, target = _by_probability(0.9, 0.6, 0.8, 0.99)
    target[..., 0] = 255
    assert _touched(logits, target, ignore=255, thresh=0.7, min_kept=100_000) == [1, 2, 3]


def test_ohem_does_not_count_ignored_pixels_among_the_kept() -> None:
    """The ignored one would be the hardest of all, if its id were taken for a class."""
    logits, target = _by_probability(0.95, 0.01, 0.9, 0.8)
    for ignore in (0, 255):
        target[..., 1] = ignore
        assert _touched(logits, target, ignore=ignore, thresh=0.1, min_kept=2) == [2, 3]


def test_ohem_takes_all_that_tie_with_the_last() -> None:
    logits, target = _by_probability(0.8, 0.8, 0.9, 0.8, 0.75)
    assert _touched(logits, target, ignore=255, thresh=0.5, min_kept=2) == [0, 1, 3, 4]
    uniform = torch.zeros(1, 2, 1, 5, requires_grad=True)
    assert _touched(uniform, target, ignore=255, thresh=0.5, min_kept=1) == [0, 1, 2, 3, 4]


def test_weights_do_not_make_a_pixel_harder() -> None:
    logits, target = _by_probability(0.2, 0.9)
    assert _touched(logits, target, ignore=255, thresh=0.7, min_kept=1, weight=torch.tensor([1.0, 1e-3])) == [0]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
@cases
@settings(deadline=None, derandomize=True, max_examples=10)
def test_focal_plays_down_the_easy_pixels(
    gamma: float, seed: int, classes: int, ignore: int, dtype: torch.dtype, weighted: bool
) -> None:
    logits, target = _case(seed, classes, ignore, dtype)
    weight = _weights(classes, weighted)
    pixels = _pixels(logits, target, ignore, weight)
    values = [(1 - pixel.probabilities[pixel.truth]) ** gamma * pixel.surprise for pixel in pixels]
    expected = _mean(values, [pixel.weight for pixel in pixels])
    found = focal(logits, target, ignore=ignore, weight=weight, gamma=gamma)
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
def test_focal_has_a_slope_where_the_network_is_sure(gamma: float) -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]]).T.reshape(1, 2, 1, 2).requires_grad_()
    focal(logits, torch.tensor([[[0, 0]]]), ignore=255, gamma=gamma).backward()
    assert logits.grad is not None
    # The right pixel pulls no more, the wrong one pulls with all its weight: half of the mean.
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, -0.5], [0.0, 0.5]]).reshape(1, 2, 1, 2))


@cases
@few
def test_dice_of_the_classes_that_are_there(
    seed: int, classes: int, ignore: int, dtype: torch.dtype, weighted: bool
) -> None:
    logits, target = _case(seed, classes, ignore, dtype)
    weight = _weights(classes, weighted)
    pixels = _pixels(logits, target, ignore, weight)

    def loss(label: int) -> float:
        overlap = sum(pixel.probabilities[label] for pixel in pixels if pixel.truth == label)
        size = sum(pixel.probabilities[label] ** 2 + (pixel.truth == label) for pixel in pixels)
        return 1 - 2 * overlap / size

    found = dice(logits, target, ignore=ignore, weight=weight)
    assert found.item() == pytest.approx(_class_mean(pixels, weight, loss), rel=1e-4, abs=1e-6)


@cases
@few
def test_lovasz_of_the_classes_that_are_there(
    seed: int, classes: int, ignore: int, dtype: torch.dtype, weighted: bool
) -> None:
    """By the definition of the Lovasz extension: the errors as areas under growing sets of wrong pixels."""
    logits, target = _case(seed, classes, ignore, dtype)
    weight = _weights(classes, weighted)
    pixels = _pixels(logits, target, ignore, weight)

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

    found = lovasz(logits, target, ignore=ignore, weight=weight)
    assert found.item() == pytest.approx(_class_mean(pixels, weight, loss), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss", [dice, lovasz])
def test_region_losses_of_hard_answers_are_those_of_the_sets(loss: Callable[..., Tensor]) -> None:
    """With probabilities of 0 and 1, Dice is 1 - 2|A & B| / (|A| + |B|) and Lovasz 1 - IoU."""
    random = np.random.default_rng(2)
    truth, answer = random.integers(0, 3, (2, 4, 4)), random.integers(0, 3, (2, 4, 4))
    logits = 200 * F.one_hot(torch.from_numpy(answer), 3).movedim(-1, 1).float()
    expected = []
    for label in range(3):
        a, b = truth == label, answer == label
        both, either = (a & b).sum(), (a | b).sum()
        expected.append(1 - (2 * both / (both + either) if loss is dice else both / either))
    assert loss(logits, torch.from_numpy(truth), ignore=255).item() == pytest.approx(float(np.mean(expected)), rel=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
class TestEveryLoss:
    """What holds for every row of the table."""

    @pytest.fixture
    def loss(self, kind: str) -> Callable[..., Tensor]:
        return functools.partial(LOSSES[kind](LossConfig(kind=kind, ohem_min_kept=4)), weight=None)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("ignore", [0, 255])
    @pytest.mark.parametrize("weighted", [True, False])
    def test_nothing_but_ignored_pixels(
        self, loss: Callable[..., Tensor], dtype: torch.dtype, ignore: int, weighted: bool
    ) -> None:
        logits = _case(0, 3, ignore)[0].to(dtype).requires_grad_()
        weight = torch.ones(3, dtype=dtype) if weighted else None
        value = loss(logits, torch.full((2, 3, 5), ignore), ignore=ignore, weight=weight)
        value.backward()
        assert value.item() == 0
        assert logits.grad is not None
        assert torch.equal(logits.grad, torch.zeros_like(logits))

    def test_classes_of_no_weight_give_nothing_to_divide_by(self, loss: Callable[..., Tensor]) -> None:
        logits, target = _case(0, 3, 255)
        logits.requires_grad_()
        value = loss(logits, target, ignore=255, weight=torch.zeros(3))
        value.backward()
        assert value.item() == 0
        assert logits.grad is not None
        assert torch.equal(logits.grad, torch.zeros_like(logits))

    @pytest.mark.parametrize("ignore", IGNORED)
    def test_ignored_pixels_get_no_gradient(self, loss: Callable[..., Tensor], ignore: int) -> None:
        logits, target = _case(5, 4, ignore)
        logits.requires_grad_()
        loss(logits, target, ignore=ignore).backward()
        assert logits.grad is not None
        moved = logits.grad.abs().sum(dim=1) > 0
        assert not moved[target == ignore].any()
        assert moved.any()

    def test_ignored_pixels_do_not_dilute_the_loss(self, loss: Callable[..., Tensor]) -> None:
        """The same pixels with many ignored ones beside them have the same loss."""
        logits, target = _case(7, 4, 255, share=0.0)
        wide = torch.cat([logits, torch.randn(2, 4, 3, 50)], dim=-1)
        padded = F.pad(target, (0, 50), value=255)
        torch.testing.assert_close(loss(wide, padded, ignore=255), loss(logits, target, ignore=255))

    def test_narrow_logits_are_widened_first(self, loss: Callable[..., Tensor]) -> None:
        logits, target = _case(9, 4, 255)
        narrow = (logits * 10).bfloat16().requires_grad_()
        value = loss(narrow, target, ignore=255)
        value.backward()
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(narrow.float(), target, ignore=255))
        assert narrow.grad is not None and narrow.grad.dtype == torch.bfloat16

    def test_gradients_are_those_of_the_values(self, loss: Callable[..., Tensor]) -> None:
        logits, target = _case(11, 3, 255)
        weight = torch.tensor([0.5, 1.0, 2.0]).double()
        wide = logits.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: loss(x, target, ignore=255, weight=weight), wide)

    def test_a_step_down_the_gradient_lowers_it(self, loss: Callable[..., Tensor]) -> None:
        logits, target = _case(13, 5, 255)
        logits.requires_grad_()
        before = loss(logits, target, ignore=255)
        (slope,) = torch.autograd.grad(before, logits)
        assert loss(logits - 0.1 * slope, target, ignore=255) < before

    def test_logits_of_any_size_stay_finite(self, loss: Callable[..., Tensor]) -> None:
        for scale in (0.0, 1e-30, 1e4):
            logits, target = _case(15, 4, 255)
            logits = (logits * scale).requires_grad_()
            value = loss(logits, target, ignore=255)
            (slope,) = torch.autograd.grad(value, logits)
            assert value.isfinite() and slope.isfinite().all()


@pytest.mark.parametrize("kind", ["cross_entropy", "focal"])
@pytest.mark.parametrize("weighted", [True, False])
def test_parts_by_their_share_make_the_whole(kind: str, weighted: bool) -> None:
    """Images with unequal ignored shares, one of them wholly ignored, in parts as workers and passes see them."""
    loss = LOSSES[kind](LossConfig(kind=kind))
    weight = _weights(4, weighted)
    cases = [_case(seed, 4, 255, share=share) for seed, share in enumerate((0.0, 0.8, 1.0, 0.3))]
    logits, target = (torch.cat(parts).requires_grad_(i == 0) for i, parts in enumerate(zip(*cases, strict=True)))
    whole = loss(logits, target, ignore=255, weight=weight)
    (expected,) = torch.autograd.grad(whole, logits)
    counts = [valid_weight(part, ignore=255, weight=weight) for part in target.split(2)]
    found = torch.zeros(())
    for part, truth, count in zip(logits.split(2), target.split(2), counts, strict=True):
        found = found + (count / sum(counts)).float() * loss(part, truth, ignore=255, weight=weight)
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


@pytest.mark.parametrize("weighted", [True, False])
def test_the_auxiliary_loss_counts_two_fifths(weighted: bool) -> None:
    main, target = _case(1, 4, 255)
    aux = _case(2, 4, 255)[0]
    weight = torch.tensor([0.1, 2.0, 0.7, 1.3]) if weighted else None
    expected = _by_loops(main, target, 255, weight) + 0.4 * _by_loops(aux, target, 255, weight)
    found = pspnet_loss(Logits(main, aux), target, ignore=255, weight=weight)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_config_chooses_the_loss_of_both_outputs(kind: str) -> None:
    config = LossConfig(kind=kind, ohem_thresh=0.3, ohem_min_kept=3, focal_gamma=1.5, aux_weight=0.7)
    functions: dict[str, Callable[..., Tensor]] = {
        "cross_entropy": cross_entropy,
        "ohem": functools.partial(ohem, thresh=0.3, min_kept=3),
        "focal": functools.partial(focal, gamma=1.5),
        "dice": dice,
        "lovasz": lovasz,
    }
    main, target = _case(1, 4, 255)
    aux = _case(2, 4, 255)[0]
    main_loss, aux_loss = (functions[kind](logits, target, ignore=255) for logits in (main, aux))
    found = pspnet_loss(Logits(main, aux), target, ignore=255, config=config)
    torch.testing.assert_close(found, main_loss + 0.7 * aux_loss)


@pytest.mark.parametrize("kind", ["cross_entropy", "ohem"])
def test_the_config_smooths_the_labels(kind: str) -> None:
    logits, target = _case(1, 4, 255)
    functions: dict[str, Callable[..., Tensor]] = {
        "cross_entropy": cross_entropy,
        "ohem": functools.partial(ohem, min_kept=1),
    }
    config = LossConfig(kind=kind, label_smoothing=0.1, ohem_min_kept=1)
    found = pspnet_loss(Logits(logits, None), target, ignore=255, config=config)
    torch.testing.assert_close(found, functions[kind](logits, target, ignore=255, label_smoothing=0.1))


def test_without_auxiliary_logits_the_main_loss_is_all() -> None:
    logits, target = _case(1, 4, 255)
    expected = _by_loops(logits, target, 255, None)
    assert pspnet_loss(Logits(logits, None), target, ignore=255).item() == pytest.approx(expected, rel=1e-5)


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
        ({"focal_gamma": math.inf}, "focal_gamma=inf: give a number"),
        ({"aux_weight": -0.1}, "aux_weight=-0.1: give a weight of at least 0"),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LossConfig(**changes)
    assert str(caught.value).startswith(line)


@given(st.lists(st.integers(1, 10**12), min_size=2, max_size=20), st.floats(0, 1.5))
@settings(deadline=None, derandomize=True)
def test_class_weights_follow_the_frequency_and_have_mean_one(pixels: list[int], power: float) -> None:
    weights = class_weights(torch.tensor(pixels), power=power)
    assert weights.dtype == torch.float32
    frequency = np.array(pixels, np.float64) / sum(pixels)
    expected = frequency**-power
    expected /= (expected * frequency).sum()
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-5)
    assert (weights.double().numpy() * frequency).sum() == pytest.approx(1, rel=1e-5)


def test_inverse_frequency_gives_every_class_the_same_say() -> None:
    pixels = torch.tensor([10, 1000, 200])
    say = class_weights(pixels, power=1.0) * pixels
    torch.testing.assert_close(say, say[0].expand(3))


def test_a_class_without_pixels_keeps_weight_one() -> None:
    weights = class_weights(torch.tensor([900, 0, 100]), power=0.5)
    assert weights[1] == 1
    torch.testing.assert_close(weights[[0, 2]], class_weights(torch.tensor([900, 100]), power=0.5))


def test_weights_without_any_pixel() -> None:
    assert class_weights(torch.zeros(3, dtype=torch.int64), power=0.5).tolist() == [1, 1, 1]


def test_power_zero_is_equal_weights() -> None:
    assert class_weights(torch.tensor([1, 10**9, 5]), power=0.0).tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("kind", LOSSES)
def test_deterministic_mode_computes_the_same(kind: str) -> None:
    """It takes another way through the kernels, by rows of pixels."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 5, (2, 5, 6), generator=generator)  # 4 is ignored
    loss = LOSSES[kind](LossConfig(kind=kind, ohem_min_kept=10))
    found = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            inputs = logits.clone().requires_grad_()
            value = loss(inputs, target, ignore=4, weight=torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64))
            value.backward()
        finally:
            torch.use_deterministic_algorithms(False)
        assert inputs.grad is not None
        found.append((value.detach(), inputs.grad))
    torch.testing.assert_close(found[1], found[0])

"""The loss against loops in double precision, and what must not happen: NaN, and gradients of ignored pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pspnet_core.losses import class_weights, cross_entropy, pspnet_loss
from pspnet_core.pspnet import Logits

TYPES = [torch.uint8, torch.int32, torch.int64, torch.uint16]


def _case(
    seed: int, classes: int, ignore: int, dtype: torch.dtype = torch.int64, share: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Logits ``(2, C, 3, 5)`` and targets with ignored pixels."""
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(0, 3, (2, classes, 3, 5))).float()
    target = random.integers(0, classes, (2, 3, 5))
    target[random.random(target.shape) < share] = ignore
    return logits, torch.from_numpy(target).to(dtype)


def _by_loops(logits: Tensor, target: Tensor, ignore: int, weight: Tensor | None) -> float:
    scores, ids = logits.detach().double().numpy(), target.long().numpy()
    total = scale = 0.0
    for image, y, x in np.ndindex(ids.shape):
        truth = int(ids[image, y, x])
        if truth == ignore:
            continue
        pixel = scores[image, :, y, x]
        factor = 1.0 if weight is None else float(weight[truth])
        total += factor * (math.log(sum(math.exp(score) for score in pixel)) - pixel[truth])
        scale += factor
    return total / scale if scale else 0.0


@given(
    st.integers(0, 2**32), st.integers(2, 8), st.sampled_from([0, 1, 11, 255]), st.sampled_from(TYPES), st.booleans()
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_mean_over_the_pixels_that_count(
    seed: int, classes: int, ignore: int, dtype: torch.dtype, weighted: bool
) -> None:
    logits, target = _case(seed, classes, ignore, dtype)
    weight = torch.linspace(0.2, 3, classes) if weighted else None
    found = cross_entropy(logits, target, ignore=ignore, weight=weight)
    assert found.shape == ()
    assert found.item() == pytest.approx(_by_loops(logits, target, ignore, weight), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("ignore", [1, 4, 255, 65535])
def test_weighted_mean_is_torchs(ignore: int) -> None:
    logits, target = _case(3, 4, ignore)
    weight = torch.tensor([0.1, 2.0, 0.7, 1.3])
    expected = F.cross_entropy(logits, target, weight=weight, ignore_index=ignore)
    torch.testing.assert_close(cross_entropy(logits, target, ignore=ignore, weight=weight), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ignore", [0, 255])
@pytest.mark.parametrize("weighted", [True, False])
def test_nothing_but_ignored_pixels(dtype: torch.dtype, ignore: int, weighted: bool) -> None:
    logits = _case(0, 3, ignore)[0].to(dtype).requires_grad_()
    weight = torch.ones(3, dtype=dtype) if weighted else None
    loss = cross_entropy(logits, torch.full((2, 3, 5), ignore), ignore=ignore, weight=weight)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_classes_of_no_weight_give_nothing_to_divide_by() -> None:
    logits, target = _case(0, 3, 255)
    assert cross_entropy(logits, target, ignore=255, weight=torch.zeros(3)).item() == 0


def test_ignored_pixels_get_no_gradient_and_the_others_do() -> None:
    logits, target = _case(5, 4, 255)
    logits.requires_grad_()
    cross_entropy(logits, target, ignore=255).backward()
    assert logits.grad is not None
    moved = logits.grad.abs().sum(dim=1) > 0
    assert torch.equal(moved, target != 255)
    assert 0 < moved.sum() < moved.numel()


def test_ignored_pixels_do_not_dilute_the_loss() -> None:
    """The same pixels with many ignored ones beside them have the same loss."""
    logits, target = _case(7, 4, 255, share=0.0)
    wide = torch.cat([logits, torch.randn(2, 4, 3, 50)], dim=-1)
    padded = F.pad(target, (0, 50), value=255)
    torch.testing.assert_close(cross_entropy(wide, padded, ignore=255), cross_entropy(logits, target, ignore=255))


@pytest.mark.parametrize("weighted", [True, False])
def test_the_auxiliary_loss_counts_two_fifths(weighted: bool) -> None:
    main, target = _case(1, 4, 255)
    aux = _case(2, 4, 255)[0]
    weight = torch.tensor([0.1, 2.0, 0.7, 1.3]) if weighted else None
    expected = _by_loops(main, target, 255, weight) + 0.4 * _by_loops(aux, target, 255, weight)
    found = pspnet_loss(Logits(main, aux), target, ignore=255, weight=weight)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_without_auxiliary_logits_the_main_loss_is_all() -> None:
    logits, target = _case(1, 4, 255)
    expected = _by_loops(logits, target, 255, None)
    assert pspnet_loss(Logits(logits, None), target, ignore=255).item() == pytest.approx(expected, rel=1e-5)


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

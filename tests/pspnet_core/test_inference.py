"""Labelling against plain formulations: torch's interpolation, softmax and argmax, and loops over views and windows.

Most tests use a PSPNet whose layers are one convolution, since what they check lies around the network.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pspnet_core import inference
from pspnet_core.errors import ConfigError
from pspnet_core.inference import (
    InferenceSettings,
    Prediction,
    Prepared,
    Segmenter,
    View,
    decide,
    interpolation_matrix,
)
from pspnet_core.pspnet import Logits, PSPNet, PSPNetConfig

CPU = torch.device("cpu")
Bytes = NDArray[np.uint8]


@pytest.fixture(autouse=True)
def plain_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number format on every CPU."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)


class OneConvolution(PSPNet):
    """A PSPNet whose coarse logits come from one convolution of the pixels, one cell for 8 x 8 of them."""

    def __init__(self, classes: int = 5, *, align_corners: bool = False) -> None:
        nn.Module.__init__(self)
        self.config = PSPNetConfig(classes=classes, align_corners=align_corners)
        generator = torch.Generator().manual_seed(classes)
        self.weight = nn.Parameter(torch.randn(classes, 3, 8, 8, generator=generator) / 500)
        self.inputs: list[tuple[int, ...]] = []

    def coarse(self, images: Tensor) -> Logits:
        """Logits ``(B, C, H // 8 + 1, W // 8 + 1)``."""
        self.inputs.append(tuple(images.shape))
        return Logits(F.conv2d(images.float() - 120, self.weight, stride=8, padding=4), None)


def _image(height: int, width: int, seed: int = 0) -> Bytes:
    """Coloured blotches: smooth enough that resizing keeps something of them."""
    random = np.random.default_rng((seed, height, width))
    small = Image.fromarray(random.integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def _upsampled(view: View, size: tuple[int, int], *, align_corners: bool) -> Tensor:
    full = F.interpolate(view.logits[None].double(), size=size, mode="bilinear", align_corners=align_corners)[0]
    return full.flip(-1) if view.mirrored else full


def _probabilities(views: Sequence[View], size: tuple[int, int], *, align_corners: bool) -> Tensor:
    """``(C, H, W)`` float64: the mean over the views of the softmax of the upsampled logits."""
    return torch.stack([_upsampled(view, size, align_corners=align_corners).softmax(0) for view in views]).mean(0)


def _assert_decision(mask: NDArray[Any], confidence: NDArray[np.float32], probabilities: Tensor) -> None:
    """The mask is the argmax (rounding aside, where two classes tie) and the confidence the probability."""
    classes, height, width = probabilities.shape
    assert mask.shape == confidence.shape == (height, width)
    assert mask.dtype == (np.uint8 if classes <= 256 else np.uint16)
    assert confidence.dtype == np.float32
    best, winner = probabilities.max(0)
    np.testing.assert_allclose(confidence, best.numpy(), atol=1e-4)
    chosen = probabilities.gather(0, torch.from_numpy(mask.astype(np.int64))[None])[0]
    np.testing.assert_allclose(chosen.numpy(), best.numpy(), atol=1e-4)
    top = probabilities.topk(2, dim=0).values
    clear = (top[0] - top[1] > 1e-3).numpy()
    np.testing.assert_array_equal(mask[clear], winner.numpy()[clear])


def _assert_same(found: Prediction, expected: Prediction) -> None:
    assert found.mask.shape == expected.mask.shape
    assert found.mask.dtype == expected.mask.dtype
    np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-4)
    assert (found.mask != expected.mask).mean() < 0.005


# --- interpolation -----------------------------------------------------------------------------------------------


@given(st.integers(1, 80), st.integers(1, 40), st.booleans())
@settings(deadline=None, derandomize=True)
def test_interpolation_matrix_is_torchs_interpolation(outputs: int, inputs: int, align_corners: bool) -> None:
    matrix = interpolation_matrix(outputs, inputs, align_corners=align_corners)
    assert matrix.shape == (outputs, inputs)
    assert matrix.dtype == torch.float32
    identity = torch.eye(inputs, dtype=torch.float64)[None]
    expected = F.interpolate(identity, size=outputs, mode="linear", align_corners=align_corners)[0].T
    torch.testing.assert_close(matrix.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix.sum(1), torch.ones(outputs))
    assert ((matrix != 0).sum(1) <= 2).all()


def _views(seed: int, classes: int, shapes: Sequence[tuple[int, int]], mirrored: Sequence[bool]) -> list[View]:
    generator = torch.Generator().manual_seed(seed)
    return [
        View(4 * torch.randn(classes, *shape, generator=generator), flag)
        for shape, flag in zip(shapes, mirrored, strict=True)
    ]


sides = st.tuples(st.integers(1, 40), st.integers(1, 40))
cells = st.tuples(st.integers(1, 7), st.integers(1, 7))


@given(
    st.integers(0, 2**32), st.integers(2, 9), sides, st.lists(st.tuples(cells, st.booleans()), min_size=1, max_size=4)
)
@settings(deadline=None, derandomize=True)
@pytest.mark.parametrize("align_corners", [True, False])
def test_decide_is_interpolation_softmax_and_argmax(
    align_corners: bool, seed: int, classes: int, size: tuple[int, int], inputs: list[tuple[tuple[int, int], bool]]
) -> None:
    views = _views(seed, classes, [shape for shape, _ in inputs], [flag for _, flag in inputs])
    mask, confidence = decide(views, *size, align_corners=align_corners)
    probabilities = _probabilities(views, size, align_corners=align_corners)
    _assert_decision(mask.numpy(), confidence.numpy(), probabilities)


@pytest.mark.parametrize("classes", [2, 256, 257, 300])
def test_ids_above_255_need_16_bits(classes: int) -> None:
    logits = torch.zeros(classes, 2, 2)
    logits[classes - 1] = 5
    mask, _ = decide([View(logits, False)], 5, 7, align_corners=False)
    assert mask.dtype == (torch.uint8 if classes <= 256 else torch.uint16)
    assert set(mask.numpy().ravel()) == {classes - 1}


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("classes", [5, 300])
@pytest.mark.parametrize("band", [1, 700, 5000])
def test_bands_do_not_show(monkeypatch: pytest.MonkeyPatch, band: int, classes: int, views: int) -> None:
    inputs = _views(0, classes, [(5, 7), (4, 3)][:views], [False, True][:views])
    whole = decide(inputs, 33, 47, align_corners=False)
    assert classes * 33 * 47 < inference.BAND_VALUES
    monkeypatch.setattr(inference, "BAND_VALUES", band)
    banded = decide(inputs, 33, 47, align_corners=False)
    _assert_same(*(Prediction(mask.numpy(), confidence.numpy()) for mask, confidence in (banded, whole)))


def test_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([1000.0, -1000.0, 999.0]).view(3, 1, 1)
    mask, confidence = decide([View(logits, False)], 2, 2, align_corners=False)
    assert (mask == 0).all()
    torch.testing.assert_close(confidence, torch.full((2, 2), 1 / (1 + math.exp(-1))))


# --- sizes and settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resize", "size", "scale", "expected"),
    [
        ("none", 0, 1.0, (48, 64)),
        ("none", 0, 1.5, (72, 96)),
        ("short", 24, 1.0, (24, 32)),
        ("short", 24, 0.5, (12, 16)),
        ("long", 96, 1.0, (72, 96)),
        ("long", 1, 1.0, (1, 1)),
        ("scale", 0.25, 1.0, (12, 16)),
        ("scale", 0.001, 1.0, (1, 1)),
    ],
)
def test_resize_rules(resize: Any, size: float, scale: float, expected: tuple[int, int]) -> None:
    rule = InferenceSettings(resize=resize, size=size)
    assert rule.input_size(48, 64, scale) == expected
    assert rule.input_size(64, 48, scale) == expected[::-1]


@given(sides, st.sampled_from(["short", "long"]), st.integers(1, 200))
@settings(deadline=None, derandomize=True)
def test_the_side_of_the_rule_gets_its_size_and_the_shape_stays(
    size: tuple[int, int], resize: Any, target: int
) -> None:
    found = InferenceSettings(resize=resize, size=target).input_size(*size)
    pick = min if resize == "short" else max
    assert pick(found) == target
    factor = target / pick(size)
    assert all(abs(new - max(1, old * factor)) <= 0.5 + 1e-9 for new, old in zip(found, size, strict=True))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"resize": "wide"}, "resize"),
        ({"resize": "short"}, "size"),
        ({"resize": "long", "size": -1.0}, "size"),
        ({"resize": "scale", "size": math.nan}, "size"),
        ({"resize": "scale", "size": math.inf}, "size"),
        ({"scales": ()}, "scales"),
        ({"scales": (1.0, 0.0)}, "scales"),
        ({"scales": (1.0, math.nan)}, "scales"),
        ({"scales": (math.inf,)}, "scales"),
        ({"window": -1}, "window"),
        ({"window": 31}, "window"),
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}=.*: \S") as caught:
        InferenceSettings(**change)
    assert caught.value.field == field


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_of_no_images_is_refused(batch: int) -> None:
    with pytest.raises(ConfigError, match=f"^batch={batch}: "):
        Segmenter(OneConvolution(), device=CPU, batch=batch)


@given(st.integers(1, 2000), st.integers(32, 300))
@settings(deadline=None, derandomize=True)
def test_windows_cover_everything_and_overlap_by_a_third(length: int, window: int) -> None:
    starts = inference._starts(length, window)
    assert starts[0] == 0
    if length <= window:
        assert starts == [0]
        return
    assert starts[-1] + window == length
    steps = [after - before for before, after in itertools.pairwise(starts)]
    assert all(0 < step <= window * 2 / 3 for step in steps)
    # As few as there can be.
    assert (len(starts) - 2) * (window * 2 // 3) + window < length


# --- the Segmenter -----------------------------------------------------------------------------------------------

SIZES = [(33, 47), (33, 47), (64, 40), (1, 1), (33, 47), (9, 64), (64, 9), (64, 9), (64, 9)]


@pytest.mark.parametrize(
    "settings",
    [
        InferenceSettings(),
        InferenceSettings(resize="short", size=40, flip=True),
        InferenceSettings(resize="long", size=50, scales=(0.5, 1.0, 1.3), window=32),
    ],
    ids=["plain", "flip", "window"],
)
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_images_of_mixed_sizes_come_out_as_if_alone(settings: InferenceSettings, batch: int) -> None:
    images = [_image(*size, seed) for seed, size in enumerate(SIZES)]
    found = Segmenter(OneConvolution(), settings, device=CPU, batch=batch)(images)
    one_by_one = Segmenter(OneConvolution(), settings, device=CPU, batch=1)
    assert [prediction.mask.shape for prediction in found] == SIZES
    for image, prediction in zip(images, found, strict=True):
        _assert_same(prediction, one_by_one([image])[0])
    assert len({prediction.mask.tobytes() for prediction in found}) > 6


def test_neighbours_of_one_size_share_a_pass() -> None:
    model = OneConvolution()
    Segmenter(model, device=CPU, batch=2)([_image(*size) for size in SIZES])
    assert [shape[0] for shape in model.inputs] == [2, 1, 1, 1, 1, 2, 1]
    assert [shape[2:] for shape in model.inputs] == [SIZES[index] for index in (0, 2, 3, 4, 5, 6, 8)]


def test_rounding_may_part_two_images_at_one_scale_only() -> None:
    """24 x 32 for both at scale 1, but 36 and 37 rows at scale 1.5."""
    settings = InferenceSettings(resize="long", size=32, scales=(1.0, 1.5))
    images = [_image(48, 64), _image(49, 64)]
    assert settings.input_size(48, 64) == settings.input_size(49, 64)
    assert settings.input_size(48, 64, 1.5) != settings.input_size(49, 64, 1.5)
    segmenter = Segmenter(OneConvolution(), settings, device=CPU)
    for image, prediction in zip(images, segmenter(images), strict=True):
        _assert_same(prediction, segmenter([image])[0])


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resize": "short", "size": 29},
        {"resize": "scale", "size": 1.7},
        {"scales": (0.5, 1.0, 1.75)},
        {"window": 32},
        {"window": 32, "scales": (0.6, 1.2)},
    ],
    ids=str,
)
def test_predictions_by_loops(settings: dict[str, Any], flip: bool, align_corners: bool) -> None:
    model, image = OneConvolution(align_corners=align_corners), _image(45, 67)
    rule = InferenceSettings(flip=flip, **settings)
    views = []
    with torch.no_grad():
        for scale in rule.scales:
            height, width = rule.input_size(45, 67, scale)
            resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
            pixels = torch.tensor(resized).permute(2, 0, 1)[None]
            for mirrored in [False, True][: 1 + flip]:
                views.append(View(_naive_logits(model, pixels.flip(-1) if mirrored else pixels, rule.window), mirrored))
    mask, confidence = Segmenter(model, rule, device=CPU)([image])[0]
    _assert_decision(mask, confidence, _probabilities(views, (45, 67), align_corners=align_corners))


def _naive_logits(model: PSPNet, pixels: Tensor, window: int) -> Tensor:
    """Logits of the whole input; or pixel by pixel, the mean over the windows that hold the pixel."""
    height, width = pixels.shape[-2:]
    if not window or (height <= window and width <= window):
        return model.coarse(pixels).main[0]
    found: dict[tuple[int, int], list[Tensor]] = {(y, x): [] for y in range(height) for x in range(width)}
    for top in inference._starts(height, window):
        for left in inference._starts(width, window):
            part = pixels[..., top : top + window, left : left + window]
            coarse = model.coarse(part).main
            logits = F.interpolate(
                coarse, size=part.shape[-2:], mode="bilinear", align_corners=model.config.align_corners
            )[0]
            for y in range(part.shape[-2]):
                for x in range(part.shape[-1]):
                    found[top + y, left + x].append(logits[:, y, x])
    pixelwise = [torch.stack(found[y, x]).mean(0) for y in range(height) for x in range(width)]
    return torch.stack(pixelwise, dim=1).view(-1, height, width)


@pytest.mark.parametrize("flip", [True, False])
def test_a_window_larger_than_the_image_changes_nothing(flip: bool) -> None:
    image = _image(45, 64)
    plain = Segmenter(OneConvolution(), InferenceSettings(flip=flip), device=CPU)([image])[0]
    windowed = Segmenter(OneConvolution(), InferenceSettings(flip=flip, window=64), device=CPU)([image])[0]
    np.testing.assert_array_equal(windowed.mask, plain.mask)
    np.testing.assert_array_equal(windowed.confidence, plain.confidence)


def test_a_mirrored_image_has_the_mirrored_mask_with_flip() -> None:
    image = _image(45, 67)
    segmenter = Segmenter(OneConvolution(), InferenceSettings(flip=True), device=CPU)
    here, there = segmenter([image, image[:, ::-1].copy()])
    _assert_same(Prediction(there.mask[:, ::-1], there.confidence[:, ::-1]), here)


@functools.cache
def _real() -> PSPNet:
    torch.manual_seed(0)
    model = PSPNet(PSPNetConfig(classes=4, backbone="resnet18", output_stride=32))
    # Random weights hardly tell classes apart; spread their scores.
    nn.init.normal_(model.decoder.get_parameter("1.weight"), std=0.5)
    return model


@pytest.mark.parametrize("size", [(33, 47), (64, 64), (1, 1)])
def test_the_real_network_says_what_its_forward_says(size: tuple[int, int]) -> None:
    image = _image(*size)
    model = _real().eval()
    with torch.no_grad():
        logits = model(torch.tensor(image).permute(2, 0, 1)[None]).main[0]
    mask, confidence = Segmenter(model, device=CPU)([image])[0]
    best, winner = logits.double().softmax(0).max(0)
    np.testing.assert_allclose(confidence, best.numpy(), atol=1e-4)
    assert (mask != winner.numpy()).mean() < 0.005


def test_the_model_is_put_into_evaluation_mode() -> None:
    model = _real().train()
    segmenter = Segmenter(model, device=CPU)
    assert not model.training
    image = _image(20, 20)
    first, second = segmenter([image, image]), segmenter([image, image])
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.mask, other.mask)
        np.testing.assert_array_equal(one.confidence, other.confidence)


def test_confidence_is_a_winners_probability() -> None:
    for prediction in Segmenter(OneConvolution(), InferenceSettings(flip=True), device=CPU)([_image(64, 48)]):
        assert prediction.confidence.min() >= 1 / 5 - 1e-6
        assert prediction.confidence.max() <= 1 + 1e-6
        assert prediction.mask.max() < 5


def test_no_images_no_predictions() -> None:
    assert Segmenter(OneConvolution(), device=CPU)([]) == []


def test_predictions_come_as_images_arrive() -> None:
    """Memory holds one batch, not the whole chunk; and the caller is not left in inference mode."""
    segmenter = Segmenter(OneConvolution(), device=CPU, batch=2)
    taken = 0

    def arriving() -> Iterator[Prepared]:
        nonlocal taken
        for seed in range(6):
            taken += 1
            yield segmenter.prepare(_image(20, 20, seed))

    predictions = segmenter.predict(arriving())
    for ready, read in enumerate([2, 2, 4, 4, 6, 6]):
        assert next(predictions).mask.shape == (20, 20), ready
        assert taken == read
        assert not torch.is_inference_mode_enabled()
    assert list(predictions) == []


def test_prepare_resizes_once_per_scale() -> None:
    settings = InferenceSettings(resize="long", size=32, scales=(1.0, 2.0))
    image = _image(32, 64)
    prepared = Segmenter(OneConvolution(), settings, device=CPU).prepare(image)
    assert (prepared.height, prepared.width) == (32, 64)
    assert [view.shape for view in prepared.views] == [(16, 32, 3), (32, 64, 3)]
    np.testing.assert_array_equal(prepared.views[1], image)
    assert prepared.views[0].dtype == np.uint8
    # Each pixel of the smaller view stands for those it covers.
    np.testing.assert_allclose(prepared.views[0].mean((0, 1)), image.mean((0, 1)), atol=1)

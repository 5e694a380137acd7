"""Labelling against plain formulations: torch's interpolation, softmax and argmax, and loops over scales and windows.

Most tests use a PSPNet whose layers are one convolution, since what they check lies around the network.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import logging
import math
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pspnet_core.checkpoints.settings import InferenceSettings
from pspnet_core.errors import ConfigError, ImageError
from pspnet_core.inference import segmenter as inference
from pspnet_core.inference.footprint import bytes_per_pixel
from pspnet_core.inference.inputs import Prepared
from pspnet_core.inference.segmenter import WAITING_BATCHES, Outcome, Prediction, Segmenter, prediction_of
from pspnet_core.inference.windows import windows
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig

CPU = torch.device("cpu")
Bytes = NDArray[np.uint8]


@pytest.fixture(autouse=True)
def plain_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number format on every CPU."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)


class OneConvolution(PSPNet):
    """A PSPNet whose coarse logits come from one convolution of the pixels, one cell for 8 x 8 of them."""

    def __init__(self, classes: int = 5, *, align_corners: bool = False, bands: int = 3) -> None:
        nn.Module.__init__(self)
        mean, std = (0.0,) * bands, (1.0,) * bands
        self.config = PSPNetConfig(classes=classes, align_corners=align_corners, mean=mean, std=std)
        generator = torch.Generator().manual_seed(classes)
        self.weight = nn.Parameter(torch.randn(classes, bands, 8, 8, generator=generator) / 500)
        self.inputs: list[tuple[int, ...]] = []

    def coarse(self, images: Tensor) -> Tensor:
        """Logits ``(B, C, H // 8 + 1, W // 8 + 1)``."""
        self.inputs.append(tuple(images.shape))
        return F.conv2d(images.float() - 120, self.weight, stride=8, padding=4)


def _inputs(segmenter: Segmenter) -> list[tuple[int, ...]]:
    """Shapes of what the segmenter's own copy of a OneConvolution was given."""
    return cast(OneConvolution, segmenter.model).inputs


def _outcomes(segmenter: Segmenter, images: list[Bytes]) -> list[Outcome]:
    """In the order of the images."""
    found = dict(segmenter.predict(enumerate(map(segmenter.prepare, images))))
    return [found[index] for index in range(len(images))]


def _image(height: int, width: int, seed: int = 0) -> Bytes:
    """Coloured blotches: smooth enough that resizing keeps something of them."""
    random = np.random.default_rng((seed, height, width))
    small = Image.fromarray(random.integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


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


sides = st.tuples(st.integers(1, 40), st.integers(1, 40))

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
        # As the paper's code: the side is rounded first, the other one follows it.
        ("long", 35, 0.5, (14, 18)),
        ("short", 33, 0.5, (16, 21)),
    ],
)
def test_resize_rules(resize: Any, size: float, scale: float, expected: tuple[int, int]) -> None:
    rule = InferenceSettings(resize=resize, size=size)
    assert rule.input_size(48, 64, scale) == expected
    assert rule.input_size(64, 48, scale) == expected[::-1]


@pytest.mark.parametrize(("scale", "expected"), [(1.0, (30, 50)), (0.5, (15, 25)), (1.25, (38, 62)), (0.001, (1, 1))])
def test_the_fixed_rule_forgets_the_images_shape(scale: float, expected: tuple[int, int]) -> None:
    rule = InferenceSettings(resize="fixed", shape=(30, 50))
    assert rule.input_size(48, 64, scale) == rule.input_size(7, 3, scale) == expected


def test_a_shape_without_the_fixed_rule_is_unused() -> None:
    assert InferenceSettings(shape=(30, 50)).input_size(48, 64) == (48, 64)


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
        ({"resize": "fixed"}, "shape"),
        ({"resize": "fixed", "size": 400.0}, "shape"),
        ({"resize": "fixed", "shape": (0, 10)}, "shape"),
        ({"resize": "fixed", "shape": (10,)}, "shape"),
        ({"shape": (10, 10, 3)}, "shape"),
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


# --- the Segmenter -----------------------------------------------------------------------------------------------

SIZES = [(33, 47), (33, 47), (64, 40), (1, 1), (33, 47), (9, 64), (64, 9), (64, 9), (64, 9)]


@pytest.mark.parametrize(
    "settings",
    [
        InferenceSettings(),
        InferenceSettings(resize="short", size=40, flip=True),
        InferenceSettings(resize="long", size=50, scales=(0.5, 1.0, 1.3), window=32),
        InferenceSettings(resize="fixed", shape=(40, 32), flip=True, window=32),
    ],
    ids=["plain", "flip", "window", "fixed"],
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


def test_images_of_one_size_share_a_pass() -> None:
    """As soon as there are enough of them; what is left over goes in the end, the longest waiting first."""
    segmenter = Segmenter(OneConvolution(), device=CPU, batch=2)
    segmenter([_image(*size) for size in SIZES])
    shapes = _inputs(segmenter)
    assert [shape[0] for shape in shapes] == [2, 2, 1, 1, 1, 1, 1]
    assert [shape[2:] for shape in shapes] == [SIZES[index] for index in (0, 6, 2, 3, 4, 5, 8)]


def test_sizes_that_alternate_fill_their_batches() -> None:
    segmenter = Segmenter(OneConvolution(), device=CPU, batch=4)
    segmenter([_image(16, 16 + 8 * (index % 3), index) for index in range(24)])
    assert [shape[0] for shape in _inputs(segmenter)] == [4] * 6


def test_an_image_of_its_own_size_waits_for_a_bounded_number_of_others() -> None:
    segmenter = Segmenter(OneConvolution(), device=CPU, batch=2)
    taken: list[int] = []

    def arriving() -> Iterator[Prepared]:
        for index in range(100):
            taken.append(index)
            yield segmenter.prepare(_image(8, 8 if index else 16, index))

    assert next(key for key, _ in segmenter.predict(enumerate(arriving())) if key == 0) == 0
    assert len(taken) == 2 * WAITING_BATCHES


@given(st.lists(st.sampled_from([(8, 8), (8, 16), (24, 8), (17, 9)]), max_size=20), st.integers(1, 4))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_in_any_order_of_sizes_each_image_gets_what_it_gets_alone(sizes: list[tuple[int, int]], batch: int) -> None:
    images = [_image(*size, seed) for seed, size in enumerate(sizes)]
    segmenter = Segmenter(OneConvolution(), InferenceSettings(flip=True), device=CPU, batch=batch)
    for image, prediction in zip(images, segmenter(images), strict=True):
        _assert_same(prediction, segmenter([image])[0])


@pytest.mark.parametrize(
    ("batch", "images", "passes"),
    [
        (1, 2, [1] * 12),
        (4, 2, [4, 2, 4, 2]),
        (6, 2, [6, 6]),
        (12, 3, [12, 6]),
        (100, 3, [18]),
    ],
)
def test_windows_of_an_image_and_its_neighbours_share_passes(batch: int, images: int, passes: list[int]) -> None:
    """6 windows each."""
    segmenter = Segmenter(OneConvolution(), InferenceSettings(window=32), device=CPU, batch=batch)
    segmenter([_image(50, 64)] * images)
    assert [shape[0] for shape in _inputs(segmenter)] == passes
    assert {shape[2:] for shape in _inputs(segmenter)} == {(32, 32)}


def test_windows_of_a_large_image_are_looked_at_when_needed() -> None:
    """Of the network's answers for two scales and their mirror images only the latest are alive at any time."""
    alive: list[weakref.ref[Tensor]] = []
    most = passes = 0

    class Watched(OneConvolution):
        def coarse(self, images: Tensor) -> Tensor:
            nonlocal most, passes
            passes += 1
            most = max(most, sum(reference() is not None for reference in alive))
            logits = super().coarse(images)
            alive.append(weakref.ref(logits))
            return logits

    image = _image(2000, 50)
    settings = InferenceSettings(window=64, scales=(1.0, 2.0), flip=True)
    segmenter = Segmenter(Watched(classes=90), settings, device=CPU, batch=4)
    assert segmenter([image])[0].mask.shape == (2000, 50)
    assert passes > 100
    assert 0 < most <= 8


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
        {"resize": "fixed", "shape": (50, 40)},
        {"window": 32},
        {"window": 48},
        {"window": 32, "scales": (0.6, 1.2)},
        {"window": 40, "resize": "fixed", "shape": (90, 60), "scales": (0.5, 1.0)},
    ],
    ids=str,
)
def test_predictions_by_loops(settings: dict[str, Any], flip: bool, align_corners: bool) -> None:
    model, image = OneConvolution(align_corners=align_corners), _image(45, 67)
    rule = InferenceSettings(flip=flip, **settings)
    total = torch.zeros(5, 45, 67, dtype=torch.float64)
    with torch.no_grad():
        for scale in rule.scales:
            height, width = rule.input_size(45, 67, scale)
            resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
            found = _by_windows(model, torch.tensor(resized).permute(2, 0, 1)[None], rule)
            total += F.interpolate(found[None], size=(45, 67), mode="bilinear", align_corners=False)[0]
    mask, confidence = Segmenter(model, rule, device=CPU, batch=3)([image])[0]
    _assert_decision(mask, confidence, total / len(rule.scales))


def _by_windows(model: PSPNet, pixels: Tensor, rule: InferenceSettings) -> Tensor:
    """``(C, h, w)``: of each pixel the mean of the probabilities in the windows that hold it."""
    height, width = pixels.shape[-2:]
    total, count = torch.zeros(5, height, width, dtype=torch.float64), torch.zeros(height, width)
    for window in windows(height, width, rule.window):
        rows, columns = window.slices
        part = pixels[..., rows, columns]
        probabilities = _softmax_of(model, part)
        if rule.flip:
            probabilities = (probabilities + _softmax_of(model, part.flip(-1)).flip(-1)) / 2
        total[:, rows, columns] += probabilities
        count[rows, columns] += 1
    return total / count


def _softmax_of(model: PSPNet, pixels: Tensor) -> Tensor:
    logits = model.coarse(pixels).double()
    align_corners = model.config.align_corners
    return F.interpolate(logits, size=pixels.shape[-2:], mode="bilinear", align_corners=align_corners)[0].softmax(0)


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


def test_a_model_in_training_stays_as_it_is_and_its_copy_evaluates() -> None:
    model = copy.deepcopy(_real()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    segmenter = Segmenter(model, device=CPU)
    image = _image(20, 20)
    segmenter([image])
    assert model.training
    assert not segmenter.model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
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

    predictions = segmenter.predict(enumerate(arriving()))
    for ready, read in enumerate([2, 2, 4, 4, 6, 6]):
        key, outcome = next(predictions)
        assert key == ready
        assert prediction_of(outcome).mask.shape == (20, 20)
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


# --- files -------------------------------------------------------------------------------------------------------


def _jpeg(image: Bytes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_a_file_is_prepared_as_its_pixels_are() -> None:
    data = _jpeg(_image(96, 128))
    segmenter = Segmenter(OneConvolution(), InferenceSettings(resize="short", size=24, scales=(0.5, 1.0)), device=CPU)
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    decoded, prepared = segmenter.decode(data), segmenter.prepare(pixels)
    assert decoded[:2] == prepared[:2] == (96, 128)
    for one, other in zip(decoded.views, prepared.views, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ImageError, match=r"^TooLarge: "):
        segmenter.decode(data, max_pixels=1000)


def test_a_reduced_file_gives_nearly_the_same_mask_at_the_images_own_size() -> None:
    data = _jpeg(_image(26, 17).repeat(8, 0).repeat(8, 1)[:194, :131])  # no whole number of its blocks
    rule: dict[str, Any] = {"resize": "short", "size": 32, "scales": (0.75, 1.0)}
    full = Segmenter(OneConvolution(), InferenceSettings(**rule), device=CPU)
    reduced = Segmenter(OneConvolution(), InferenceSettings(**rule, reduced=True), device=CPU)
    one, other = full.decode(data), reduced.decode(data)
    assert one[:2] == other[:2] == (194, 131)
    assert [view.shape for view in one.views] == [view.shape for view in other.views]
    assert 0 < np.abs(one.views[1].astype(float) - other.views[1]).mean() < 3
    expected, found = (by([data])[0] for by in (full, reduced))
    assert found.mask.shape == (194, 131)
    assert (found.mask != expected.mask).mean() < 0.05


@pytest.mark.parametrize("settings", [{}, {"resize": "scale", "size": 1.5}], ids=str)
def test_where_the_network_wants_every_pixel_nothing_is_reduced(settings: dict[str, Any]) -> None:
    data = _jpeg(_image(50, 70))
    full = Segmenter(OneConvolution(), InferenceSettings(**settings), device=CPU).decode(data)
    reduced = Segmenter(OneConvolution(), InferenceSettings(**settings, reduced=True), device=CPU).decode(data)
    np.testing.assert_array_equal(full.views[0], reduced.views[0])


# --- too little memory -------------------------------------------------------------------------------------------

SHORTAGES = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError("Unable to allocate 2.00 GiB for an array"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]


class Crowded(OneConvolution):
    """Memory for so many pixels at a time, and no more."""

    def __init__(self, pixels: int, error: Exception = SHORTAGES[0]) -> None:
        super().__init__()
        self.pixels, self.error = pixels, error

    def coarse(self, images: Tensor) -> Tensor:
        logits = super().coarse(images)
        if images.shape[0] * images.shape[2] * images.shape[3] > self.pixels:
            raise self.error
        return logits


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: str(error)[:30])
def test_a_batch_that_memory_does_not_hold_is_halved_and_stays_so(error: Exception) -> None:
    images = [_image(16, 16, seed) for seed in range(11)]
    segmenter = Segmenter(Crowded(3 * 256, error), device=CPU, batch=8)
    for found, expected in zip(segmenter(images), Segmenter(OneConvolution(), device=CPU)(images), strict=True):
        _assert_same(found, expected)
    assert [shape[0] for shape in _inputs(segmenter)] == [8, 4, 2, 2, 2, 2, 2, 1]
    _inputs(segmenter).clear()
    segmenter(images[:5])
    assert [shape[0] for shape in _inputs(segmenter)] == [2, 2, 1]


def test_other_sizes_keep_their_batches(caplog: pytest.LogCaptureFixture) -> None:
    segmenter = Segmenter(Crowded(8 * 64), device=CPU, batch=8)
    with caplog.at_level(logging.WARNING):
        segmenter([_image(16, 16)] * 8)
        segmenter([_image(16, 16)] * 8)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "out of memory with 8 inputs of ((16, 16, 3),)",
        "out of memory with 4 inputs of ((16, 16, 3),)",
    ]
    _inputs(segmenter).clear()
    segmenter([_image(8, 8)] * 8)
    assert [shape[0] for shape in _inputs(segmenter)] == [8]


def test_windows_of_one_image_are_fewer_at_a_time() -> None:
    image = _image(50, 64)
    rule = InferenceSettings(window=32)
    segmenter = Segmenter(Crowded(2 * 32 * 32), rule, device=CPU, batch=8)
    expected = Segmenter(OneConvolution(), rule, device=CPU)([image])[0]
    _assert_same(segmenter([image])[0], expected)
    assert [shape[0] for shape in _inputs(segmenter)] == [6, 3, *[1] * 6]


def test_an_image_that_does_not_fit_alone_is_an_error_in_its_place() -> None:
    segmenter = Segmenter(Crowded(600), device=CPU, batch=4)
    images = [_image(16, 16, seed) if seed % 4 else _image(32, 32, seed) for seed in range(9)]
    outcomes = _outcomes(segmenter, images)
    for index, (image, outcome) in enumerate(zip(images, outcomes, strict=True)):
        if index % 4:
            _assert_same(prediction_of(outcome), Segmenter(OneConvolution(), device=CPU)([image])[0])
        else:
            assert isinstance(outcome, ImageError)
            assert outcome.kind == "TooLarge"
            assert "32 x 32 pixels" in outcome.message and "--window" in outcome.message
    with pytest.raises(ImageError, match=r"^TooLarge: "):
        segmenter(images[:1])


@pytest.mark.parametrize(
    ("pixels", "passes"),
    [
        (8 * 256, [(8, 16), (2, 32), (3, 16)]),
        (3 * 256, [(3, 16), (3, 16), (3, 16), (1, 32), (1, 32), (2, 16)]),
        (100, [(1, 16)] * 11 + [(1, 32)] * 2),
    ],
)
def test_batches_are_as_large_as_memory_allows(pixels: int, passes: list[tuple[int, int]]) -> None:
    images = [_image(16, 16, seed) for seed in range(11)] + [_image(32, 32, seed) for seed in range(2)]
    memory = pixels * bytes_per_pixel(OneConvolution().coarse, bands=3, device=CPU)
    segmenter = Segmenter(OneConvolution(), device=CPU, batch=8, memory=memory)
    _inputs(segmenter).clear()
    for found, expected in zip(segmenter(images), Segmenter(OneConvolution(), device=CPU)(images), strict=True):
        _assert_same(found, expected)
    assert [(shape[0], shape[2]) for shape in _inputs(segmenter)] == passes


def test_as_many_windows_at_once_as_memory_allows() -> None:
    memory = 2 * 32 * 32 * bytes_per_pixel(OneConvolution().coarse, bands=3, device=CPU)
    segmenter = Segmenter(OneConvolution(), InferenceSettings(window=32), device=CPU, batch=8, memory=memory)
    _inputs(segmenter).clear()
    segmenter([_image(50, 64)])
    assert [shape[0] for shape in _inputs(segmenter)] == [2, 2, 2]


def test_memory_counts_for_the_largest_of_the_scales() -> None:
    memory = 4 * 32 * 32 * bytes_per_pixel(OneConvolution().coarse, bands=3, device=CPU)
    segmenter = Segmenter(OneConvolution(), InferenceSettings(scales=(0.5, 2.0)), device=CPU, batch=8, memory=memory)
    _inputs(segmenter).clear()
    segmenter([_image(16, 16)] * 5)
    assert [(shape[0], shape[2]) for shape in _inputs(segmenter)] == [(4, 8), (4, 32), (1, 8), (1, 32)]


def test_batches_that_should_fit_and_do_not_are_halved(caplog: pytest.LogCaptureFixture) -> None:
    memory = 6 * 256 * bytes_per_pixel(OneConvolution().coarse, bands=3, device=CPU)
    crowded = Crowded(2**40)
    segmenter = Segmenter(crowded, device=CPU, batch=8, memory=memory)
    cast(Crowded, segmenter.model).pixels = 4 * 256
    _inputs(segmenter).clear()
    segmenter([_image(16, 16)] * 8)
    assert [shape[0] for shape in _inputs(segmenter)] == [6, 3, 3, 2]


def test_what_the_failed_pass_held_is_free_before_the_next() -> None:
    held: list[weakref.ref[Tensor]] = []

    class Holding(OneConvolution):
        def coarse(self, images: Tensor) -> Tensor:
            assert all(reference() is None for reference in held)
            logits = super().coarse(images)
            if len(images) > 1:
                held.append(weakref.ref(logits))
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return logits

    segmenter = Segmenter(Holding(), device=CPU, batch=4)
    assert len(segmenter([_image(16, 16)] * 4)) == 4
    assert len(held) == 2


def test_another_error_is_not_taken_for_too_little_memory() -> None:
    segmenter = Segmenter(Crowded(100, RuntimeError("expected scalar type Float")), device=CPU, batch=4)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        segmenter([_image(16, 16)] * 4)
    assert len(_inputs(segmenter)) == 1


# --- lanes ---------------------------------------------------------------------------------------------------------


def test_on_a_cpu_a_pass_has_no_more_pixels_than_the_caches_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "CPU_PIXELS", 2 * 256 + 100)
    images = [_image(16, 16, seed) for seed in range(5)] + [_image(32, 32)] * 2
    segmenter = Segmenter(OneConvolution(), device=CPU, batch=8)
    for found, expected in zip(
        segmenter(images), Segmenter(OneConvolution(), device=CPU, batch=1)(images), strict=True
    ):
        _assert_same(found, expected)
    assert [(shape[0], shape[2]) for shape in _inputs(segmenter)] == [(2, 16), (2, 16), (1, 32), (1, 32), (1, 16)]
    elsewhere = Segmenter(OneConvolution(), device=torch.device("meta"), batch=8)
    assert elsewhere.limits.of(((473, 473, 3),)) == 8


class Meeting(OneConvolution):
    """Counts the passes under way; goes on when ``together`` of them have met."""

    def __init__(self, together: int) -> None:
        super().__init__()
        self.together = together
        self.now = self.most = 0
        self.threads: set[int] = set()
        self.changed: threading.Condition | None = None  # the segmenter's own copy gets one

    def coarse(self, images: Tensor) -> Tensor:
        assert self.changed is not None
        with self.changed:
            self.now += 1
            self.most = max(self.now, self.most)
            self.threads.add(torch.get_num_threads())
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self.most >= self.together, timeout=60)
        logits = super().coarse(images)
        with self.changed:
            self.now -= 1
        return logits


@pytest.fixture
def threads_back() -> Iterator[None]:
    """Gives torch its threads back, which lanes take from all that comes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _meeting(lanes: int, *, together: int, memory: float = math.inf) -> tuple[Segmenter, Meeting]:
    segmenter = Segmenter(OneConvolution(), device=CPU, batch=1, lanes=lanes, memory=memory)
    model = Meeting(together)
    model.changed = threading.Condition()
    segmenter.model, segmenter.coarse = model, model.coarse
    return segmenter, model


@pytest.mark.usefixtures("threads_back")
def test_in_lanes_passes_are_under_way_side_by_side_on_one_thread_each() -> None:
    images = [_image(16 + 8 * (seed % 3), 16, seed) for seed in range(20)]
    segmenter, model = _meeting(3, together=3)
    for found, expected in zip(segmenter(images), Segmenter(OneConvolution(), device=CPU)(images), strict=True):
        _assert_same(found, expected)
    assert (model.most, model.threads) == (3, {1})


@pytest.mark.usefixtures("threads_back")
def test_passes_under_way_side_by_side_share_the_memory() -> None:
    memory = 2 * 256 * bytes_per_pixel(OneConvolution().coarse, bands=3, device=CPU)
    segmenter, model = _meeting(4, together=2, memory=memory)
    assert len(segmenter([_image(16, 16, seed) for seed in range(12)])) == 12
    assert model.most == 2
    segmenter, model = _meeting(4, together=1, memory=memory)
    assert len(segmenter([_image(32, 32, seed) for seed in range(5)])) == 5
    assert model.most == 1


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.usefixtures("threads_back")
def test_whoever_begins_passes_they_share_the_memory(lanes: int) -> None:
    memory = 256 * bytes_per_pixel(OneConvolution().coarse, bands=3, device=CPU)
    segmenter, model = _meeting(lanes, together=1, memory=memory)
    images = [segmenter.prepare(_image(16, 16, seed)) for seed in range(12)]
    with ThreadPoolExecutor(3) as callers:
        for outcomes in callers.map(lambda _: list(segmenter.predict(enumerate(images))), range(3)):
            assert len(outcomes) == 12
    assert model.most == 1


def test_a_segmenter_goes_when_nobody_needs_it() -> None:
    """With its copy of the network, at once: not when some collector comes by."""
    gc.disable()
    try:
        segmenter = Segmenter(OneConvolution(), device=CPU)
        seen = weakref.ref(segmenter.model)
        del segmenter
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("threads_back")
def test_an_error_in_a_lane_comes_out_and_an_image_that_does_not_fit_stays_in_its_place() -> None:
    images = [_image(16, 16, seed) if seed % 3 else _image(32, 32, seed) for seed in range(9)]
    segmenter = Segmenter(Crowded(600), device=CPU, batch=2, lanes=2)
    outcomes = _outcomes(segmenter, images)
    assert [isinstance(outcome, ImageError) for outcome in outcomes] == [seed % 3 == 0 for seed in range(9)]
    broken = Segmenter(Crowded(100, RuntimeError("expected scalar type Float")), device=CPU, batch=2, lanes=2)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        broken(images)


# --- an asynchronous device ------------------------------------------------------------------------------------


def test_an_asynchronous_device_has_the_next_batch_before_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "is_async", lambda _: True)
    images = [_image(16, 16 + 8 * (seed % 2), seed) for seed in range(11)]
    segmenter = Segmenter(OneConvolution(), device=CPU, batch=2)
    launched, predictions = [], {}
    for key, outcome in segmenter.predict(enumerate(map(segmenter.prepare, images))):
        launched.append(len(_inputs(segmenter)))
        predictions[key] = prediction_of(outcome)
    # Pairs of one size are complete with images 2, 3, 6, 7, 10, and 9 is alone.
    assert list(predictions) == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9]
    assert launched == [2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 6]
    for index, expected in enumerate(Segmenter(OneConvolution(), device=CPU)(images)):
        _assert_same(predictions[index], expected)


# --- bands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bands", [1, 2, 4, 7])
def test_images_of_any_number_of_bands(bands: int) -> None:
    image = np.dstack([_image(45, 67, seed)[..., :1] for seed in range(bands)])
    segmenter = Segmenter(OneConvolution(bands=bands), InferenceSettings(resize="long", size=40), device=CPU)
    prepared = segmenter.prepare(image)
    assert prepared.views[0].shape == (27, 40, bands)
    for band in range(bands):
        alone = Image.fromarray(image[..., band]).resize((40, 27), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(prepared.views[0][..., band], np.asarray(alone))
    assert segmenter([image])[0].mask.shape == (45, 67)

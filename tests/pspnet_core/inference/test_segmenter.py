"""Labelling against plain formulations: torch's interpolation, softmax and argmax, and loops over scales and windows.

Most tests use a PSPNet whose layers are one convolution, since what they check lies around the network.
"""

from __future__ import annotations

import functools
import gc
import io
import math
import threading
import weakref
from collections.abc import Iterator
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
from pspnet_core.inference.inputs import Prepared, decode
from pspnet_core.inference.segmenter import WAITING_BATCHES, Outcome, Prediction, Segmenter, prediction_of
from pspnet_core.inference.windows import windows
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig
from tests.support.networks import assert_decision

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


@functools.cache
def _bytes_per_pixel() -> float:
    return bytes_per_pixel(OneConvolution().coarse, bands=3, device=CPU)


def _segmenter(
    model: PSPNet | None = None, rule: InferenceSettings | None = None, *, pixels: float = math.inf, **options: Any
) -> Segmenter:
    """On the CPU; with memory for so many pixels in a pass."""
    memory = pixels * _bytes_per_pixel()
    segmenter = Segmenter(model or OneConvolution(), rule, device=CPU, memory=memory, **options)
    _inputs(segmenter).clear()  # of the pass that measures
    return segmenter


def _inputs(segmenter: Segmenter) -> list[tuple[int, ...]]:
    """Shapes of what the segmenter's own copy of a OneConvolution was given."""
    return cast(OneConvolution, segmenter.model).inputs


def _passes(segmenter: Segmenter) -> list[tuple[int, int]]:
    """Images and their height, of each pass."""
    return [(shape[0], shape[2]) for shape in _inputs(segmenter)]


def _outcomes(segmenter: Segmenter, images: list[Bytes]) -> list[Outcome]:
    """In the order of the images."""
    found = dict(segmenter.predict(enumerate(map(segmenter.prepare, images))))
    return [found[index] for index in range(len(images))]


def _image(height: int, width: int, seed: int = 0) -> Bytes:
    """Coloured blotches: smooth enough that resizing keeps something of them."""
    random = np.random.default_rng((seed, height, width))
    small = Image.fromarray(random.integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def _assert_same(found: Prediction, expected: Prediction) -> None:
    assert found.mask.shape == expected.mask.shape
    assert found.mask.dtype == expected.mask.dtype
    np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-4)
    assert (found.mask != expected.mask).mean() < 0.005


def _assert_as_if_alone(segmenter: Segmenter, images: list[Bytes]) -> None:
    """Each image gets what it gets alone, with memory for everything."""
    alone = _segmenter(rule=segmenter.settings, batch=1)
    for image, prediction in zip(images, segmenter(images), strict=True):
        assert prediction.mask.shape == image.shape[:2]
        _assert_same(prediction, alone([image])[0])


sides = st.tuples(st.integers(1, 40), st.integers(1, 40))

# --- sizes and settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resize", "size", "scale", "expected"),
    [
        ("none", 0, 1.0, (48, 64)),
        ("none", 0, 1.5, (72, 96)),
        ("scale", 0.25, 1.0, (12, 16)),
        ("scale", 0.001, 1.0, (1, 1)),
        # As the paper's code: the side is rounded first, the other one follows it.
        ("long", 35, 0.5, (14, 18)),
        ("short", 33, 0.5, (16, 21)),
    ],
)
def test_resize_rules(resize: Any, size: float, scale: float, expected: tuple[int, int]) -> None:
    rule = InferenceSettings(resize=resize, size=size, shape=(30, 50))  # which only the fixed rule uses
    assert rule.input_size(48, 64, scale) == expected
    assert rule.input_size(64, 48, scale) == expected[::-1]


@pytest.mark.parametrize(("scale", "expected"), [(1.0, (30, 50)), (0.5, (15, 25)), (1.25, (38, 62)), (0.001, (1, 1))])
def test_the_fixed_rule_forgets_the_images_shape(scale: float, expected: tuple[int, int]) -> None:
    rule = InferenceSettings(resize="fixed", shape=(30, 50))
    assert rule.input_size(48, 64, scale) == rule.input_size(7, 3, scale) == expected


@given(sides, st.sampled_from(["short", "long"]), st.integers(1, 200))
def test_the_side_of_the_rule_gets_its_size_and_the_shape_stays(
    size: tuple[int, int], resize: Any, target: int
) -> None:
    found = InferenceSettings(resize=resize, size=target).input_size(*size)
    pick = min if resize == "short" else max
    assert pick(found) == target
    factor = target / pick(size)
    assert all(abs(new - max(1, old * factor)) <= 0.5 + 1e-9 for new, old in zip(found, size, strict=True))


@pytest.mark.parametrize("reduced", [False, True])
def test_a_thread_of_an_image_asks_for_no_endless_input(reduced: bool) -> None:
    thread = io.BytesIO()
    Image.new("L", (20_000, 1)).save(thread, "PNG")
    with pytest.raises(ImageError, match=r"^TooLarge: 20000 x 1 pixels would be an input of 1280000 x 64$"):
        decode(thread.getvalue(), InferenceSettings(resize="short", size=64, reduced=reduced))


REFUSED: dict[str, list[dict[str, Any]]] = {
    "resize": [{"resize": "wide"}],
    "size": [{"resize": "short"}, *({"resize": "scale", "size": size} for size in (-1.0, math.nan, math.inf))],
    "shape": [{"resize": "fixed", "shape": shape} for shape in (None, (0, 10), (10,))] + [{"shape": (10, 10, 3)}],
    "scales": [{"scales": scales} for scales in ((), (1.0, 0.0), (1.0, math.nan), (math.inf,))],
    "window": [{"window": -1}, {"window": 31}],
}


@pytest.mark.parametrize(
    ("field", "change"), [(field, change) for field, changes in REFUSED.items() for change in changes]
)
def test_settings_that_cannot_work_are_refused(field: str, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}=.*: \S") as caught:
        InferenceSettings(**change)
    assert caught.value.field == field


def test_a_batch_of_no_images_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^batch=0: "):
        _segmenter(batch=0)


# --- the Segmenter -----------------------------------------------------------------------------------------------

SIZES = [(33, 47), (33, 47), (64, 40), (1, 1), (33, 47), (9, 64), (64, 9), (64, 9), (64, 9)]


@pytest.mark.parametrize(
    "rule",
    [
        InferenceSettings(),
        InferenceSettings(resize="short", size=40, flip=True),
        InferenceSettings(resize="long", size=50, scales=(0.5, 1.0, 1.3), window=32),
        InferenceSettings(resize="fixed", shape=(40, 32), flip=True, window=32),
    ],
    ids=["plain", "flip", "window", "fixed"],
)
@given(sizes=st.lists(st.sampled_from(SIZES), max_size=20), batch=st.integers(1, 8))
@settings(max_examples=30)
def test_images_of_mixed_sizes_in_any_order_come_out_as_if_alone(
    rule: InferenceSettings, sizes: list[tuple[int, int]], batch: int
) -> None:
    _assert_as_if_alone(_segmenter(rule=rule, batch=batch), [_image(*size, seed) for seed, size in enumerate(sizes)])


def test_images_of_one_size_share_a_pass() -> None:
    """As soon as there are enough of them; what is left over goes in the end, the longest waiting first."""
    segmenter = _segmenter(batch=2)
    segmenter([_image(*size) for size in SIZES])
    assert [shape[0] for shape in _inputs(segmenter)] == [2, 2, 1, 1, 1, 1, 1]
    assert [shape[2:] for shape in _inputs(segmenter)] == [SIZES[index] for index in (0, 6, 2, 3, 4, 5, 8)]


def test_an_image_of_its_own_size_waits_for_a_bounded_number_of_others() -> None:
    segmenter = _segmenter(batch=2)
    taken: list[int] = []

    def arriving() -> Iterator[Prepared]:
        for index in range(100):
            taken.append(index)
            yield segmenter.prepare(_image(8, 8 if index else 16, index))

    assert next(key for key, _ in segmenter.predict(enumerate(arriving())) if key == 0) == 0
    assert len(taken) == 2 * WAITING_BATCHES


@pytest.mark.parametrize(("batch", "images", "passes"), [(4, 2, [4, 2, 4, 2]), (6, 2, [6, 6]), (12, 3, [12, 6])])
def test_windows_of_an_image_and_its_neighbours_share_passes(batch: int, images: int, passes: list[int]) -> None:
    """6 windows each."""
    segmenter = _segmenter(rule=InferenceSettings(window=32), batch=batch)
    segmenter([_image(50, 64)] * images)
    assert [shape[0] for shape in _inputs(segmenter)] == passes
    assert {shape[2:] for shape in _inputs(segmenter)} == {(32, 32)}


def test_rounding_may_part_two_images_at_one_scale_only() -> None:
    """24 x 32 for both at scale 1, but 36 and 37 rows at scale 1.5."""
    rule = InferenceSettings(resize="long", size=32, scales=(1.0, 1.5))
    assert rule.input_size(48, 64) == rule.input_size(49, 64)
    assert rule.input_size(48, 64, 1.5) != rule.input_size(49, 64, 1.5)
    _assert_as_if_alone(_segmenter(rule=rule), [_image(48, 64), _image(49, 64)])


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
        {"window": 80},
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
    mask, confidence = map(torch.from_numpy, _segmenter(model, rule, batch=3)([image])[0])
    assert_decision(mask, confidence, total / len(rule.scales), within=1e-4)


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


def test_a_model_in_training_stays_so_and_its_copy_evaluates() -> None:
    model = OneConvolution().train()
    segmenter = _segmenter(model)
    segmenter([_image(20, 20)])
    assert model.training and not model.inputs
    assert not segmenter.model.training and _inputs(segmenter)


def test_predictions_come_as_images_arrive() -> None:
    """Memory holds one batch, not the whole chunk; and the caller is not left in inference mode."""
    segmenter = _segmenter(batch=2)
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


# --- files -------------------------------------------------------------------------------------------------------


def _jpeg(image: Bytes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_a_file_is_prepared_as_its_pixels_are() -> None:
    data = _jpeg(_image(96, 128))
    segmenter = _segmenter(rule=InferenceSettings(resize="short", size=24, scales=(0.5, 1.0)))
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
    full = _segmenter(rule=InferenceSettings(**rule))
    reduced = _segmenter(rule=InferenceSettings(**rule, reduced=True))
    one, other = full.decode(data), reduced.decode(data)
    assert one[:2] == other[:2] == (194, 131)
    assert [view.shape for view in one.views] == [view.shape for view in other.views]
    assert 0 < np.abs(one.views[1].astype(float) - other.views[1]).mean() < 3
    expected, found = (by([data])[0] for by in (full, reduced))
    assert found.mask.shape == (194, 131)
    assert (found.mask != expected.mask).mean() < 0.05


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
    segmenter = _segmenter(Crowded(3 * 256, error), batch=8)
    _assert_as_if_alone(segmenter, images)
    assert [shape[0] for shape in _inputs(segmenter)] == [8, 4, 2, 2, 2, 2, 2, 1]
    _inputs(segmenter).clear()
    segmenter(images[:5])
    assert [shape[0] for shape in _inputs(segmenter)] == [2, 2, 1]


def test_windows_of_one_image_are_fewer_at_a_time() -> None:
    segmenter = _segmenter(Crowded(2 * 32 * 32), InferenceSettings(window=32), batch=8)
    _assert_as_if_alone(segmenter, [_image(50, 64)])
    assert [shape[0] for shape in _inputs(segmenter)] == [6, 3, *[1] * 6]


@pytest.mark.parametrize("lanes", [None, 2])
def test_an_image_that_does_not_fit_alone_is_an_error_in_its_place(lanes: int | None) -> None:
    segmenter = _segmenter(Crowded(600), batch=4, lanes=lanes)
    images = [_image(16, 16, seed) if seed % 4 else _image(32, 32, seed) for seed in range(9)]
    outcomes = _outcomes(segmenter, images)
    for index, (image, outcome) in enumerate(zip(images, outcomes, strict=True)):
        if index % 4:
            _assert_same(prediction_of(outcome), _segmenter()([image])[0])
        else:
            assert isinstance(outcome, ImageError)
            assert outcome.kind == "TooLarge"
            assert "32 x 32 pixels" in outcome.message and "--window" in outcome.message
    with pytest.raises(ImageError, match=r"^TooLarge: "):
        segmenter(images[:1])


MIXED = [(16, 16)] * 11 + [(32, 32)] * 2


@pytest.mark.parametrize(
    ("change", "sizes", "pixels", "passes"),
    [
        ({}, MIXED, 8 * 256, [(8, 16), (2, 32), (3, 16)]),
        ({}, MIXED, 3 * 256, [(3, 16), (3, 16), (3, 16), (1, 32), (1, 32), (2, 16)]),
        ({}, MIXED, 100, [(1, 16)] * 11 + [(1, 32)] * 2),
        # As many windows of an image; and the largest of the scales counts.
        ({"window": 32}, [(50, 64)], 2 * 32 * 32, [(2, 32)] * 3),
        ({"scales": (0.5, 2.0)}, [(16, 16)] * 5, 4 * 32 * 32, [(4, 8), (4, 32), (1, 8), (1, 32)]),
    ],
)
def test_batches_are_as_large_as_memory_allows(
    change: dict[str, Any], sizes: list[tuple[int, int]], pixels: float, passes: list[tuple[int, int]]
) -> None:
    segmenter = _segmenter(rule=InferenceSettings(**change), batch=8, pixels=pixels)
    _assert_as_if_alone(segmenter, [_image(*size, seed) for seed, size in enumerate(sizes)])
    assert _passes(segmenter) == passes


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

    segmenter = _segmenter(Holding(), batch=4)
    assert len(segmenter([_image(16, 16)] * 4)) == 4
    assert len(held) == 2


@pytest.mark.parametrize("lanes", [None, 2])
def test_another_error_is_not_taken_for_too_little_memory(lanes: int | None) -> None:
    segmenter = _segmenter(Crowded(100, RuntimeError("expected scalar type Float")), batch=4, lanes=lanes)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        segmenter([_image(16, 16)] * 4)
    assert len(_inputs(segmenter)) == 1


# --- lanes ---------------------------------------------------------------------------------------------------------


def test_on_a_cpu_a_pass_has_no_more_pixels_than_the_caches_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "CPU_PIXELS", 2 * 256 + 100)
    images = [_image(16, 16, seed) for seed in range(5)] + [_image(32, 32)] * 2
    segmenter = _segmenter(batch=8)
    _assert_as_if_alone(segmenter, images)
    assert _passes(segmenter) == [(2, 16), (2, 16), (1, 32), (1, 32), (1, 16)]
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


def _meeting(lanes: int, *, together: int, pixels: float = math.inf) -> tuple[Segmenter, Meeting]:
    segmenter = _segmenter(batch=1, lanes=lanes, pixels=pixels)
    model = Meeting(together)
    model.changed = threading.Condition()
    segmenter.model, segmenter.coarse = model, model.coarse
    return segmenter, model


def test_in_lanes_passes_are_under_way_side_by_side_on_one_thread_each() -> None:
    images = [_image(16 + 8 * (seed % 3), 16, seed) for seed in range(20)]
    segmenter, model = _meeting(3, together=3)
    _assert_as_if_alone(segmenter, images)
    assert (model.most, model.threads) == (3, {1})


@pytest.mark.parametrize(("side", "images", "together"), [(16, 12, 2), (32, 5, 1)])
def test_passes_under_way_side_by_side_share_the_memory(side: int, images: int, together: int) -> None:
    segmenter, model = _meeting(4, together=together, pixels=2 * 256)
    assert len(segmenter([_image(side, side, seed) for seed in range(images)])) == images
    assert model.most == together


def test_a_segmenter_goes_when_nobody_needs_it() -> None:
    """With its copy of the network, at once: not when some collector comes by."""
    gc.disable()
    try:
        segmenter = _segmenter()
        seen = weakref.ref(segmenter.model)
        del segmenter
        assert seen() is None
    finally:
        gc.enable()


# --- an asynchronous device ------------------------------------------------------------------------------------


def test_an_asynchronous_device_has_the_next_batch_before_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "is_async", lambda _: True)
    images = [_image(16, 16 + 8 * (seed % 2), seed) for seed in range(11)]
    segmenter = _segmenter(batch=2)
    launched, predictions = [], {}
    for key, outcome in segmenter.predict(enumerate(map(segmenter.prepare, images))):
        launched.append(len(_inputs(segmenter)))
        predictions[key] = prediction_of(outcome)
    # Pairs of one size are complete with images 2, 3, 6, 7, 10, and 9 is alone.
    assert list(predictions) == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9]
    assert launched == [2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 6]
    for index, expected in enumerate(_segmenter()(images)):
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

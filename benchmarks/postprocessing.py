"""From coarse logits to classes: what ``postprocess`` costs on one core, beside the plain formulation and the network.

The plain formulation upsamples all logits at once (``F.interpolate``), then takes softmax and maximum. The memory of a
large image is that of a process of its own, Python and PyTorch included.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.meter import peak_bytes
from pspnet_core.inference.postprocess import WholeView, postprocess
from pspnet_core.network.deploy import deploy
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig

CLASSES = (11, 19, 150)
HEIGHT, WIDTH = 360, 480
LARGE_CLASSES, LARGE_SIDE = 150, 4096
STRIDE = 8  # pixels per coarse cell


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one number of classes showed, in milliseconds per image (medians)."""

    classes: int
    ours_ms: float
    plain_ms: float
    network_ms: float
    """PSPNet-50 as it is deployed, float32."""


@dataclass(frozen=True, kw_only=True)
class LargeResult:
    """What a large image showed."""

    seconds: float
    peak_gb: float
    """Of the whole process, in 10^9 bytes."""


def run(*, repeat: int = 15, backbone: str = "resnet50") -> list[Result]:
    """Time the three, in turn, at 480x360 for each of ``CLASSES``."""
    with one_core(), torch.inference_mode():
        return [_compare(classes, repeat, backbone) for classes in CLASSES]


def run_large(classes: int = LARGE_CLASSES, side: int = LARGE_SIDE) -> LargeResult:
    """Postprocess one large image in a fresh process.

    Raises:
        CalledProcessError: when that process fails.
    """
    command = [sys.executable, "-m", "benchmarks.postprocessing", str(classes), str(side)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return LargeResult(**json.loads(answer))


def lines(results: list[Result], large: LargeResult) -> list[str]:
    """The results as lines to print."""
    rows = [
        f"  {result.classes:3} classes  {result.ours_ms:6.1f} ms, plain {result.plain_ms:.1f} ms "
        f"({result.plain_ms / result.ours_ms:.1f} times that), network {result.network_ms:.0f} ms"
        for result in results
    ]
    return [
        f"post-processing of {WIDTH}x{HEIGHT} on one core",
        *rows,
        f"post-processing of {LARGE_SIDE}x{LARGE_SIDE}, {LARGE_CLASSES} classes, on one core",
        f"  {large.seconds:.1f} s, peak memory of the process {large.peak_gb:.2f} GB",
    ]


@contextmanager
def one_core() -> Iterator[None]:
    """Let PyTorch use one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _compare(classes: int, repeat: int, backbone: str) -> Result:
    logits = _coarse(classes, HEIGHT, WIDTH)
    deployed = deploy(PSPNet(PSPNetConfig(classes=classes, backbone=backbone)))
    pixels = torch.zeros(1, 3, HEIGHT, WIDTH, dtype=torch.uint8)
    ours, plain = _in_turn(
        repeat,
        lambda: postprocess([WholeView(HEIGHT, WIDTH, [logits])], HEIGHT, WIDTH, align_corners=False),
        lambda: F.interpolate(logits[None], size=(HEIGHT, WIDTH), mode="bilinear").softmax(1).max(1),
    )
    (network,) = _in_turn(1 + repeat // 10, lambda: deployed.coarse(pixels))
    return Result(classes=classes, ours_ms=ours, plain_ms=plain, network_ms=network)


def _coarse(classes: int, height: int, width: int) -> Tensor:
    """Logits with clear winners and ragged borders, as a network's."""
    generator = torch.Generator().manual_seed(classes)
    return 4 * torch.randn(classes, -(-height // STRIDE), -(-width // STRIDE), generator=generator)


def _in_turn(repeat: int, *functions: Callable[[], object]) -> list[float]:
    """Median milliseconds of each function, run one after the other ``repeat`` times, once more to warm up."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(1 + repeat):
        for taken, function in zip(seconds, functions, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [1e3 * statistics.median(taken[1:]) for taken in seconds]


def _large(classes: int, side: int) -> None:
    """Print a LargeResult as JSON."""
    with one_core(), torch.inference_mode():
        view = WholeView(side, side, [_coarse(classes, side, side)])
        start = time.perf_counter()
        postprocess([view], side, side, align_corners=False)
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_gb": peak_bytes() / 1e9}))


if __name__ == "__main__":
    _large(*map(int, sys.argv[1:]))

"""The network against the plain formulation of its authors and against other engines: same weights, same process.

All contenders of one setting run in turn, round after round, and the medians are compared: whatever slows the machine
down for a while slows all of them. Ratios are speeds relative to the plain formulation in float32, eager.
"""

import functools
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.meter import peak_bytes
from pspnet_core.device import compile_network, inference_dtype, place
from pspnet_core.network.deploy import deploy
from pspnet_core.network.pspnet import Logits, PSPNet, PSPNetConfig

Forward = Callable[[], Any]
CLASSES = 21


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is compared at once."""

    backbone: str = "resnet50"
    size: int = 473
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.backbone}, {self.batch} x {self.size} x {self.size}"

    def model(self) -> PSPNet:
        """The network of the paper's code, with random weights; the same for every contender."""
        torch.manual_seed(0)
        config = PSPNetConfig(classes=CLASSES, backbone=self.backbone, stem="deep", dilation="full", align_corners=True)
        return PSPNet(config)

    def images(self) -> Tensor:
        """``(B, 3, H, W)`` uint8."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (self.batch, 3, self.size, self.size), dtype=torch.uint8, generator=generator)


class PlainPSPNet(nn.Module):
    """PSPNet as its authors write it (pool, upsample, concatenate, convolve), over the modules of one of ours."""

    def __init__(self, model: PSPNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Logits:
        """Logits ``(B, C, H, W)`` of ``(B, N, H, W)`` uint8; the auxiliary ones in training only, as its authors do."""
        third, fourth = self.model.backbone(self.model.preprocess(images))
        main = self._resize(self._decode(fourth), images)
        if self.model.auxiliary is None or not self.training:
            return Logits(main, None)
        return Logits(main, self._resize(self.model.auxiliary(third), images))

    def _decode(self, feature: Tensor) -> Tensor:
        config = self.model.config
        grids = [
            self._resize(stage(F.adaptive_avg_pool2d(feature, size)), feature)
            for size, stage in zip(config.bins, self.model.pyramid.stages, strict=True)
        ]
        parts = [feature, *grids] if config.fusion_order == "feature_first" else [*grids, feature]
        fused = torch.cat(parts, dim=1)
        for layer in self.model.fusion.children():
            fused = layer(fused)
        logits: Tensor = self.model.decoder(fused)
        return logits

    def _resize(self, x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=self.model.config.align_corners)


# --- forward -----------------------------------------------------------------------------------------------------


def forward(setting: Setting, names: Sequence[str], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each contender; a contender whose logits differ ends the benchmark."""
    model, images = setting.model().eval(), setting.images()
    with torch.inference_mode():
        expected = PlainPSPNet(model)(images).main
        runs: dict[str, Forward] = {}
        for name in names:
            run = CONTENDERS[name](model, images)
            difference = _difference(run(), expected)
            if difference > (0.1 if "bfloat16" in name else 1e-4):
                raise RuntimeError(f"{name} is {difference:.0e} from the plain logits")
            runs[name] = run
        return _alternate(runs, rounds)


def _plain(model: PSPNet, images: Tensor, *, dtype: torch.dtype = torch.float32, compile: bool = False) -> Forward:
    plain: Callable[[Tensor], Logits] = PlainPSPNet(model)
    if compile:
        plain = compile_network(plain, images.device)

    def run() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return plain(images).main

    return run


def _ours(
    model: PSPNet,
    images: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    winograd: bool | None = None,
) -> Forward:
    deployed: Callable[[Tensor], Logits] = deploy(model, dtype, winograd=winograd)
    if compile:
        deployed = compile_network(deployed, images.device)
    return lambda: deployed(images).main


def _onnxruntime(model: PSPNet, images: Tensor) -> Forward:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = _plain_onnx(model, images, Path(folder))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)[0]


def _openvino(model: PSPNet, images: Tensor, *, precision: str = "f32") -> Forward:
    import openvino

    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        network = core.read_model(_plain_onnx(model, images, Path(folder)))
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        compiled = core.compile_model(network, "CPU", settings)
    request = compiled.create_infer_request()
    return lambda: request.infer([images.numpy()])[0]


def _plain_onnx(model: PSPNet, images: Tensor, folder: Path) -> Path:
    """The plain formulation as an ONNX file of fixed size."""
    path = folder / "plain.onnx"

    class Main(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = PlainPSPNet(model)

        def forward(self, images: Tensor) -> Tensor:
            logits: Logits = self.plain(images)
            return logits.main

    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Main().eval(), (images.clone(),), str(path), dynamo=True, verbose=False)
    return path


CONTENDERS: dict[str, Callable[[PSPNet, Tensor], Forward]] = {
    "plain, float32, eager": _plain,
    "plain, float32, compiled": functools.partial(_plain, compile=True),
    "plain, bfloat16, eager": functools.partial(_plain, dtype=torch.bfloat16),
    "ours, float32, eager, no Winograd": functools.partial(_ours, winograd=False),
    "ours, float32, eager": _ours,
    "ours, float32, compiled, no Winograd": functools.partial(_ours, compile=True, winograd=False),
    "ours, float32, compiled": functools.partial(_ours, compile=True),
    "ours, bfloat16, eager": functools.partial(_ours, dtype=torch.bfloat16),
    "ours, bfloat16, compiled": functools.partial(_ours, dtype=torch.bfloat16, compile=True),
    "plain in ONNX Runtime, float32": _onnxruntime,
    "plain in OpenVINO, float32": _openvino,
    "plain in OpenVINO, bfloat16": functools.partial(_openvino, precision="bf16"),
}


def contenders(*, compiled: bool, emulated: bool) -> list[str]:
    """Those that can run here.

    Args:
        compiled: whether to compile some, which takes minutes each.
        emulated: whether to run bfloat16 where the processor does not multiply it.
    """
    skipped = set() if compiled else {name for name in CONTENDERS if "compiled" in name}
    if not emulated and inference_dtype(torch.device("cpu")) != torch.bfloat16:
        skipped |= {name for name in CONTENDERS if "bfloat16" in name}
    for engine, module in (("ONNX Runtime", "onnxruntime"), ("OpenVINO", "openvino")):
        if importlib.util.find_spec(module) is None:
            print(f"{engine} is not installed: pip install -e '.[bench]'")
            skipped |= {name for name in CONTENDERS if engine in name}
    return [name for name in CONTENDERS if name not in skipped]


# --- forward and backward ----------------------------------------------------------------------------------------


def training(setting: Setting, *, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward and backward passes in training mode, plain and ours in turn."""
    return _alternate({name: _step(name, setting) for name in TRAINED}, rounds)


def training_memory(setting: Setting, *, name: str) -> float:
    """Peak resident MB of a process that runs two forward and backward passes."""
    program = "import sys, benchmarks.network as n; n.print_peak(*sys.argv[1:])"
    arguments = [name, setting.backbone, str(setting.size), str(setting.batch), str(torch.get_num_threads())]
    output = subprocess.run(
        [sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True
    ).stdout
    return float(output)


def print_peak(name: str, backbone: str, size: str, batch: str, threads: str) -> None:
    """The other end of ``training_memory``."""
    torch.set_num_threads(int(threads))
    run = _step(name, Setting(backbone=backbone, size=int(size), batch=int(batch)))
    run()
    run()
    print(peak_bytes() / 1e6)


def _step(name: str, setting: Setting) -> Forward:
    model, images = setting.model().train(), setting.images()
    network = TRAINED[name](model)

    def run() -> None:
        logits = network(images)
        (logits.main.mean() + 0.4 * logits.aux.mean()).backward()
        model.zero_grad(set_to_none=True)

    return run


def _placed(model: PSPNet) -> nn.Module:
    return place(model, torch.device("cpu"))


TRAINED: dict[str, Callable[[PSPNet], nn.Module]] = {"plain": PlainPSPNet, "ours": _placed}


# --- common ------------------------------------------------------------------------------------------------------


def _alternate(runs: dict[str, Forward], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _difference(found: Any, expected: Tensor) -> float:
    """Largest difference relative to the largest logit."""
    return float((torch.as_tensor(np.asarray(found)) - expected).abs().max() / expected.abs().max())


def lines(title: str, seconds: dict[str, list[float]]) -> Iterator[str]:
    """Medians and speeds relative to the first contender, as lines to print."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base = next(iter(medians.values()))
    yield f"{title}: median of {len(next(iter(seconds.values())))} rounds, speed relative to the first"
    for name, median in medians.items():
        yield f"  {name:38s} {median * 1000:8.0f} ms   {base / median:5.2f}"

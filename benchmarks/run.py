"""Run the benchmarks and print their figures with the machine they were taken on."""

import argparse
import itertools
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import feeding, labelling, network, postprocessing
from pipelines.cluster import ray_session


def main() -> None:
    """Parse the few flags and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", nargs="*", help=f"any of {', '.join(BENCHMARKS)}; all of them by default")
    parser.add_argument("--images", type=int, default=8192, help="labelling: images to label")
    parser.add_argument("--photographs", type=Path, help="labelling: folder of 480x360 JPEGs; drawn scenes by default")
    parser.add_argument("--data", type=Path, help="feeding: labelled images, layout folder; drawn scenes by default")
    parser.add_argument("--repeat", type=int, default=3, help="labelling: runs")
    parser.add_argument("--backbones", nargs="+", default=["resnet50"], help="network, training: backbones")
    parser.add_argument("--sizes", nargs="+", type=int, default=[473], help="network, training: sides in pixels")
    parser.add_argument("--batches", nargs="+", type=int, default=[1], help="network: images per pass")
    parser.add_argument("--rounds", type=int, default=5, help="network, training: rounds of all contenders")
    parser.add_argument("--compile", action="store_true", help="network: compiled contenders, too (minutes each)")
    parser.add_argument("--bfloat16", action="store_true", help="network: bfloat16 where it is emulated, too (slow)")
    options = parser.parse_args()
    unknown = [which for which in options.which if which not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]}; choose among {', '.join(BENCHMARKS)}")
    print(machine())
    for which in options.which or BENCHMARKS:
        BENCHMARKS[which](options)


def _labelling(options: argparse.Namespace) -> None:
    with ray_session():
        for _ in range(options.repeat):
            with tempfile.TemporaryDirectory() as folder:
                result = labelling.run(Path(folder), images=options.images, photographs=options.photographs)
            print(*labelling.lines(result), sep="\n", flush=True)


def _network(options: argparse.Namespace) -> None:
    names = network.contenders(compiled=options.compile, emulated=options.bfloat16)
    for backbone, size, batch in itertools.product(options.backbones, options.sizes, options.batches):
        setting = network.Setting(backbone=backbone, size=size, batch=batch)
        print(
            *network.lines(f"{setting}", network.forward(setting, names, rounds=options.rounds)), sep="\n", flush=True
        )


def _training(options: argparse.Namespace) -> None:
    for backbone, size in itertools.product(options.backbones, options.sizes):
        setting = network.Setting(backbone=backbone, size=size, batch=2)  # BatchNorm needs two
        seconds = network.training(setting, rounds=options.rounds)
        print(*network.lines(f"forward and backward, {setting}", seconds), sep="\n", flush=True)
        peaks = {name: network.training_memory(setting, name=name) for name in seconds}
        print("  peak memory of the process: " + ", ".join(f"{name} {peak:.0f} MB" for name, peak in peaks.items()))


def _postprocessing(options: argparse.Namespace) -> None:
    print(*postprocessing.lines(postprocessing.run(), postprocessing.run_large()), sep="\n", flush=True)


def _feeding(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(*feeding.lines(feeding.run(Path(folder), options.data)), sep="\n", flush=True)


BENCHMARKS: dict[str, Callable[[argparse.Namespace], None]] = {
    "labelling": _labelling,
    "network": _network,
    "training": _training,
    "postprocessing": _postprocessing,
    "feeding": _feeding,
}


def machine() -> str:
    """Cores, instruction set and versions."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores ({capability}), Python {platform.python_version()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()

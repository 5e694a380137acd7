"""Run the benchmarks and print their figures with the machine they were taken on."""

import argparse
import itertools
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import (
    baselines,
    feeding,
    labelling,
    network,
    planning,
    postprocessing,
    reduced,
    scaling,
)
from pipelines.cluster.session import ray_session


def main() -> None:
    """Parse the few flags and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", nargs="*", help=f"any of {', '.join(BENCHMARKS)}; all of them by default")
    parser.add_argument("--images", type=int, help="labelling and its kin: images to label")
    parser.add_argument("--photographs", type=Path, help="labelling: folder of 480x360 JPEGs; drawn scenes by default")
    parser.add_argument(
        "--data", type=Path, help="feeding, reduced: labelled images, layout folder; drawn scenes by default"
    )
    parser.add_argument("--model", type=Path, help="reduced: checkpoint folder; random weights by default")
    parser.add_argument("--chunks", type=int, default=120, help="scaling: chunks for each node")
    parser.add_argument("--nodes", nargs="+", type=int, default=[*scaling.NODES], help="scaling: simulated nodes")
    parser.add_argument("--labelled", type=int, default=10_000_000, help="planning: images that are labelled already")
    parser.add_argument("--new", type=int, default=1_000_000, help="planning: images that are not")
    parser.add_argument("--labels", help="planning: empty folder or bucket for label files; local disk by default")
    parser.add_argument("--empty", type=int, default=20_000, help="driving: chunks")
    parser.add_argument("--repeat", type=int, default=3, help="labelling: runs")
    parser.add_argument("--backbones", nargs="+", default=["resnet50"], help="network, training, bare: backbones")
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
                result = labelling.run(Path(folder), images=options.images or 8192, photographs=options.photographs)
            print(*labelling.lines(result), sep="\n", flush=True)


def _in_folder(function: Callable[[Path, argparse.Namespace], list[str]]) -> Callable[[argparse.Namespace], None]:
    """A benchmark that wants a folder for its files and gives lines to print."""

    def run(options: argparse.Namespace) -> None:
        with tempfile.TemporaryDirectory() as folder:
            print(*function(Path(folder), options), sep="\n", flush=True)

    return run


def _against(folder: Path, options: argparse.Namespace) -> list[str]:
    images = options.images or 2048
    return baselines.lines(baselines.run(folder, images=images, photographs=options.photographs), images)


def _executors(folder: Path, options: argparse.Namespace) -> list[str]:
    return labelling.executors(folder, counts=(16, 64, 256, 1024), backbone="resnet18")


def _sleeping(folder: Path, options: argparse.Namespace) -> list[str]:
    return labelling.sleeping(folder, images=options.images or 8192, photographs=options.photographs)


def _bare(folder: Path, options: argparse.Namespace) -> list[str]:
    return labelling.bare(folder, images=options.images or 96, backbone=options.backbones[0])


def _memory(folder: Path, options: argparse.Namespace) -> list[str]:
    return labelling.memory(folder, images=options.images or 50_000, photographs=options.photographs)


def _scaling(folder: Path, options: argparse.Namespace) -> list[str]:
    return scaling.lines(scaling.run(folder, chunks=options.chunks, nodes=tuple(options.nodes)))


def _reduced(folder: Path, options: argparse.Namespace) -> list[str]:
    return reduced.lines(reduced.run(folder, images=options.images or 32, model=options.model, data=options.data))


def _planning(folder: Path, options: argparse.Namespace) -> list[str]:
    night = {"labelled": options.labelled, "new": options.new, "labels": options.labels}
    return planning.lines(planning.run(folder, **night), **night)


def _driving(folder: Path, options: argparse.Namespace) -> list[str]:
    return scaling.driving_lines(scaling.drive(folder, chunks=options.empty))


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
    "against": _in_folder(_against),
    "executors": _in_folder(_executors),
    "sleeping": _in_folder(_sleeping),
    "bare": _in_folder(_bare),
    "memory": _in_folder(_memory),
    "scaling": _in_folder(_scaling),
    "reduced": _in_folder(_reduced),
    "planning": _in_folder(_planning),
    "driving": _in_folder(_driving),
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

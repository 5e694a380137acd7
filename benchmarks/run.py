"""Run the benchmarks and print their figures with the machine they were taken on."""

import argparse
import os
import platform
import tempfile
from pathlib import Path

import torch

from benchmarks import labelling
from pipelines.cluster import ray_session


def main() -> None:
    """Parse the few flags and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8192, help="images to label")
    parser.add_argument("--photographs", type=Path, help="folder of 480x360 JPEGs; drawn scenes by default")
    parser.add_argument("--repeat", type=int, default=3, help="runs")
    options = parser.parse_args()
    print(machine())
    with ray_session():
        for _ in range(options.repeat):
            with tempfile.TemporaryDirectory() as folder:
                result = labelling.run(Path(folder), images=options.images, photographs=options.photographs)
            print(*labelling.lines(result), sep="\n", flush=True)


def machine() -> str:
    """Cores, instruction set and versions."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores ({capability}), Python {platform.python_version()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()

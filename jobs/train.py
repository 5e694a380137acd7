#!/usr/bin/env python3
"""Train a PSPNet; flags are the fields of ``TrainConfig``."""

import sys

from jobs.cli import main
from pipelines.training.config import TrainConfig
from pipelines.training.job import train

if __name__ == "__main__":
    sys.exit(main(TrainConfig, train))

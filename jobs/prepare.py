#!/usr/bin/env python3
"""Check a labelled data set and pack it into Parquet shards; flags are the fields of ``PrepareConfig``."""

import sys

from jobs.cli import main
from pipelines.datasets.packing import PrepareConfig, prepare

if __name__ == "__main__":
    sys.exit(main(PrepareConfig, prepare))

#!/usr/bin/env python3
"""Show the whole product on drawn street scenes; flags are the fields of ``DemoConfig``."""

import sys

from jobs.cli import main
from pipelines.demo.demo import DemoConfig, demo

if __name__ == "__main__":
    sys.exit(main(DemoConfig, demo))

#!/usr/bin/env python3
"""Label a bucket of images; flags are the fields of ``LabelConfig``."""

import sys

from jobs.cli import main
from pipelines.labelling.job import LabelConfig, label

if __name__ == "__main__":
    sys.exit(main(LabelConfig, label))

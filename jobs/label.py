#!/usr/bin/env python3
"""Label a bucket of images; flags are the fields of ``LabelConfig``."""

import sys

from jobs.cli import main
from pipelines.labelling.config import LabelConfig
from pipelines.labelling.job import label

if __name__ == "__main__":
    sys.exit(main(LabelConfig, label))

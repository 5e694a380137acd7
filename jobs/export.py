#!/usr/bin/env python3
"""Export a model to ONNX or torch.export; flags are the fields of ``ExportConfig``."""

import sys

from jobs.cli import main
from pipelines.models.exporting import ExportConfig, export

if __name__ == "__main__":
    sys.exit(main(ExportConfig, export))

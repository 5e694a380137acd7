#!/usr/bin/env python3
"""Turn a PSPNet checkpoint of another project into ours; flags are the fields of ``ConvertConfig``."""

import sys

from jobs.cli import main
from pipelines.models.converting import ConvertConfig, convert

if __name__ == "__main__":
    sys.exit(main(ConvertConfig, convert))

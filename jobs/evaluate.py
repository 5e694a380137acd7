#!/usr/bin/env python3
"""Score a model on labelled images; flags are the fields of ``EvaluateConfig``."""

import sys

from jobs.cli import main
from pipelines.evaluation.evaluate import EvaluateConfig, evaluate

if __name__ == "__main__":
    sys.exit(main(EvaluateConfig, evaluate))

"""Reports of a labelling run: totals, run record, Prometheus, MLflow."""

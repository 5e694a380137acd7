"""What a labelling run tells: totals, run record, Prometheus, MLflow."""

"""MLflow: the server, runs, metrics and the model registry."""

"""The jobs' pipelines: the only package that knows Ray, MLflow and object storage."""

"""The process's environment variables, read while other threads may change them."""

import os


def variables() -> dict[str, str]:
    """A copy of the environment.

    Unlike ``dict(os.environ)`` it does not fail when a thread deletes a variable meanwhile, as MLflow's telemetry does.
    """
    return {name: value for name in list(os.environ) if (value := os.environ.get(name)) is not None}

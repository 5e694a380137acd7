"""The process's environment variables, for itself and for its children."""

import os
import sys


def variables() -> dict[str, str]:
    """A copy of the environment.

    Unlike ``dict(os.environ)`` it does not fail while another thread deletes a variable, as MLflow's telemetry does.
    """
    return {name: value for name in list(os.environ) if (value := os.environ.get(name)) is not None}


def child_environment() -> dict[str, str]:
    """The environment of a Python that imports from wherever this process does: Ray adds to its path."""
    environment = variables()
    places = [environment.get("PYTHONPATH"), *sys.path]
    return environment | {"PYTHONPATH": os.pathsep.join(place for place in places if place)}

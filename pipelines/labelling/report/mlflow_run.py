"""What a labelling run leaves in MLflow: its setting, its numbers, and the version of the model that did it."""

from collections.abc import Mapping
from typing import Any

from pipelines.labelling.report.totals import Totals
from pipelines.tracking.registry import Origin
from pipelines.tracking.runs import Run
from pipelines.tracking.server import patiently

COUNTS = ("images", "labelled", "skipped", "errors", "seconds", "images_per_second")
VERSION_TAG = "labelling"
"""Tag of a model version: the last run that labelled with it."""


def log_start(run: Run, setting: Mapping[str, Any], origin: Origin) -> None:
    """Log what is known beforehand, and tie run and model version to each other.

    Args:
        setting: every field of the config, and what identifies the model.
    """
    run.log_setting(setting)
    ties = {"model_version": origin.version, "source_run_id": origin.run_id}
    run.log_tags({name: value for name, value in ties.items() if value})
    if origin.version:
        name, version = origin.version.removeprefix("models:/").rsplit("/", 1)
        client = run.client
        patiently(
            run.uri,
            lambda: client.set_model_version_tag(name, version, VERSION_TAG, run.run_id),
            seconds=run.patience,
        )


def log_end(run: Run, result: Mapping[str, Any], totals: Totals, spent: Mapping[str, Any]) -> None:
    """Log what it came to.

    Args:
        result: what ``label`` returns.
        spent: what ``costs.spent`` returns.
    """
    if result["run_id"]:  # else there was nothing to do
        run.log_tags({"run_id": result["run_id"]})
    metrics = {name: float(result[name]) for name in COUNTS}
    metrics |= {name: float(value) for name, value in spent.items() if value is not None and name not in COUNTS}
    metrics |= {f"errors_by_kind/{kind}": float(count) for kind, count in totals.kinds.items()}
    for clock, stages in (("stage_cpu_seconds", totals.cpu), ("stage_wall_seconds", totals.wall)):
        metrics |= {f"{clock}/{stage}": float(seconds) for stage, seconds in stages.items()}
    patiently(run.uri, lambda: run.log_metrics(metrics, step=0), seconds=run.patience)

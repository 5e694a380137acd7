"""A labelling run in MLflow: its config, its metrics, and the version of the model that it used."""

from collections.abc import Mapping
from typing import Any

from pipelines.labelling.report.totals import Totals
from pipelines.tracking.model_uris import Origin
from pipelines.tracking.runs import Run

COUNTS = ("images", "labelled", "skipped", "errors", "seconds", "images_per_second")
VERSION_TAG = "labelling"
"""Tag of a model version: the last run that labelled with it."""


def log_start(run: Run, setting: Mapping[str, Any], origin: Origin) -> None:
    """Log the config, and link run and model version.

    Args:
        setting: every field of the config, and what identifies the model.
    """
    run.log_setting(setting)
    run.log_origin(origin, tag=VERSION_TAG)


def log_end(run: Run, result: Mapping[str, Any], totals: Totals, spent: Mapping[str, Any]) -> None:
    """Log the results.

    Args:
        result: what ``label`` returns.
        spent: what ``totals.spent`` returns.
    """
    if result["run_id"]:  # else there was nothing to do
        run.log_tags({"run_id": result["run_id"]})
    metrics = {name: float(result[name]) for name in COUNTS}
    metrics |= {name: float(value) for name, value in spent.items() if value is not None and name not in COUNTS}
    metrics |= {f"errors_by_kind/{kind}": float(count) for kind, count in totals.kinds.items()}
    for clock, stages in (("stage_cpu_seconds", totals.cpu), ("stage_wall_seconds", totals.wall)):
        metrics |= {f"{clock}/{stage}": float(seconds) for stage, seconds in stages.items()}
    run.log_metrics(metrics, step=0)

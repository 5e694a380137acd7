"""Metrics as Prometheus would read them from a real Ray node, and the dashboard that shows them."""

import json
import re
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from ray.exceptions import GetTimeoutError

from pipelines.labelling.job import label
from pipelines.labelling.report.prometheus import EXPORTED, METRICS, RUN_TAGS, STATES, LabelMetrics, Watch, watch_chunks
from pipelines.labelling.report.totals import Totals
from pipelines.labelling.stages.coordinator import ChunkStates
from pspnet_core.checkpoints.checkpoint import load_checkpoint
from tests.support.labeljob import make_config, put_scene, record_of
from tests.support.paths import ROOT
from tests.support.waiting import until

DOCS = ROOT / "docs"
DASHBOARD: dict[str, Any] = json.loads((DOCS / "grafana/labelling.json").read_text())
Sample = tuple[str, frozenset[tuple[str, str]]]


def exported(run: str) -> dict[Sample, float]:
    """A run's samples on this node: name without the prefix, tags without Ray's own -> value."""
    port = ray.nodes()[0]["MetricsExportPort"]
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found: dict[Sample, float] = {}
    for sample in (sample for family in families for sample in family.samples):
        name = sample.name.removeprefix(EXPORTED)
        if name in METRICS and sample.labels.get("run") == run:
            tags = {key: sample.labels[key] for key in ("model", *METRICS[name].tags)}
            found[name, frozenset(tags.items())] = sample.value
    return found


def sample(name: str, **tags: str) -> Sample:
    return name, frozenset(tags.items())


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_as_prometheus_reads_it(tmp_path: Path, scene_model: Path) -> None:
    """The metrics agree with the run record, and both with what there was."""
    bucket = tmp_path / "bucket"
    for index in range(7):
        put_scene(bucket / f"{index}.jpg", index)
    (bucket / "empty.jpg").write_bytes(b"")
    (bucket / "text.png").write_bytes(b"<html>not here</html>")
    config = make_config(tmp_path, scene_model, local=None, price_cpu=0.5, track=False)
    result = label(config)
    record = record_of(config, result)
    model = load_checkpoint(scene_model).partition
    images = sample("pspnet_images_total", model=model)
    waiting = sample("pspnet_chunks", model=model, state="waiting")
    until(lambda: {(images, 9), (waiting, 0)} <= exported(result["run_id"]).items())
    found = exported(result["run_id"])
    size = sum(file.stat().st_size for file in bucket.iterdir())
    assert found[sample("pspnet_bytes_read_total", model=model)] == size == record["spent"]["bytes_read"]
    errors = {dict(tags)["kind"]: value for (name, tags), value in found.items() if name == "pspnet_errors_total"}
    assert errors == {"Empty": 1, "Unreadable": 1} == record["errors"]
    for clock in ("cpu", "wall"):
        seconds = record[f"{clock}_seconds"]
        assert set(seconds) == {"read", "segment", "decode", "predict", "encode", "write"}
        for stage, spent in seconds.items():
            key = sample("pspnet_stage_seconds_total", model=model, stage=stage, clock=clock)
            assert found[key] == pytest.approx(spent, abs=0.001)
    held = found[sample("pspnet_held_seconds_total", model=model, resource="cpu")]
    actors = found[sample("pspnet_held_seconds_total", model=model, resource="actor")]
    assert held > actors > record["wall_seconds"]["predict"] > 0  # two CPUs each, in this cluster
    assert held == pytest.approx(record["spent"]["cpu_seconds"], abs=0.001)
    assert record["spent"]["cost"] == pytest.approx(held / 3600 * 0.5, abs=1e-6)
    assert record["spent"]["cost_per_1000_images"] == pytest.approx(record["spent"]["cost"] / 9 * 1000)
    assert [found[sample("pspnet_chunks", model=model, state=state)] for state in STATES] == [0, 0, 0, 0]


def test_where_the_chunks_are() -> None:
    states = ChunkStates()
    for chunk in range(5):
        states.admit(chunk)
    for chunk in (*range(4), 3):
        states.begin(chunk)
    for chunk in range(2):
        states.done(chunk)
    assert states.under_way([]) == {"read": 1, "segment": 2, "write": 2}
    assert states.under_way([0]) == {"read": 1, "segment": 2, "write": 1}
    states.done(0)  # it comes late
    states.close()
    assert not states.admit(7)
    assert states.under_way([4]) == {"segment": 2, "write": 1}


def test_what_waits_is_what_is_neither_done_nor_under_way() -> None:
    metrics = Mock(spec=LabelMetrics)
    asked = Mock(side_effect=[{"read": 2, "segment": 1}, GetTimeoutError(), {"write": 1}])
    with watch_chunks(metrics, asked, 10) as watch:
        watch.add(0, Totals(labelled=4))
        watch.add(5, Totals(labelled=3, kinds=Counter(Missing=1)))
        watch.publish()
        metrics.queue.assert_called_once_with({"waiting": 5, "read": 2, "segment": 1})
        metrics.publish.assert_called_with(Totals(labelled=7, kinds=Counter(Missing=1)))
        watch.add(6, Totals(labelled=1))
        watch.publish()  # no answer: the old states stay, the chunk is told the next time
        metrics.queue.assert_called_once()
        metrics.publish.assert_called_with(Totals(labelled=8, kinds=Counter(Missing=1)))
        watch.add(7, Totals(labelled=1))
    # The context publishes once more on leaving.
    metrics.queue.assert_called_with({"waiting": 5, "write": 1})
    metrics.publish.assert_called_with(Totals(labelled=9, kinds=Counter(Missing=1)))
    assert asked.call_args_list == [call([0, 5]), call([6]), call([6, 7])]


def test_whether_anything_is_under_way() -> None:
    watch = Watch(Mock(spec=LabelMetrics), Mock(side_effect=[{"read": 1}, GetTimeoutError(), {"read": 0}, {}]), 10)
    assert [watch.is_idle() for _ in range(4)] == [False, False, True, True]


def test_metrics_that_fail_do_not_stop_the_work(caplog: pytest.LogCaptureFixture) -> None:
    with watch_chunks(Mock(spec=LabelMetrics), Mock(side_effect=ValueError("no such tag")), 10) as watch:
        watch.publish()
    assert caplog.text.count("metrics could not be published: no such tag") == 2


def test_what_is_not_known_to_the_coordinator_never_makes_a_negative_queue() -> None:
    metrics = Mock(spec=LabelMetrics)
    Watch(metrics, Mock(return_value={"write": 3}), 2).publish()
    metrics.queue.assert_called_once_with({"waiting": 0, "write": 3})


def test_the_names_of_the_metrics() -> None:
    for name, metric in METRICS.items():
        assert name.startswith("pspnet_")
        assert name.endswith("_total") == (metric.kind == "counter"), "Prometheus adds it to every counter"
        assert not set(metric.tags) & set(RUN_TAGS)


def queries() -> list[str]:
    """Every expression of the dashboard, those of its variables included."""
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    variables = [entry["query"]["query"] for entry in DASHBOARD["templating"]["list"] if entry["type"] == "query"]
    return panels + variables


def names_in(query: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", query))


@pytest.mark.parametrize("query", queries())
def test_every_query_of_the_dashboard_names_what_there_is(query: str) -> None:
    names = names_in(query)
    assert names
    for name in names:
        metric = METRICS.get(name.removeprefix(EXPORTED))
        assert metric or name.removeprefix(EXPORTED) in METRICS_GAUGES, name
        for selector in re.findall(rf"{name}\{{([^}}]*)\}}", query):
            tags = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", selector))
            assert metric and tags <= {*RUN_TAGS, *metric.tags}
    grouped = {tag.strip() for tags in re.findall(r"by \(([^)]*)\)", query) for tag in tags.split(",")}
    known = {*RUN_TAGS, *(tag for metric in METRICS.values() for tag in metric.tags), "ip", "GpuIndex"}
    assert grouped <= known


def test_the_page_describes_every_metric() -> None:
    rows = re.findall(r"^\| `ray_(\w+)` \| (\w+) \|([^|]*)\|", (DOCS / "watching.md").read_text(), re.MULTILINE)
    described = {name: (kind, tuple(re.findall(r"\w+", tags))) for name, kind, tags in rows}
    assert described == {name: (metric.kind, metric.tags) for name, metric in METRICS.items()}


def test_the_dashboard_shows_every_metric() -> None:
    shown = set().union(*map(names_in, queries()))
    assert {EXPORTED + name for name in METRICS} <= shown
    assert any("node_gpus_utilization" in name for name in shown)


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24

"""cluster.yaml as ``ray up`` reads it: defaults filled in, then Ray's schema and checks. Launches nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipelines.cluster.session import KEEP_IDLE
from tests.support.paths import ROOT

Config = dict[str, Any]


@pytest.fixture(scope="module")
def loaded() -> Config:
    content: Config = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    return content


@pytest.fixture
def config(loaded: Config) -> Config:
    """A copy that a test may break."""
    return copy.deepcopy(loaded)


@pytest.fixture
def prepared(config: Config) -> Config:
    filled: Config = prepare_config(config)
    return filled


def test_ray_accepts_the_file(prepared: Config) -> None:
    validate_config(prepared)
    assert prepared["available_node_types"].keys() == {"head", "gpu_l4", "gpu_a10g"}


def _without_resources(config: Config) -> None:
    del config["available_node_types"]["gpu_l4"]["resources"]


def _with_an_unknown_key(config: Config) -> None:
    config["max_worker"] = 3


def _with_a_wrong_type(config: Config) -> None:
    config["idle_timeout_minutes"] = "ten"


def _with_an_unknown_head(config: Config) -> None:
    config["head_node_type"] = "boss"


def _with_a_floor_above_the_ceiling(config: Config) -> None:
    config["available_node_types"]["gpu_l4"]["min_workers"] = config["max_workers"] + 1


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (_without_resources, jsonschema.ValidationError),
        (_with_an_unknown_key, jsonschema.ValidationError),
        (_with_a_wrong_type, jsonschema.ValidationError),
        (_with_an_unknown_head, ValueError),
        (_with_a_floor_above_the_ceiling, ValueError),
    ],
)
def test_ray_refuses_a_damaged_file(config: Config, damage: Callable[[Config], None], error: type[Exception]) -> None:
    damage(config)
    with pytest.raises(error):
        validate_config(prepare_config(config))


def test_an_idle_cluster_is_a_head_without_gpus(prepared: Config) -> None:
    types = prepared["available_node_types"]
    head = types.pop(prepared["head_node_type"])
    assert head["resources"]["CPU"] > 0
    assert "GPU" not in head["resources"]
    assert head["max_workers"] == 0
    for worker in types.values():
        assert worker["resources"]["GPU"] == 1
        assert worker["min_workers"] == 0
        assert 0 < worker["max_workers"] <= prepared["max_workers"]
    assert prepared["idle_timeout_minutes"] > 0


def test_every_node_runs_the_same_image_and_may_reach_the_bucket(prepared: Config) -> None:
    nodes = [kind["node_config"] for kind in prepared["available_node_types"].values()]
    assert len({node["ImageId"] for node in nodes}) == 1
    assert all(node["IamInstanceProfile"] == nodes[0]["IamInstanceProfile"] for node in nodes)


def test_mounts_are_what_the_installation_needs(prepared: Config) -> None:
    sources = set(prepared["file_mounts"].values())
    assert sources == {
        "LICENSE",
        "README.md",
        "jobs",
        "pipelines",
        "pspnet_core",
        "pyproject.toml",
        "requirements.lock",
    }
    assert [source for source in sorted(sources) if not (ROOT / source).exists()] == []


def test_every_node_asks_for_the_token_that_the_head_made(prepared: Config) -> None:
    assert any("get-auth-token --generate" in command for command in prepared["head_setup_commands"])
    assert prepared["cluster_synced_files"] == ["/home/ubuntu/.ray/auth_token"]
    for commands in (
        "head_setup_commands",
        "worker_setup_commands",
    ):  # prepare_config puts the common ones first
        assert any("RAY_AUTH_MODE=token" in command for command in prepared[commands])


def test_the_dashboard_is_reached_by_tunnel_only(prepared: Config) -> None:
    start = " ".join(prepared["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_nodes_keep_processes_that_are_idle_for_a_moment(prepared: Config, commands: str) -> None:
    assert f"export {'='.join(KEEP_IDLE)};" in " ".join(prepared[commands])

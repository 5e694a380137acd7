"""Training from end to end: two real Ray Train workers, a real MLflow store, and what comes after."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from pipelines.datasets.layouts import DataConfig
from pipelines.demo.demo import draw_dataset
from pipelines.demo.scenes import SCENE_CLASSES
from pipelines.evaluation.evaluate import EvaluateConfig, evaluate
from pipelines.models.loading import load_model
from pipelines.process.config_tree import build, flatten
from pipelines.storage import open_store
from pipelines.tracking.server import local_tracking, tracking_uri
from pipelines.training.checkpointing import CheckpointFolder
from pipelines.training.config import TrainConfig
from pipelines.training.job import train
from pipelines.training.publishing import TrainingFailed
from pspnet_core.errors import ConfigError
from pspnet_core.network.pspnet import PSPNet
from tests.support.in_process import replace_ray
from tests.support.setups import SMALL, config_of

pytestmark = pytest.mark.usefixtures("ray_cluster")
FLAGS: dict[str, Any] = SMALL | {"name": "scenes", "image_scale": 0.5, "workers": "2", "epochs": 1, "ema": 0.5}
FLAGS |= {"optimiser": "adamw", "lr": 0.001, "head_lr_factor": 1.0, "grad_clip": 10.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """One epoch by two workers of Ray, then the same run resumed for a second one by one worker without Ray.

    It is resumed once more, when there is nothing left to do.
    """

    data: Path
    output: Path
    tracking: str
    first: dict[str, Any]
    resumed: dict[str, Any]
    finished: dict[str, Any]

    def config(self, **changes: Any) -> TrainConfig:
        return config_of(self.data, **FLAGS | {"output": str(self.output)} | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, empty_tracking: Path, ray_cluster: None) -> Trained:
    folder = shutil.copytree(empty_tracking, tmp_path_factory.mktemp("training") / "home")
    draw_dataset(folder / "data", train=8, val=17, seed=0)  # two chunks to score: one for each worker
    config = config_of(folder / "data", output=str(folder / "runs"), **FLAGS)
    with local_tracking(folder):
        first = train(config)
        with pytest.MonkeyPatch.context() as patch:
            replace_ray(patch)
            longer = build(TrainConfig, flatten(config) | {"epochs": 2, "resume": True, "workers": "1"})
            resumed, finished = train(longer), train(longer)
        server = tracking_uri()
    return Trained(
        data=folder / "data", output=folder / "runs", tracking=server, first=first, resumed=resumed, finished=finished
    )


@pytest.fixture(autouse=True)
def same_tracking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "trained" in request.fixturenames:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue("trained").tracking)


def test_the_result_line(trained: Trained) -> None:
    assert trained.first["model"] == "models:/scenes/1"
    assert trained.resumed["model"] == "models:/scenes/2"
    assert set(trained.first["metrics"]) == {"miou", "macc", "aacc"}
    assert all(0 <= value <= 1 for value in trained.first["metrics"].values())
    assert trained.first["images_per_second"] > 0


def test_a_finished_run_registers_no_further_version(trained: Trained) -> None:
    assert trained.finished == trained.resumed
    client = MlflowClient(trained.tracking)
    assert len(client.search_model_versions("name = 'scenes'")) == 2
    outputs = client.get_run(trained.first["run_id"]).outputs
    assert outputs is not None and len(outputs.model_outputs) == 2


def test_mlflow_holds_parameters_metrics_and_model(trained: Trained) -> None:
    run = MlflowClient(trained.tracking).get_run(trained.first["run_id"])
    assert run.info.status == "FINISHED"
    assert (run.data.params["backbone"], run.data.params["batch"]) == ("resnet18", "4")
    assert {"loss", "lr", "images_per_second", "macc", "aacc", "workers"} <= set(run.data.metrics)
    steps = {"step/loss", "step/lr", "step/images_per_second", "step/data_wait_ms", "step/memory_mb"}
    assert steps <= set(run.data.metrics)
    client = MlflowClient(trained.tracking)
    assert client.get_metric_history(run.info.run_id, "miou")[0].value == trained.first["metrics"]["miou"]
    folders = (None, "confusion", "examples")
    found = {item.path for folder in folders for item in client.list_artifacts(run.info.run_id, folder)}
    assert {"config.yaml", "data_card.json", "environment.json"} <= found
    assert {"confusion/epoch-0001.png", "examples/epoch-0002.png"} <= found


def test_the_best_model_is_the_champion(trained: Trained) -> None:
    assert trained.first["champion"]
    better = trained.resumed["metrics"]["miou"] > trained.first["metrics"]["miou"]
    assert trained.resumed["champion"] == better
    best = load_model((trained.resumed if better else trained.first)["model"])
    assert load_model("models:/scenes@champion").partition == best.partition


def test_every_model_uri_leads_to_the_same_checkpoint(trained: Trained) -> None:
    by_registry, by_folder = load_model(trained.first["model"]), load_model(trained.first["checkpoint"])
    assert by_registry.partition == by_folder.partition
    # The run's model is the one that was logged last.
    by_run, resumed = load_model(f"runs:/{trained.first['run_id']}/model"), load_model(trained.resumed["model"])
    assert by_run.partition == resumed.partition
    assert by_registry.classes == SCENE_CLASSES
    assert (by_registry.settings.resize, by_registry.settings.size) == ("scale", 0.5)


def test_a_resumed_run_goes_on_and_does_not_start_again(trained: Trained) -> None:
    client = MlflowClient(trained.tracking)
    assert trained.resumed["run_id"] == trained.first["run_id"]
    history = client.get_metric_history(trained.resumed["run_id"], "lr")
    assert [point.step for point in history] == [1, 2]
    # The rate is a function of the step: the last of four steps, where a fresh start would be at the first ones.
    assert history[1].value == pytest.approx(0.001 * (1 - 3 / 4) ** 0.9)
    steps = client.get_metric_history(trained.resumed["run_id"], "step/loss")
    assert [point.step for point in steps] == [1, 2, 3, 4]
    # Two steps an epoch: the epoch's loss is their mean.
    losses = [point.value for point in client.get_metric_history(trained.resumed["run_id"], "loss")]
    assert losses == pytest.approx([(steps[0].value + steps[1].value) / 2, (steps[2].value + steps[3].value) / 2])


def test_training_changes_the_weights(trained: Trained) -> None:
    folder = CheckpointFolder(open_store(str(trained.output), field="output"), "scenes")
    one, two = (folder.read(entry) for entry in folder.entries()[-2:])  # after the first epoch and the second
    assert one.weights is not None and two.weights is not None
    for name, _ in PSPNet(one.model.config).named_parameters():
        assert not one.weights[name].equal(two.weights[name]), name
        assert not one.model.weights[name].equal(two.model.weights[name]), name


def test_evaluation_agrees_with_validation(trained: Trained) -> None:
    result = evaluate(EvaluateConfig(dataset=DataConfig(data=str(trained.data)), model=trained.first["model"]))
    assert result["images"] == 17
    assert set(result["iou"]) == set(SCENE_CLASSES.names)
    assert {key: result[key] for key in ("miou", "macc", "aacc")} == trained.first["metrics"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"resume": False}, r"holds a run already; add --resume"),
        ({"backbone": "resnet34"}, r"backbone=resnet34: the run to resume has resnet18"),
        ({"bins": (1,)}, r"bins=\[1\]: the run to resume has \[1, 2\]"),
        ({"ema": 0.0}, r"ema=0.0: the run to resume has 0.5"),
        ({"aux_weight": 0.0}, r"aux_weight=off: the run to resume has on"),
    ],
)
def test_a_run_is_not_overwritten(trained: Trained, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        train(trained.config(**{"resume": True} | changes))


def test_synchronised_statistics_need_gpus(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^norm=sync: torch has it on GPUs only; give auto, batch or frozen$"):
        train(trained.config(norm="sync", output=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("tracking_home")
def test_training_that_blows_up_ends_at_once(data: Path, tmp_path: Path) -> None:
    """At once, not after as many tries as failures are allowed; what was good before it is kept."""
    # A rate at which statistics overflow while the loss is still a number.
    flags = SMALL | {"image_scale": 0.5, "head_lr_factor": 1.0, "lr": 1e10, "checkpoint_every": 1, "epochs": 3}
    with pytest.raises(TrainingFailed) as caught:
        train(config_of(data, output=str(tmp_path / "runs"), **flags))
    found = re.fullmatch(
        r"training stopped: (?:the .* is (?:nan|inf)|.* are not finite) at step (\d) on images (\S+, \S+, \S+, \S+); "
        r"the last good checkpoint is (\S+); try a lower --lr, --grad-clip, or --precision float32",
        str(caught.value),
    )
    assert found, str(caught.value)
    keys = set(found[2].split(", "))
    assert keys <= {path.stem for path in (data / "images/train").iterdir()}
    assert len(keys) == 4
    progress = json.loads((Path(found[3]).parent / "progress.json").read_text())
    assert progress["step"] == int(found[1]) - 1
    assert all(tensor.isfinite().all() for tensor in load_model(found[3]).weights.values())

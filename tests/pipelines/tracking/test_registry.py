"""Models in MLflow: logged, registered, fetched, predicted with, and promoted."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import mlflow.artifacts
import numpy as np
import pytest
import safetensors.torch
import torch
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipelines.demo.scenes import SCENE_CLASSES
from pipelines.models.loading import load_model
from pipelines.storage import open_store
from pipelines.tracking.registry import promote
from pipelines.tracking.runs import Run, start_run
from pipelines.tracking.server import TrackingError, client_of
from pipelines.training.initial_weights import read_start
from pspnet_core.checkpoints.checkpoint import Checkpoint, load_checkpoint
from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import ClassTable
from pspnet_core.inference.segmenter import Segmenter
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig
from tests.support.mlflowserver import MlflowServer

PREDICT = """
import sys
import mlflow.pyfunc
import numpy as np

model = mlflow.pyfunc.load_model(sys.argv[1])
images = np.load("images.npz")
ragged = np.empty(2, dtype=object)
ragged[0], ragged[1] = images["small"], images["large"]
batch = model.predict(images["batch"])
mixed = model.predict(ragged)
listed = model.unwrap_python_model().predict([images["small"], images["large"]])
assert all((one == other).all() for one, other in zip(mixed, listed, strict=True))
try:
    model.predict(images["batch"].astype(np.float32))
except mlflow.exceptions.MlflowException as error:
    assert "float32" in str(error), error
else:
    raise AssertionError("the signature takes floats")
import pspnet_core
assert "pipelines" not in sys.modules and not any("pickle" in path for path in sys.argv)
np.savez("masks.npz", batch=batch, small=mixed[0], large=mixed[1])
print(pspnet_core.__file__)
print(model.metadata.signature)
"""


def small_checkpoint(folder: Path, *, seed: int = 0, classes: int = 3) -> Checkpoint:
    torch.manual_seed(seed)
    config = PSPNetConfig(
        classes=classes, backbone="resnet18", stages=2, bins=(1, 2), bin_width=8, fusion_width=8, auxiliary=False
    )
    table = ClassTable.from_json({"names": [f"class {index}" for index in range(classes)]})
    made = Checkpoint.from_model(PSPNet(config), name="small", classes=table)
    made.save(folder)
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Checkpoints of two class tables."""
    place = tmp_path_factory.mktemp("checkpoints")
    for classes in (2, 3):
        small_checkpoint(place / str(classes), classes=classes)
    return {classes: place / str(classes) for classes in (2, 3)}


def requests_for(server: MlflowServer, method: str, file: str) -> int:
    return len(re.findall(rf'"{method} \S*{file}\S* HTTP', server.log.read_text()))


def test_a_registered_model_predicts_masks_wherever_it_is_loaded(
    mlflow_server: MlflowServer, folders: dict[int, Path], tmp_path: Path
) -> None:
    run = start_run("models", "small")
    model = run.log_model(folders[3], "small", miou=0.5, data="abc", step=3)
    random = np.random.default_rng(0)
    images = {
        "batch": random.integers(0, 256, (2, 40, 56, 3), np.uint8),
        "small": random.integers(0, 256, (33, 47, 3), np.uint8),
        "large": random.integers(0, 256, (64, 50, 3), np.uint8),
    }
    np.savez(tmp_path / "images.npz", **images)  # type: ignore[arg-type]  # its other argument is a bool
    (tmp_path / "predict.py").write_text(PREDICT)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = subprocess.run(
        [sys.executable, "predict.py", model],
        cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    code, signature = said.stdout.splitlines()[0], said.stdout
    assert "/code/pspnet_core/" in code
    assert "Tensor('uint8', (-1, -1, -1, 3))" in signature and "Tensor('uint8', (-1, -1, -1))" in signature
    segmenter = Segmenter(load_checkpoint(folders[3]).model)
    with np.load(tmp_path / "masks.npz") as masks:
        assert masks["batch"].dtype == np.uint8
        assert np.array_equal(masks["batch"], np.stack([one.mask for one in segmenter(list(images["batch"]))]))
        for one, name in zip(segmenter([images["small"], images["large"]]), ("small", "large"), strict=True):
            assert np.array_equal(masks[name], one.mask)


def test_what_is_registered(mlflow_server: MlflowServer, folders: dict[int, Path], tmp_path: Path) -> None:
    run = start_run("models", "registered")
    model = run.log_model(folders[3], "registered", miou=0.5, data="abc", step=3)
    assert model == "models:/registered/1"
    client = MlflowClient(mlflow_server.uri)
    version = client.get_model_version("registered", "1")
    checkpoint = load_checkpoint(folders[3])
    assert version.run_id == run.run_id
    assert version.tags == {
        "classes": json.dumps(["class 0", "class 1", "class 2"]),
        "fingerprint": checkpoint.fingerprint,
        "miou": "0.5",
        "data": "abc",
    }
    outputs = client.get_run(run.run_id).outputs
    assert outputs is not None
    (output,) = outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert (logged.name, str(logged.status), output.step) == ("model", "READY", 3)
    place = Path(mlflow.artifacts.download_artifacts(logged.artifact_location, dst_path=str(tmp_path)))
    files = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert {"MLmodel", "requirements.txt", "pyfunc_model.py", "code/pspnet_core/network/pspnet.py"} <= files
    assert [name for name in files if name.endswith((".pkl", ".pyc", ".pt", ".pth"))] == []
    assert [name for name in files if name.endswith(".safetensors")] == ["artifacts/checkpoint/weights.safetensors"]
    requirements = (place / "requirements.txt").read_text().splitlines()
    names = {line.partition("==")[0] for line in requirements}
    assert names == {"mlflow", "torch", "numpy", "opencv-python-headless", "pillow", "safetensors"}
    # Whatever URI leads to it, the checkpoint comes once, and nothing besides.
    client.set_registered_model_alias("registered", "nightly", "1")
    weights, code = requests_for(mlflow_server, "GET", "weights"), requests_for(mlflow_server, "GET", "pspnet_core")
    uris = [model, "models:/registered@nightly", f"runs:/{run.run_id}/model", f"models:/{output.model_id}"]
    for number, uri in enumerate(uris, 1):
        assert load_model(uri).fingerprint == checkpoint.fingerprint
        assert requests_for(mlflow_server, "GET", "weights") == weights + number
    assert requests_for(mlflow_server, "GET", "pspnet_core") == code
    whole = read_start(model).state(checkpoint.config)
    assert all(tensor.equal(checkpoint.weights[name]) for name, tensor in whole.items())


def test_a_model_of_the_old_form_is_read_as_before(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    made = small_checkpoint(tmp_path / "small")
    run = start_run("models", "old")
    client = run.client
    client.log_artifacts(run.run_id, str(tmp_path / "small"), "model")
    client.create_registered_model("old")
    source = f"{client.get_run(run.run_id).info.artifact_uri}/model"
    client.create_model_version("old", source, run.run_id)
    client.set_registered_model_alias("old", "champion", "1")
    for uri in ("models:/old/1", "models:/old@champion", "models:/old/latest", f"runs:/{run.run_id}/model"):
        assert load_model(uri).fingerprint == made.fingerprint


def test_training_starts_from_weights_at_any_place(mlflow_server: MlflowServer, s3_bucket: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = Checkpoint.from_model(
        PSPNet(PSPNetConfig(classes=len(SCENE_CLASSES), backbone="resnet18", bin_width=8, fusion_width=8)),
        name="whole",
        classes=SCENE_CLASSES,
    )
    made.save(tmp_path / "small")
    prefix = "backbone."
    backbone = {name.removeprefix(prefix): t for name, t in made.weights.items() if name.startswith(prefix)}
    safetensors.torch.save_file(backbone, tmp_path / "imagenet.safetensors")
    run = start_run("models", "weights")
    run.log_file("weights/imagenet.safetensors", (tmp_path / "imagenet.safetensors").read_bytes())
    store = open_store(s3_bucket, field="output")
    for file in (*(tmp_path / "small").iterdir(), tmp_path / "imagenet.safetensors"):
        store.put_if_absent(f"in/{file.name}", file.read_bytes())
    torch.manual_seed(1)
    whole = read_start(f"{s3_bucket}/in").state(made.config)
    assert all(tensor.equal(made.weights[name]) for name, tensor in whole.items())
    for uri in (f"{s3_bucket}/in/imagenet.safetensors", f"runs:/{run.run_id}/weights/imagenet.safetensors"):
        started = read_start(uri).state(made.config)
        assert all(started[prefix + name].equal(tensor) for name, tensor in backbone.items())
    with pytest.raises(ConfigError, match=r"^init=runs:"):
        read_start(f"runs:/{'0' * 32}/imagenet.pth").state(made.config)


@pytest.mark.parametrize(
    "uri", ["models:/nobody@newest", "models:/nobody/3", f"runs:/{'0' * 32}/model", "models:/m-0123", "models:/a/b/c"]
)
def test_an_unknown_model_is_told_in_one_line(mlflow_server: MlflowServer, uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model(uri)
    assert str(caught.value).startswith(f"model={uri}: ")


def test_a_run_without_a_model_is_told(mlflow_server: MlflowServer) -> None:
    run = start_run("models", "empty")
    with pytest.raises(ConfigError, match=r"/model: MLflow at http\S+ has no files of it"):
        load_model(f"runs:/{run.run_id}/model")


Logged = tuple[LoggedModel, dict[str, str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Versions:
    """Logs versions of one registered model."""

    run: Run
    name: str
    logged: dict[int, Logged]

    def log(self, miou: float | None, data: str | None, *, classes: int = 3) -> str:
        """Register the logged model of so many classes once more, with this record."""
        model, tags = self.logged[classes]
        record = {"miou": None if miou is None else repr(miou), "data": data}
        made = self.run.client.create_model_version(
            self.name,
            model.artifact_location,
            model.source_run_id,
            tags=tags | {name: value for name, value in record.items() if value is not None},
            model_id=model.model_id,
        )
        return f"models:/{self.name}/{made.version}"

    def champion(self) -> str:
        version = self.run.client.get_model_version_by_alias(self.name, "champion")
        return f"models:/{self.name}/{version.version}"


@pytest.fixture(scope="module")
def logged(started_mlflow_server: MlflowServer, folders: dict[int, Path]) -> dict[int, Logged]:
    """Each checkpoint as a logged model, with the tags of a version that has no record."""
    client = client_of(started_mlflow_server.uri)
    experiment = client.create_experiment("logged")
    found = {}
    for classes, folder in folders.items():
        run = Run(uri=started_mlflow_server.uri, run_id=client.create_run(experiment).info.run_id)
        run.log_model(folder, f"logged-{classes}")
        (model,) = client.search_logged_models([experiment], f"source_run_id = '{run.run_id}'")
        found[classes] = model, client.get_model_version(f"logged-{classes}", "1").tags
    return found


@pytest.fixture
def versions(mlflow_server: MlflowServer, logged: dict[int, Logged], request: pytest.FixtureRequest) -> Versions:
    run = start_run("champions", "one")
    run.client.create_registered_model(request.node.name)
    return Versions(run=run, name=request.node.name, logged=logged)


def never(checkpoint: Checkpoint) -> float:
    raise AssertionError("the recorded scores are compared")


def test_the_champion_is_the_best_on_the_same_data(versions: Versions) -> None:
    first = versions.log(0.5, "abc")
    assert promote(first, never)
    assert versions.champion() == first
    for miou in (0.4, 0.5, math.nan):
        assert not promote(versions.log(miou, "abc"), never)
        assert versions.champion() == first
    better = versions.log(0.6, "abc")
    assert promote(better, never)
    assert versions.champion() == better
    assert promote(better, never)  # the same command again


def test_a_champion_of_other_data_is_scored_anew(versions: Versions, folders: dict[int, Path]) -> None:
    first = versions.log(0.9, "abc")
    assert promote(first, never)
    scored = []

    def score(checkpoint: Checkpoint) -> float:
        scored.append(checkpoint.fingerprint)
        return 0.3

    second = versions.log(0.2, "def")
    assert not promote(second, score)
    third = versions.log(0.4, "def")
    assert promote(third, score)
    assert versions.champion() == third
    assert scored == [load_checkpoint(folders[3]).fingerprint] * 2


def test_a_champion_without_a_record_is_scored(versions: Versions) -> None:
    old = versions.log(None, None)
    versions.run.client.set_registered_model_alias(versions.name, "champion", "1")
    with pytest.raises(ConfigError, match=rf"model={old}: has no mIoU on record"):
        promote(old, never)
    assert not promote(versions.log(0.2, "abc"), lambda checkpoint: 0.3)
    newer = versions.log(0.2, "abc")
    assert promote(newer, lambda checkpoint: 0.1)
    # Neither says what data it was scored on: that is no proof of the same.
    unknown = versions.log(0.9, None)
    assert not promote(unknown, lambda checkpoint: 0.95)


def test_a_diverged_champion_falls(versions: Versions) -> None:
    assert promote(versions.log(math.nan, "abc"), never)
    assert promote(versions.log(0.1, "abc"), never)


def test_a_champion_of_other_classes_stays(versions: Versions, caplog: pytest.LogCaptureFixture) -> None:
    first = versions.log(0.1, "abc", classes=2)
    assert promote(first, never)
    assert not promote(versions.log(0.9, "def"), never)
    assert versions.champion() == first
    assert f"{first} stays the champion: it cannot be scored on this data" in caplog.text
    assert "its classes are others" in caplog.text


def test_a_champion_that_the_callback_cannot_score_stays(versions: Versions, caplog: pytest.LogCaptureFixture) -> None:
    def score(checkpoint: Checkpoint) -> float:
        raise ConfigError("model", "x", "takes 5 bands")

    first = versions.log(0.1, "abc")
    assert promote(first, never)
    assert not promote(versions.log(0.9, "def"), score)
    assert versions.champion() == first
    assert "takes 5 bands" in caplog.text


def test_without_a_server_the_file_at_home_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("pipelines.tracking.server.HOME", tmp_path / "home")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    made = small_checkpoint(tmp_path / "small")
    run = start_run("home", "one")
    model = run.log_model(tmp_path / "small", "small", miou=0.1, data="abc")
    assert promote(model, never)
    for uri in (model, "models:/small@champion", f"runs:/{run.run_id}/model"):
        assert load_model(uri).fingerprint == made.fingerprint
    assert list((tmp_path / "elsewhere").iterdir()) == []
    with pytest.raises(ConfigError, match=r"no model\.json there"):
        run.log_model(tmp_path, "nothing")
    with pytest.raises(MlflowException):
        run.client.get_registered_model("nothing")


def test_a_class_table_too_large_for_a_tag_is_told_from_others(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    run, name = start_run("champions", "many"), "many"
    small_checkpoint(tmp_path / "many", classes=700)
    small_checkpoint(tmp_path / "more", classes=701)
    first = run.log_model(tmp_path / "many", name, miou=0.1, data="abc")
    assert promote(first, never)
    assert not promote(run.log_model(tmp_path / "more", name, miou=0.9, data="def"), never)
    assert promote(run.log_model(tmp_path / "many", name, miou=0.9, data="def"), lambda checkpoint: 0.2)


def test_a_registry_that_stays_away_is_told(folders: dict[int, Path]) -> None:
    run = Run(uri="http://127.0.0.1:9", run_id="0" * 32, patience=0)
    with pytest.raises(TrackingError, match=r"MLflow at http://127\.0\.0\.1:9 cannot be used"):
        run.log_model(folders[2], "small")
    with pytest.raises(TrackingError):
        promote("models:/small/1", never, uri=run.uri, patience=0)

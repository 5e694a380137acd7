"""Models in MLflow: logged, registered, fetched, predicted with, and promoted."""

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
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipelines.demo.scenes import SCENE_CLASSES
from pipelines.models import loading
from pipelines.models.loading import InferenceOverrides, load_model, load_rgb_model
from pipelines.storage import open_store
from pipelines.tracking.model_uris import Origin
from pipelines.tracking.registry import Champion, _class_tag, champion_of, check_keeps_models, log_model, set_champion
from pipelines.tracking.runs import Run, start_run
from pipelines.tracking.server import Server
from pipelines.training.initial_weights import read_initial_weights
from pspnet_core.checkpoints.checkpoint import Checkpoint, load_checkpoint
from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import ClassTable
from pspnet_core.inference.segmenter import Segmenter
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig
from tests.support.faultproxy import FaultProxy, Rule, lose_answer
from tests.support.mlflowserver import MlflowServer

SECONDS = 60.0  # a busy machine takes long
PREDICT = """
import os
import sys
import mlflow.pyfunc
import numpy as np

model = mlflow.pyfunc.load_model(sys.argv[1], dst_path=os.getcwd())
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint."""
    place = tmp_path_factory.mktemp("checkpoints")
    small_checkpoint(place, classes=3)
    return place


def requests_for(server: MlflowServer, method: str, file: str) -> int:
    return len(re.findall(rf'"{method} \S*{file}\S* HTTP', server.log.read_text()))


@pytest.fixture(scope="module")
def registered(started_mlflow_server: MlflowServer, folder: Path) -> tuple[Run, str]:
    """A run, and its model: version 1 of ``registered``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        run = start_run("models", "registered", server=Server(uri=started_mlflow_server.uri))
        return run, log_model(run, folder, "registered", miou=0.5, data="abc", step=3)


@pytest.mark.usefixtures("mlflow_server")
def test_a_registered_model_predicts_masks_wherever_it_is_loaded(
    registered: tuple[Run, str], folder: Path, tmp_path: Path
) -> None:
    _, model = registered
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
    segmenter = Segmenter(load_checkpoint(folder).model)
    with np.load(tmp_path / "masks.npz") as masks:
        assert masks["batch"].dtype == np.uint8
        assert np.array_equal(masks["batch"], np.stack([one.mask for one in segmenter(list(images["batch"]))]))
        for one, name in zip(segmenter([images["small"], images["large"]]), ("small", "large"), strict=True):
            assert np.array_equal(masks[name], one.mask)


def test_what_is_registered(
    registered: tuple[Run, str], mlflow_server: MlflowServer, folder: Path, tmp_path: Path
) -> None:
    run, model = registered
    assert model == "models:/registered/1"
    client = MlflowClient(mlflow_server.uri)
    version = client.get_model_version("registered", "1")
    checkpoint = load_checkpoint(folder)
    assert version.run_id == run.run_id
    tags = {"classes": '["class 0", "class 1", "class 2"]', "fingerprint": checkpoint.fingerprint, "miou": "0.5"}
    assert version.tags.items() >= (tags | {"data": "abc"}).items()
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
    whole = read_initial_weights(model).state(checkpoint.config)
    assert all(tensor.equal(checkpoint.weights[name]) for name, tensor in whole.items())


def test_training_starts_from_weights_at_any_place(mlflow_server: MlflowServer, s3_bucket: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = PSPNetConfig(classes=len(SCENE_CLASSES), backbone="resnet18", bin_width=8, fusion_width=8)
    made = Checkpoint.from_model(PSPNet(config), name="whole", classes=SCENE_CLASSES)
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
    whole = read_initial_weights(f"{s3_bucket}/in").state(made.config)
    assert all(tensor.equal(made.weights[name]) for name, tensor in whole.items())
    for uri in (f"{s3_bucket}/in/imagenet.safetensors", f"runs:/{run.run_id}/weights/imagenet.safetensors"):
        started = read_initial_weights(uri).state(made.config)
        assert all(started[prefix + name].equal(tensor) for name, tensor in backbone.items())
    for missing in (f"runs:/{'0' * 32}/imagenet.pth", "models:/nobody/1"):
        with pytest.raises(ConfigError, match=f"^init={missing}"):
            read_initial_weights(missing)


@pytest.mark.parametrize(
    "uri", ["models:/nobody@newest", "models:/nobody/3", f"runs:/{'0' * 32}/model", "models:/m-0123", "models:/a/b/c"]
)
def test_an_unknown_model_is_reported_in_one_line(mlflow_server: MlflowServer, uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model(uri)
    assert str(caught.value).startswith(f"model={uri}: ")


def test_an_error_names_the_alias_and_not_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "origin_of", lambda uri: Origin(uri=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"^model=models:/street@champion: no model\.json there"):
        load_rgb_model("models:/street@champion", InferenceOverrides())


def test_a_run_without_a_model_is_reported(mlflow_server: MlflowServer) -> None:
    run = start_run("models", "empty")
    with pytest.raises(ConfigError, match=r"/model: MLflow at http\S+ has no checkpoint of it"):
        load_model(f"runs:/{run.run_id}/model")


def test_without_a_server_the_file_at_home_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    made = small_checkpoint(tmp_path / "small")
    check_keeps_models("home")
    run = start_run("home", "one")
    model = log_model(run, tmp_path / "small", "small", miou=0.1, data="abc")
    set_champion(run.server, model)
    assert champion_of(run.server, "small") == Champion(uri=model, miou=0.1, data="abc")
    for uri in (model, "models:/small@champion", f"runs:/{run.run_id}/model"):
        assert load_model(uri).fingerprint == made.fingerprint
    assert list((tmp_path / "elsewhere").iterdir()) == []
    with pytest.raises(ConfigError, match=r"no model\.json there"):
        log_model(run, tmp_path, "nothing")
    with pytest.raises(MlflowException):
        run.server.client.get_registered_model("nothing")


def test_class_names_too_many_for_a_tag_differ_from_others(tmp_path: Path) -> None:
    tags = [_class_tag(small_checkpoint(tmp_path / str(classes), classes=classes)) for classes in (700, 701)]
    assert [tag.partition(" ")[0] for tag in tags] == ["700", "701"]
    assert len({tag.rpartition(" ")[2] for tag in tags}) == 2


CREATES = (
    "experiments/create",
    "runs/create",
    "mlflow/logged-models$",
    r"runs/outputs",
    "registered-models/create",
    "model-versions/create",
    "registered-models/alias",
)


def test_what_the_server_did_is_not_done_again_where_its_answer_is_lost(
    mlflow_server: MlflowServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(mlflow_server.uri) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.endpoint)
        rules = [proxy.add(Rule(lose_answer, method="POST", path=path, times=1)) for path in CREATES]
        run = start_run("lost", "lost", patience=SECONDS)
        model = log_model(run, folder, "lost", miou=0.5, data="abc")
        set_champion(run.server, model)
        assert log_model(run, folder, "lost") == model, "the run has registered this checkpoint"
        run.finish("FINISHED")
    assert {path: len(rule.hits) for path, rule in zip(CREATES, rules, strict=True)} == dict.fromkeys(CREATES, 1)
    client = MlflowClient(mlflow_server.uri)
    experiment = client.get_experiment_by_name("lost")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.status) == (run.run_id, "FINISHED")
    (logged,) = client.search_logged_models([experiment.experiment_id])
    assert [str(found.version) for found in client.search_model_versions("name = 'lost'")] == ["1"]
    version = client.get_model_version("lost", "1")
    assert (model, version.source, version.aliases) == ("models:/lost/1", logged.artifact_location, ["champion"])
    assert found.outputs is not None
    assert [output.model_id for output in found.outputs.model_outputs] == [logged.model_id]

"""Evaluation: actors count in chunks what one loop over the split counts."""

import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.metrics
from mlflow.tracking import MlflowClient
from numpy.typing import NDArray
from PIL import Image

from pipelines.datasets.dataset import Dataset, Pair
from pipelines.datasets.layouts import open_dataset
from pipelines.demo.demo import draw_dataset
from pipelines.demo.scenes import SCENE_CLASSES
from pipelines.evaluation import scoring
from pipelines.evaluation.actors import score_checkpoint, score_split
from pipelines.evaluation.evaluate import EvaluateConfig, evaluate
from pipelines.evaluation.scoring import Compared
from pipelines.evaluation.tables import image_row, scores_of
from pipelines.labelling.config import LabelConfig
from pipelines.labelling.job import label
from pipelines.process.config_tree import build
from pipelines.storage import open_store
from pspnet_core.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import ClassTable
from pspnet_core.inference.segmenter import Segmenter
from pspnet_core.metrics.confusion import BoundaryCounts, ConfusionMatrix, Scores
from pspnet_core.network.pspnet import PSPNet, PSPNetConfig
from tests.support.registered import register

pytestmark = pytest.mark.usefixtures("ray_cluster")
IMAGES = 7
UNLABELLED = 3  # place of an image in which no pixel counts
NAMES = SCENE_CLASSES.names
Masks = dict[str, tuple[NDArray[Any], NDArray[Any]]]
"""Key -> prediction and target."""


@pytest.fixture(autouse=True)
def untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is logged where a test does not say so."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def config_of(data: Path, model: Path | str, **flags: Any) -> EvaluateConfig:
    return build(EvaluateConfig, {"data": str(data), "model": str(model)} | flags)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes in layout ``folder``, a corner of each without labels, and one without any."""
    folder = tmp_path_factory.mktemp("evaluation") / "data"
    draw_dataset(folder, train=1, val=IMAGES, seed=0)
    for place, path in enumerate(sorted((folder / "masks/val").iterdir())):
        mask = np.array(Image.open(path))
        mask[:30, :50] = SCENE_CLASSES.ignore
        if place == UNLABELLED:
            mask[:] = SCENE_CLASSES.ignore
        Image.fromarray(mask).save(path)
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def result(data: Path, scene_model: Path, output: Path, ray_cluster: None) -> dict[str, Any]:
    """The result line of a split in four chunks, on two actors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(scoring, "CHUNK", 2)
        config = config_of(data, scene_model, output=str(output), batch=1, workers="2")
        return evaluate(config)


@pytest.fixture(scope="module")
def checkpoint(scene_model: Path) -> Checkpoint:
    return load_checkpoint(scene_model)


@pytest.fixture(scope="module")
def masks(data: Path, checkpoint: Checkpoint) -> Masks:
    """Key -> prediction and target of each image, by one loop."""
    segmenter = Segmenter(checkpoint.model, checkpoint.settings, batch=1)
    dataset = open_dataset(str(data), "folder")
    found = {}
    for pair in dataset.split("val"):
        image, truth = dataset.read(pair)
        found[pair.key] = (segmenter([image])[0].mask, truth)
    return found


def labelled(masks: Masks) -> tuple[NDArray[Any], NDArray[Any]]:
    """Predictions and targets of all pixels that count."""
    parts = [(guess[truth != 255], truth[truth != 255]) for guess, truth in masks.values()]
    return np.concatenate([guess for guess, _ in parts]), np.concatenate([truth for _, truth in parts])


def tables(result: dict[str, Any]) -> Iterator[pa.Table]:
    """Classes, confusion and images, as they were written."""
    for name in ("classes", "confusion", "images"):
        yield pq.read_table(f"{result['output']}/{name}.parquet", partitioning=None)


def test_the_table_of_images_holds_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is logged to MLflow, where more people may look than into the bucket."""
    monkeypatch.setenv("BUCKET_TOKEN", "open-sesame")
    image, mask = "https://me:my-password@host/a.jpg?X-Amz-Signature=0a1b2c", "s3://bucket/open-sesame/a.png"
    pair = Pair(key="a", image=image, mask=mask, split="val")
    ids = np.zeros((2, 3), np.uint8)
    dataset = Dataset(store=open_store(str(tmp_path), field="data"), classes=SCENE_CLASSES, splits={"val": (pair,)})
    found = Compared(pair=pair, image=np.zeros((2, 3, 3), np.uint8), target=ids, mask=ids)
    size = len(SCENE_CLASSES)
    scores = Scores(confusion=ConfusionMatrix(size), boundary=BoundaryCounts(size))
    row = image_row(found, scores, dataset)
    assert (row["image"], row["mask"]) == ("https://***@host/a.jpg?X-Amz-Signature=***", "s3://bucket/***/a.png")


def test_the_result_line_is_that_of_one_loop(
    masks: Masks, checkpoint: Checkpoint, result: dict[str, Any], output: Path
) -> None:
    boundary = BoundaryCounts(len(NAMES))
    for one, other in masks.values():
        boundary.update(one, other, SCENE_CLASSES.ignore)
    guess, truth = labelled(masks)
    present, found = np.union1d(guess, truth).tolist(), np.unique(truth).tolist()
    iou = sklearn.metrics.jaccard_score(truth, guess, labels=present, average=None).tolist()
    known = {name: value for name, value in result["iou"].items() if not math.isnan(value)}
    assert list(result["iou"]) == list(NAMES)
    assert known == pytest.approx({NAMES[index]: value for index, value in zip(present, iou, strict=True)})
    assert result["miou"] == pytest.approx(np.mean(iou))
    assert result["macc"] == pytest.approx(sklearn.metrics.recall_score(truth, guess, labels=found, average="macro"))
    assert result["aacc"] == pytest.approx(sklearn.metrics.accuracy_score(truth, guess))
    assert result["dice"] == pytest.approx(sklearn.metrics.f1_score(truth, guess, labels=present, average="macro"))
    assert result["boundary_iou"] == pytest.approx(boundary.miou)
    assert (result["images"], result["model"]) == (IMAGES, checkpoint.partition)
    keys = {"miou", "macc", "aacc", "iou", "dice", "boundary_iou", "images", "model", "output", "run_id"}
    assert json.loads(json.dumps(result)).keys() == keys
    assert result["output"] == str(output / f"model={checkpoint.partition}/split=val")
    assert result["run_id"] is None


def test_the_tables_of_classes_and_confusions(masks: Masks, result: dict[str, Any]) -> None:
    guess, truth = labelled(masks)
    counts = sklearn.metrics.confusion_matrix(truth, guess, labels=range(len(NAMES)))
    classes, confusion, _ = tables(result)
    rows = classes.to_pylist()
    assert [(row["class_id"], row["name"]) for row in rows] == list(enumerate(NAMES))
    assert [row["iou"] for row in rows] == [None if math.isnan(value) else value for value in result["iou"].values()]
    assert [row["pixels"] for row in rows] == counts.sum(axis=1).tolist()
    assert [row["predicted"] for row in rows] == counts.sum(axis=0).tolist()
    assert [row["hits"] for row in rows] == counts.diagonal().tolist()
    for row in rows:
        index = row["class_id"]
        if row["pixels"]:
            assert row["accuracy"] == pytest.approx(np.mean(guess[truth == index] == index))
        else:
            assert row["accuracy"] is None
        if row["boundary_union"]:
            assert row["boundary_iou"] == row["boundary_hits"] / row["boundary_union"]
        if row["iou"] is not None:
            assert row["dice"] == pytest.approx(2 * row["iou"] / (1 + row["iou"]))
    expected = [
        {"target_id": t, "target": NAMES[t], "predicted_id": p, "predicted": NAMES[p], "pixels": int(counts[t, p])}
        for t in range(len(NAMES))
        for p in range(len(NAMES))
        if counts[t, p]
    ]
    assert confusion.to_pylist() == expected


def test_one_row_for_each_image(data: Path, masks: Masks, result: dict[str, Any]) -> None:
    *_, images = tables(result)
    rows = {row["key"]: row for row in images.to_pylist()}
    assert rows.keys() == masks.keys()
    for key, (one, other) in masks.items():
        row, guess, truth = rows[key], one[other != 255], other[other != 255]
        assert Path(row["image"]) == data / f"images/val/{key}.jpg"
        assert Path(row["mask"]) == data / f"masks/val/{key}.png"
        assert (row["height"], row["width"], row["pixels"]) == (*other.shape, truth.size)
        assert row["bytes"] == sum(Path(row[name]).stat().st_size for name in ("image", "mask"))
        if not truth.size:
            assert (row["miou"], row["accuracy"], row["boundary_iou"], row["confused"]) == (None, None, None, [])
            continue
        present = np.union1d(guess, truth)
        iou = [np.sum((guess == c) & (truth == c)) / np.sum((guess == c) | (truth == c)) for c in present]
        boundary = BoundaryCounts(len(NAMES))
        boundary.update(one, other, SCENE_CLASSES.ignore)
        assert row["miou"] == pytest.approx(np.mean(iou))
        assert (row["hits"], row["accuracy"]) == (np.sum(guess == truth), pytest.approx(np.mean(guess == truth)))
        assert row["boundary_iou"] == pytest.approx(boundary.miou)
        wrong = {(int(t), int(p)): int(np.sum((truth == t) & (guess == p))) for t in present for p in present if t != p}
        most = sorted((count for count in wrong.values() if count), reverse=True)[:3]
        assert [entry["pixels"] for entry in row["confused"]] == most
        for entry in row["confused"]:
            assert wrong[entry["target_id"], entry["predicted_id"]] == entry["pixels"]
            assert (entry["target"], entry["predicted"]) == (NAMES[entry["target_id"]], NAMES[entry["predicted_id"]])

    # The worst come first.
    scores = images["miou"].to_pylist()
    assert scores[-1] is None, "nothing counted"
    assert scores[:-1] == sorted(scores[:-1])
    assert len(set(scores)) > 2, "or this would show nothing"


def test_each_file_explains_itself(
    data: Path, scene_model: Path, result: dict[str, Any], checkpoint: Checkpoint
) -> None:
    for name in ("classes", "confusion", "images"):
        schema = pq.read_schema(f"{result['output']}/{name}.parquet")
        facts = json.loads(schema.metadata[b"pspnet"])
        assert facts["model"] == str(scene_model)
        assert facts["fingerprint"] == checkpoint.fingerprint
        assert facts["inference"]["scales"] == [1.0]
        assert (facts["data"], facts["layout"], facts["split"], facts["batch"]) == (str(data), "folder", "val", 1)
        assert ClassTable.from_json(facts["classes"]) == SCENE_CLASSES


def test_a_second_run_into_the_folder_reads_it(
    data: Path, scene_model: Path, output: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path: path.read_bytes() for path in Path(result["output"]).iterdir()}

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr("pipelines.evaluation.evaluate.score_split", refuse)
    config = config_of(data, scene_model, output=str(output), batch=1)
    assert json.dumps(evaluate(config)) == json.dumps(result)  # as text, since NaN is not equal to itself
    assert files == {path: path.read_bytes() for path in Path(result["output"]).iterdir()}
    with pytest.raises(ConfigError, match=r"^output=.*split=val: holds an .* with batch 1, not 8; choose another"):
        evaluate(config_of(data, scene_model, output=str(output)))


@pytest.fixture
def quickly(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring gives at once what it gave before."""
    classes, confusion, images = tables(result)
    monkeypatch.setattr("pipelines.evaluation.evaluate.score_split", lambda *_: (scores_of(classes, confusion), images))


@pytest.mark.usefixtures("quickly", "tracking_home")
def test_another_setting_is_another_folder(data: Path, scene_model: Path, output: Path, result: dict[str, Any]) -> None:
    flipped = evaluate(config_of(data, scene_model, output=str(output), flip=True, track=True))
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run = client.get_run(flipped["run_id"])
    assert client.get_experiment(run.info.experiment_id).name == "pspnet-evaluation"
    assert flipped["model"] != result["model"]
    assert flipped["output"] != result["output"]
    assert len(list(output.glob("*/*/images.parquet"))) == 2


def test_other_data_is_refused_before_the_work(
    data: Path, scene_model: Path, output: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "newer", copy_function=shutil.copyfile)
    config = config_of(tmp_path / "newer", scene_model, output=str(output), batch=1)
    with pytest.raises(ConfigError, match=r"^output=.*split=val: holds an evaluation .* with content "):
        evaluate(config)


@pytest.mark.usefixtures("quickly")
def test_a_run_that_broke_off_is_finished(
    data: Path, scene_model: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / Path(result["output"]).parent.name / "split=val"
    shutil.copytree(result["output"], folder)
    (folder / "classes.parquet").unlink()
    (folder / "confusion.parquet").unlink()
    config = config_of(data, scene_model, output=str(tmp_path), batch=1)
    again = evaluate(config)
    assert again["output"] == str(folder)
    for path in Path(result["output"]).iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    (folder / "classes.parquet").unlink()
    shutil.copy(folder / "confusion.parquet", folder / "images.parquet")
    with pytest.raises(ConfigError, match=r"images.parquet: holds other numbers, of a run that broke off; delete it"):
        evaluate(config)


def test_a_checkpoint_has_the_same_score_to_the_last_digit(
    data: Path, checkpoint: Checkpoint, result: dict[str, Any]
) -> None:
    assert score_checkpoint(checkpoint, open_dataset(str(data), "folder"), "val") == result["miou"]


def test_tables_in_a_bucket_and_a_run_in_mlflow(
    data: Path,
    scene_model: Path,
    s3_bucket: str,
    tracking_home: Path,
    result: dict[str, Any],
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    trained, _ = (register(scene_model, "scenes") for _ in range(2))
    client.set_registered_model_alias("scenes", "champion", "1")

    def scores(*arguments: Any) -> Any:
        """Make another model the champion before scoring: the score is that of the version that was loaded."""
        client.set_registered_model_alias("scenes", "champion", "2")
        return score_split(*arguments)

    monkeypatch.setattr("pipelines.evaluation.evaluate.score_split", scores)
    config = config_of(data, "models:/scenes@champion", output=f"{s3_bucket}/scores", experiment="scores", batch=1)
    found = evaluate(config)
    assert json.dumps({**found, "output": "", "run_id": ""}) == json.dumps({**result, "output": "", "run_id": ""})
    folder = f"model={checkpoint.partition}/split=val"
    assert found["output"] == f"{s3_bucket}/scores/{folder}"
    store = open_store(found["output"], field="output")
    bucket = {item.key: store.read(item.key) for item in store.list()}
    assert sorted(bucket) == ["classes.parquet", "confusion.parquet", "images.parquet"]
    for name, table in zip(sorted(bucket), tables(result), strict=True):
        assert pq.read_table(io.BytesIO(bucket[name])).equals(table)

    run = client.get_run(found["run_id"])
    assert run.info.status == "FINISHED"
    assert client.get_experiment(run.info.experiment_id).name == "scores"
    assert run.data.metrics["miou"] == found["miou"]
    known = {f"iou/{name}": value for name, value in found["iou"].items() if not math.isnan(value)}
    assert {key: value for key, value in run.data.metrics.items() if key.startswith("iou/")} == known
    assert (run.data.params["fingerprint"], run.data.params["split"]) == (checkpoint.fingerprint, "val")
    assert (run.data.tags["model_version"], run.data.tags["source_run_id"]) == ("models:/scenes/1", trained)
    assert client.get_model_version("scenes", "1").tags == {"evaluation val": found["run_id"]}
    assert client.get_model_version("scenes", "2").tags == {}
    names = {Path(item.path).name for item in client.list_artifacts(found["run_id"], "evaluation")}
    assert names == {"classes.parquet", "confusion.parquet", "images.parquet", "confusion.png", "iou.png"}
    (tracking_home / "copy").mkdir()
    local = Path(client.download_artifacts(found["run_id"], "evaluation", str(tracking_home / "copy")))
    assert (local / "images.parquet").read_bytes() == bucket["images.parquet"]
    assert Image.open(io.BytesIO((local / "confusion.png").read_bytes())).format == "PNG"


@pytest.mark.usefixtures("ray_cluster")
def test_masks_without_a_label_have_no_score(data: Path, scene_model: Path, tmp_path: Path) -> None:
    blank = sorted((data / "masks/val").iterdir())[UNLABELLED]
    for path in (blank, next((data / "images/val").glob(f"{blank.stem}.*")), data / "classes.json"):
        (tmp_path / "data" / path.relative_to(data)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "data" / path.relative_to(data))
    with pytest.raises(ConfigError, match=r"^split=val: none of its 1 masks holds a labelled pixel"):
        evaluate(config_of(tmp_path / "data", scene_model, output=str(tmp_path / "out")))
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_a_model_of_other_bands_is_refused(data: Path, tmp_path: Path) -> None:
    config = PSPNetConfig(classes=2, backbone="resnet18", output_stride=32, mean=(0.0,) * 4, std=(1.0,) * 4)
    classes = ClassTable(names=("a", "b"), colors=((0, 0, 0), (1, 1, 1)))
    save_checkpoint(PSPNet(config), tmp_path / "four", name="four", classes=classes)
    model, line = str(tmp_path / "four"), r"^model=.*four: takes 4 bands; image files are read as 3, RGB$"
    with pytest.raises(ConfigError, match=line):
        evaluate(config_of(data, model))
    with pytest.raises(ConfigError, match=line):
        label(LabelConfig(input=str(data), output=str(tmp_path / "labels"), model=model))
    assert not (tmp_path / "labels").exists()


def test_a_model_of_other_classes_is_refused(data: Path, scene_model: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "other")
    (tmp_path / "other/classes.json").write_text(json.dumps({"names": ["a", "b"]}))
    line = r"are not the 2 of the data \(a, b, ...\); use a model of this data"
    with pytest.raises(ConfigError, match=line):
        evaluate(config_of(tmp_path / "other", scene_model, output=str(tmp_path / "out")))
    with pytest.raises(ConfigError, match=line):
        score_checkpoint(load_checkpoint(scene_model), open_dataset(str(tmp_path / "other"), "folder"), "val")
    assert not (tmp_path / "out").exists()

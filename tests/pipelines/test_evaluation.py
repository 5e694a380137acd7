"""Evaluation: what the actors count in chunks is what one loop over the split counts, whatever ids the files hold."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from PIL import Image

from pipelines import evaluation
from pipelines.datasets import open_dataset
from pipelines.demo import draw_dataset
from pipelines.evaluation import EvaluateConfig, evaluate
from pipelines.labelling import LabelConfig, label
from pspnet_core import checkpoints
from pspnet_core.classes import ClassTable
from pspnet_core.errors import ConfigError
from pspnet_core.inference import Segmenter
from pspnet_core.metrics import BoundaryCounts
from pspnet_core.pspnet import PSPNet, PSPNetConfig
from pspnet_core.scenes import SCENE_CLASSES

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes in layout ``folder``, a corner of each without labels."""
    folder = tmp_path_factory.mktemp("evaluation") / "data"
    draw_dataset(folder, train=1, val=5, seed=0)
    for path in (folder / "masks/val").iterdir():
        mask = np.array(Image.open(path))
        mask[:30, :50] = SCENE_CLASSES.ignore
        Image.fromarray(mask).save(path)
    return folder


@pytest.fixture(scope="module")
def result(data: Path, scene_model: Path, ray_cluster: None) -> dict[str, Any]:
    """The result line of a split in three chunks, on two actors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "CHUNK", 2)
        return evaluate(EvaluateConfig(data=str(data), model=str(scene_model), batch=1, workers="2"))


def test_the_result_line_is_that_of_one_loop(data: Path, scene_model: Path, result: dict[str, Any]) -> None:
    checkpoint = checkpoints.load(scene_model)
    segmenter = Segmenter(checkpoint.model, checkpoint.inference, batch=1)
    dataset = open_dataset(str(data), "folder")
    boundary = BoundaryCounts(len(SCENE_CLASSES))
    guesses, truths = [], []
    for pair in dataset.split("val"):
        image, truth = dataset.read(pair)
        guess = next(segmenter.predict([segmenter.prepare(image)])).mask
        boundary.update(guess, truth, SCENE_CLASSES.ignore)
        guesses.append(guess[truth != SCENE_CLASSES.ignore])
        truths.append(truth[truth != SCENE_CLASSES.ignore])
    guess, truth = np.concatenate(guesses), np.concatenate(truths)
    present, found = np.union1d(guess, truth).tolist(), np.unique(truth).tolist()
    iou = sklearn.metrics.jaccard_score(truth, guess, labels=present, average=None).tolist()
    known = {name: value for name, value in result["iou"].items() if not math.isnan(value)}
    assert list(result["iou"]) == list(SCENE_CLASSES.names)
    assert known == pytest.approx(
        {SCENE_CLASSES.names[label]: value for label, value in zip(present, iou, strict=True)}
    )
    assert result["miou"] == pytest.approx(np.mean(iou))
    assert result["macc"] == pytest.approx(sklearn.metrics.recall_score(truth, guess, labels=found, average="macro"))
    assert result["aacc"] == pytest.approx(sklearn.metrics.accuracy_score(truth, guess))
    assert result["dice"] == pytest.approx(sklearn.metrics.f1_score(truth, guess, labels=present, average="macro"))
    assert result["boundary_iou"] == pytest.approx(boundary.miou)
    assert (result["images"], result["model"]) == (5, checkpoint.partition)


def test_the_result_line_is_json(result: dict[str, Any]) -> None:
    keys = {"miou", "macc", "aacc", "iou", "dice", "boundary_iou", "images", "model"}
    assert json.loads(json.dumps(result)).keys() == keys


def test_raw_ids_in_the_files_change_nothing(
    data: Path, scene_model: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    # As in ADE20K: 0 has no label, and the classes count from 1.
    shutil.copytree(data, tmp_path / "raw")
    for path in (tmp_path / "raw/masks/val").iterdir():
        mask = np.array(Image.open(path)).astype(np.int64)
        Image.fromarray(np.where(mask == SCENE_CLASSES.ignore, 0, mask + 1).astype(np.uint8)).save(path)
    ids = {str(index + 1): index for index in range(len(SCENE_CLASSES))}
    (tmp_path / "raw/classes.json").write_text(json.dumps(SCENE_CLASSES.to_json() | {"ids": ids}))
    again = evaluate(EvaluateConfig(data=str(tmp_path / "raw"), model=str(scene_model), batch=1))
    assert json.dumps(again) == json.dumps(result)  # as text, since NaN is not equal to itself


@pytest.mark.parametrize("run", ["evaluate", "label"])
def test_a_model_of_other_bands_is_refused(run: str, data: Path, tmp_path: Path) -> None:
    config = PSPNetConfig(classes=2, backbone="resnet18", output_stride=32, mean=(0.0,) * 4, std=(1.0,) * 4)
    classes = ClassTable(names=("a", "b"), colors=((0, 0, 0), (1, 1, 1)))
    checkpoints.from_model(PSPNet(config), name="four", classes=classes).save(tmp_path / "four")
    model = str(tmp_path / "four")
    with pytest.raises(ConfigError, match=r"^model=.*four: takes 4 bands; image files are read as 3, RGB$"):
        if run == "evaluate":
            evaluate(EvaluateConfig(data=str(data), model=model))
        else:
            label(LabelConfig(input=str(data), output=str(tmp_path / "labels"), model=model))
    assert not (tmp_path / "labels").exists()


def test_a_model_of_other_classes_is_refused(data: Path, scene_model: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "other")
    (tmp_path / "other/classes.json").write_text(json.dumps({"names": ["a", "b"]}))
    with pytest.raises(ConfigError, match=r"are not the 2 of the data \(a, b, ...\); use a model of this data"):
        evaluate(EvaluateConfig(data=str(tmp_path / "other"), model=str(scene_model)))

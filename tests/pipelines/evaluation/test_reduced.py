"""With the setting ``reduced``, what is scored is what is labelled."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.datasets.dataset import Dataset
from pipelines.datasets.layouts import open_dataset
from pipelines.demo.demo import draw_dataset
from pipelines.evaluation.scoring import compare
from pspnet_core.checkpoints.checkpoint import load_checkpoint
from pspnet_core.checkpoints.settings import InferenceSettings
from pspnet_core.inference.segmenter import Segmenter, prediction_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Scenes, which are JPEGs."""
    folder = tmp_path_factory.mktemp("scenes")
    draw_dataset(folder, train=1, val=2, seed=0)
    return open_dataset(str(folder), "folder")


@pytest.mark.parametrize("batched", [False, True])
def test_scored_masks_are_those_of_labelling(dataset: Dataset, scene_model: Path, batched: bool) -> None:
    model = load_checkpoint(scene_model).model
    full = InferenceSettings(resize="scale", size=0.2)
    segmenter = Segmenter(model, dataclasses.replace(full, reduced=True), device=CPU, batch=1)
    found = list(compare(segmenter, dataset, dataset.split("val"), batched=batched, threads=1))
    assert len(found) == 2
    for one in found:
        data = dataset.fetch(one.pair).image
        prepared = segmenter.decode(data)
        expected = prediction_of(dict(segmenter.predict([(0, prepared)]))[0]).mask
        assert one.mask.shape == one.target.shape == one.image.shape[:2] == expected.shape
        assert (one.mask == expected).mean() > 0.999  # threads add up in another order
        # Otherwise both would have been decoded in full.
        other = Segmenter(model, full, device=CPU, batch=1).decode(data)
        assert not np.array_equal(prepared.views[0], other.views[0])


def test_the_setting_makes_another_model_of_it(scene_model: Path) -> None:
    checkpoint = load_checkpoint(scene_model)
    assert checkpoint.with_settings(reduced=None).fingerprint == checkpoint.fingerprint
    assert checkpoint.with_settings(reduced=False).fingerprint == checkpoint.fingerprint
    assert checkpoint.with_settings(reduced=True).fingerprint != checkpoint.fingerprint

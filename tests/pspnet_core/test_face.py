"""The core's face: the names that ``pspnet_core`` offers at its root, and what each does."""

from __future__ import annotations

import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import pspnet_core
from pspnet_core import (
    ConfigError,
    ImageError,
    PSPNet,
    PSPNetConfig,
    PspnetError,
    Segmenter,
    decode,
    encode,
    load_checkpoint,
    save_checkpoint,
)
from tests.support.paths import ROOT

NAMES = set(["ConfigError", "ImageError", "PSPNet", "PSPNetConfig", "PspnetError", "Segmenter", "decode", "encode"])
NAMES |= {"load_checkpoint", "save_checkpoint"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of random weights."""
    folder = tmp_path_factory.mktemp("face") / "model"
    torch.manual_seed(0)
    config = PSPNetConfig(classes=3, backbone="resnet18", stages=2, bins=(1, 2), auxiliary=False)
    save_checkpoint(PSPNet(config), folder, name="three", classes=["road", "sky", "tree"])
    return folder


def _image(height: int = 40, width: int = 56, seed: int = 0) -> NDArray[np.uint8]:
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_root_offers_these_names_and_no_others() -> None:
    assert set(pspnet_core.__all__) == NAMES
    assert set(dir(pspnet_core)) == NAMES | {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'Checkpoint'"):
        _ = pspnet_core.Checkpoint


def test_the_root_alone_does_not_load_torch() -> None:
    code = "import sys, pspnet_core; sys.exit('torch' in sys.modules or not pspnet_core.__version__)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_images_in_any_form_get_the_same_masks(folder: Path, tmp_path: Path) -> None:
    image = _image()
    path = tmp_path / "image.png"
    path.write_bytes(_png(image))
    forms: list[Any] = [image, path, str(path), _png(image), Image.fromarray(image), Image.open(path)]
    predictions = Segmenter.load(folder, device="cpu", batch=2, threads=1)(forms)
    assert len(predictions) == len(forms)
    for prediction in predictions:
        assert prediction.mask.shape == prediction.confidence.shape == (40, 56)
        assert (str(prediction.mask.dtype), str(prediction.confidence.dtype)) == ("uint8", "float32")
        np.testing.assert_array_equal(prediction.mask, predictions[0].mask)
        np.testing.assert_allclose(prediction.confidence, predictions[0].confidence, atol=1e-5)
    assert np.ptp(predictions[0].confidence) > 1e-3


def test_a_picture_is_turned_upright_and_made_rgb_and_stays_as_it_is(folder: Path) -> None:
    image = _image()
    buffer = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(image).convert("P").save(buffer, "PNG", exif=exif, transparency=0)
    picture = Image.open(BytesIO(buffer.getvalue()))
    by_picture, by_file = Segmenter.load(folder, device="cpu", threads=1)([picture, buffer.getvalue()])
    assert by_picture.mask.shape == (56, 40)
    np.testing.assert_allclose(by_picture.confidence, by_file.confidence, atol=1e-5)
    assert (picture.mode, picture.size, picture.info["transparency"]) == ("P", (56, 40), 0)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((4, 5), np.uint8), ConfigError, r"image=\(4, 5\) of uint8: give \(H, W, 3\) of uint8 each"),
        (np.zeros((4, 5, 4), np.uint8), ConfigError, r"image=\(4, 5, 4\) of uint8"),
        (np.zeros((4, 5, 3), np.float32), ConfigError, r"image=\(4, 5, 3\) of float32"),
        (np.zeros((0, 5, 3), np.uint8), ConfigError, r"image=\(0, 5, 3\) of uint8"),
        (b"no image", ImageError, "^Unreadable: "),
        ("nowhere.jpg", FileNotFoundError, "nowhere.jpg"),
    ],
)
def test_what_is_no_image_is_told(folder: Path, image: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Segmenter.load(folder, device="cpu")([image])


def test_a_segmenter_needs_a_checkpoint_and_threads(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model=.*: no model.json there"):
        Segmenter.load(tmp_path)
    with pytest.raises(ConfigError, match=r"^threads=0: "):
        Segmenter.load(folder, threads=0)
    assert issubclass(ConfigError, PspnetError) and issubclass(ImageError, PspnetError)


def test_a_checkpoint_holds_model_classes_fingerprint_and_settings(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    assert checkpoint.classes.names == ("road", "sky", "tree")
    assert len(checkpoint.fingerprint) == 12
    assert checkpoint.settings.scales == (1.0,)
    logits = checkpoint.model(torch.zeros(2, 3, 24, 32, dtype=torch.uint8))
    assert (logits.main.shape, logits.aux) == ((2, 3, 24, 32), None)
    (prediction,) = Segmenter.load(folder, device="cpu")([_image()])
    with torch.no_grad():
        main = checkpoint.model(torch.from_numpy(_image().copy()).permute(2, 0, 1)[None]).main[0]
    assert (prediction.mask == main.argmax(0).numpy()).mean() > 0.99


def test_a_mask_survives_its_run_length_code() -> None:
    mask = np.array([[0, 0, 300], [300, 300, 1]], np.uint16)
    classes, lengths = encode(mask)
    assert (classes.tolist(), lengths.tolist()) == ([0, 300, 1], [2, 3, 1])
    np.testing.assert_array_equal(decode(classes, lengths, 2, 3), mask)

"""Conversion end to end: a foreign file in, a checkpoint folder out, whole or not at all; mistakes in one line."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs.cli import main
from pipelines.models.converting import ConvertConfig, convert, model_name
from pipelines.models.loading import load_model
from pipelines.storage import open_store
from pspnet_core.checkpoints.checkpoint import check_name, load_checkpoint
from pspnet_core.errors import ConfigError
from pspnet_core.images.classes import ClassTable
from tests.support.public_models import SmpPSPNet, randomise

NAMES = ("a", "b", "c", "d", "e")
FILES = ["model.json", "weights.safetensors"]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    network = SmpPSPNet(5, width=32)
    del network.encoder.layer3, network.encoder.layer4  # not used
    network.classification_head = nn.Linear(128, 2)  # nor is this
    return randomise(network)


@pytest.fixture(scope="module")
def source(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of another project; tests read it and never write it."""
    file = tmp_path_factory.mktemp("source") / "Best Model_2.pth.tar"
    torch.save({"state_dict": network.state_dict()}, file)
    return file


def converted(source: Path | str, output: Path | str, **fields: Any) -> dict[str, Any]:
    return convert(ConvertConfig(source=str(source), output=str(output), **fields))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_job_makes_a_checkpoint_with_the_logits_of_the_source(
    network: nn.Module,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(ConvertConfig, convert, ["--source", str(source), "--output", "models/new"]) == 0
    result = json.loads(capsys.readouterr().out)
    checkpoint = load_checkpoint(tmp_path / "models" / "new")
    assert result == {
        "model": str(tmp_path / "models" / "new"),
        "source_kind": "segmentation_models",
        "leftover": ["classification_head.weight", "classification_head.bias"],
        "name": "best-model_2-pth",
        "fingerprint": checkpoint.fingerprint,
        "backbone": "resnet18",
        "classes": 5,
        "align_corners": True,
    }
    assert "class_0 to class_4 made up" in caplog.text
    assert "2 weights not used: classification_head.weight, classification_head.bias" in caplog.text

    images = torch.randint(0, 256, (2, 3, 64, 88), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = checkpoint.model(images), network(normalised(images))[0]
    assert ours.aux is None
    assert (ours.main - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["new"]  # nothing temporary stays
    assert sorted(path.name for path in (tmp_path / "models" / "new").iterdir()) == FILES


def normalised(images: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images / 255 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)


def test_the_flags_are_what_the_checkpoint_has(source: Path, tmp_path: Path) -> None:
    table = {"names": list(NAMES), "colors": [[9, 9, 9]] * 5, "ignore": 200}
    (tmp_path / "classes.json").write_text(json.dumps(table))
    result = converted(
        source,
        tmp_path / "new",
        name="street",
        classes=str(tmp_path / "classes.json"),
        align=False,
        bins=(1, 3, 5, 7),
        mean=(1.0, 2.0, 3.0),
        std=(4.0, 5.0, 6.0),
    )
    checkpoint = load_checkpoint(tmp_path / "new")
    config = checkpoint.config
    assert result["name"] == checkpoint.name == "street"
    assert result["align_corners"] is config.align_corners is False
    assert (config.bins, config.mean, config.std) == ((1, 3, 5, 7), (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert checkpoint.classes == ClassTable(names=NAMES, colors=((9, 9, 9),) * 5, ignore=200)


@pytest.mark.parametrize(
    ("fields", "field", "remedy"),
    [
        ({"classes": "CamVid"}, "classes", "the network has 5 outputs"),
        ({"classes": "mars"}, "classes.table", "choose one of"),
        ({"classes": "./missing.json"}, "classes", "no such file"),
        ({"classes": "{folder}/bad.json"}, "classes", "is no JSON file"),
        ({"classes": "{folder}"}, "classes", "is no JSON file"),
        ({"classes": "{folder}/empty.json"}, "classes.names", "expected a list of class names"),
        ({"name": "Big Model"}, "name", "start with a letter"),
        ({"bins": (1, 2)}, "bins", "the network has 4 grids"),
        ({"mean": (1.0,)}, "mean", "takes 3 bands"),
        ({"std": (1.0, 0.0, 1.0)}, "std", "positive"),
        ({"source": "{folder}/missing.pth"}, "source", "no such file"),
        ({"source": "{folder}"}, "source", "cannot be read"),
        ({"source": "{folder}/bad.json"}, "source", "is no file of weights, or a damaged one .*; download it again"),
        ({"source": ""}, "source", "give a folder"),
    ],
)
def test_mistakes_name_the_field(fields: dict[str, Any], field: str, remedy: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "empty.json").write_text("{}")
    given = {key: value.format(folder=tmp_path) if isinstance(value, str) else value for key, value in fields.items()}
    with pytest.raises(ConfigError, match=remedy) as raised:
        converted(given.pop("source", source), tmp_path / "new", **given)
    assert raised.value.field == field
    assert not (tmp_path / "new").exists()


# --- the output folder -------------------------------------------------------------------------------------------


def test_an_empty_folder_is_filled_and_keeps_the_users_permissions(source: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "plain").mkdir()
    converted(source, tmp_path / "new")
    assert sorted(content(tmp_path / "new")) == FILES
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "plain")}
    assert len(modes) == 1


@pytest.mark.parametrize("change", [{"name": "other"}, {"mean": (1.0, 2.0, 3.0)}])
def test_a_checkpoint_is_left_as_it_is_and_another_refused(
    change: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    first, before = converted(source, tmp_path / "new"), content(tmp_path / "new")
    written = [path.stat().st_mtime_ns for path in (tmp_path / "new").iterdir()]
    assert converted(source, tmp_path / "new") == first
    with pytest.raises(ConfigError, match=r"holds another checkpoint \(.*\.(json|safetensors) differs\)"):
        converted(source, tmp_path / "new", **change)
    assert content(tmp_path / "new") == before
    assert [path.stat().st_mtime_ns for path in (tmp_path / "new").iterdir()] == written


@pytest.mark.parametrize(
    ("output", "present", "reason"),
    [
        ("file", "thesis.tex", ""),
        ("file/new", "thesis.tex", ""),
        ("new", "thesis.tex", r"is not empty \(it holds thesis\.tex\)"),
        ("new", ".hidden", ""),
    ],
)
def test_a_place_that_cannot_be_written_is_reported_and_kept(
    output: str, present: str, reason: str, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / present).write_text("years of work")
    with pytest.raises(ConfigError, match=f"^output=.*{reason}"):
        converted(source, tmp_path / output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new"]
    assert content(tmp_path / "new") == {present: b"years of work"}


def test_what_an_interruption_left_in_a_bucket_is_completed(s3_bucket: str, source: Path, tmp_path: Path) -> None:
    """From a bucket and to one; the config comes last, and a run that was cut off before it is finished by the next."""
    converted(source, tmp_path / "new")
    local = content(tmp_path / "new")
    bucket = open_store(s3_bucket, field="output")
    assert bucket.put_if_absent(f"in/{source.name}", source.read_bytes())
    assert bucket.put_if_absent("out/weights.safetensors", local["weights.safetensors"])
    first, second = (converted(f"{s3_bucket}/in/{source.name}", f"{s3_bucket}/out") for _ in range(2))
    assert first == second
    assert first["model"] == f"{s3_bucket}/out"
    assert {item.key: bucket.read(item.key) for item in bucket.list("out")} == {
        f"out/{name}": value for name, value in local.items()
    }
    assert load_model(f"{s3_bucket}/out").fingerprint == first["fingerprint"]
    with pytest.raises(ConfigError, match="holds another checkpoint"):
        converted(source, f"{s3_bucket}/out", name="other")


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("train_epoch_100.pth", "train_epoch_100"),
        ("s3://b/k/PSPNet R50-d8.final.pth", "pspnet-r50-d8-final"),
        ("/models/20200605.pth", "pspnet-20200605"),
        ("/models/_x.pth", "pspnet-_x"),
        ("/models/模型.pth", "pspnet"),
        (f"{'x' * 80}.pth", "x" * 64),
    ],
)
def test_a_name_is_made_from_the_file(uri: str, name: str) -> None:
    assert model_name(uri) == name
    assert check_name(name) == name

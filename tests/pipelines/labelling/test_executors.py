"""What both executors owe the driver: the same tables, whatever an image does to the process that labels it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import psutil  # type: ignore[import-untyped]
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from pipelines.cluster.resources import ActorConfig
from pipelines.demo.scenes import draw_scene
from pipelines.labelling import course, executor_choice, in_process, job
from pipelines.labelling.config import LabelConfig
from pipelines.labelling.executor import RayExecutor
from pipelines.labelling.executor_choice import FEW_IMAGES, Executors
from pipelines.labelling.in_process import InProcessExecutor
from pipelines.labelling.job import LabellingFailed, label
from pipelines.labelling.stages import ray_line
from pipelines.labelling.stages.chunks import Chunk, Read
from pipelines.labelling.stages.coordinator import ATTEMPTS, LoadingFailed
from pipelines.labelling.stages.predictor import ModelToLoad
from pipelines.labelling.stages.segment import ModelFailed
from pipelines.process.config_tree import build
from pspnet_core.checkpoints.checkpoint import Checkpoint
from pspnet_core.errors import ConfigError, Terminated
from pspnet_core.inference.inputs import Prepared
from pspnet_core.inference.segmenter import Outcome
from tests.cluster.chaos.deadly import Childless, Choosy, Deadly, Impatient, Unborn
from tests.support.labelfiles import substance

IMAGES = 23
MODEL = ModelToLoad(checkpoint=cast(Checkpoint, None), batch=8, compile=False)  # of executors that are not started
EXECUTORS = {"ray": False, "in process": True}


def picture(seed: int, width: int = 64, height: int = 48) -> bytes:
    buffer = BytesIO()
    Image.fromarray(draw_scene(seed, width=width, height=height)[0]).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    """Images of three sizes, so that some share forward passes and some do not, and one that is none."""
    (tmp_path / "bucket").mkdir()
    for index in range(IMAGES):
        (tmp_path / "bucket" / f"{index:02d}.jpg").write_bytes(picture(index, 64 + 8 * (index % 3)))
    (tmp_path / "bucket" / "none.jpg").write_bytes(b"no image")
    return tmp_path / "bucket"


@pytest.fixture
def make_config(bucket: Path, tmp_path: Path, scene_model: Path) -> Callable[..., LabelConfig]:
    def make(**changes: Any) -> LabelConfig:
        fixed: dict[str, Any] = {"input": str(bucket), "output": str(tmp_path / "labels"), "model": str(scene_model)}
        return build(LabelConfig, fixed | {"date": "2026-01-31", "chunk": 7, "local": True} | changes)

    return make


@pytest.mark.usefixtures("ray_cluster")
def test_both_write_the_same_bytes(make_config: Callable[..., LabelConfig], tmp_path: Path) -> None:
    """One plan, carried out by each."""
    changes: dict[str, Any] = {"mask": "both", "scales": (0.75, 1.0), "flip": True, "batch": 4}
    first = label(make_config(local=False, **changes))
    found = {path.name: path.read_bytes() for path in tmp_path.glob("labels/masks/*/*/*.parquet")}
    for path in (*tmp_path.glob("labels/masks/*/*/*.parquet"), *tmp_path.glob("labels/runs/*")):
        path.unlink()
    again = label(make_config(local=True, **changes))
    assert (again["run_id"], again["labelled"], again["errors"]) == (first["run_id"], IMAGES, 1)
    after = {path.name: path.read_bytes() for path in tmp_path.glob("labels/masks/*/*/*.parquet")}
    assert len(found) == 4
    assert {name: substance(content) for name, content in after.items()} == {
        name: substance(content) for name, content in found.items()
    }


@pytest.mark.parametrize("local", EXECUTORS.values(), ids=EXECUTORS)
@pytest.mark.usefixtures("ray_cluster")
def test_an_image_that_ends_the_process_is_a_row(
    make_config: Callable[..., LabelConfig], bucket: Path, tmp_path: Path, local: bool
) -> None:
    (bucket / "00a.jpg").write_bytes(picture(2, height=Choosy.HEIGHT))
    found = label(make_config(local=local), make_predictor=Choosy)
    # A chunk whose process dies between its write and its report counts as skipped: the rows say what was labelled.
    assert found["images"] == found["labelled"] + found["skipped"] + found["errors"] == IMAGES + 2
    rows = pq.read_table(tmp_path / "labels/masks").select(["key", "error"]).to_pylist()
    assert len(rows) == IMAGES + 2
    errors = {row["key"]: row["error"] for row in rows if row["error"]}
    assert errors.pop("none.jpg").startswith("Unreadable: ")
    assert errors == {"00a.jpg": "Crashed: labelling it alone ends the process"}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attempts at segmenting a chunk."""
    for module in (in_process, ray_line):
        monkeypatch.setattr(module, "ChunkStates", Impatient)


def check_broken_machine(
    make_config: Callable[..., LabelConfig], monkeypatch: pytest.MonkeyPatch, *, local: bool
) -> None:
    """Two chunks in a row that are given up end the run in one line."""
    monkeypatch.setattr(course, "GIVEN_UP_IN_A_ROW", 2)
    with pytest.raises(LabellingFailed, match=r"^2 chunks in a row ended the processes that work on them") as caught:
        label(make_config(local=local), make_predictor=Deadly)
    assert "\n" not in str(caught.value)


def check_unborn(make_config: Callable[..., LabelConfig], *, local: bool) -> None:
    """A model that ends its process while it is loaded ends the run with an error that says so."""
    with pytest.raises(LoadingFailed, match=f"^loading the model ended its process {ATTEMPTS} times"):
        label(make_config(local=local), make_predictor=Unborn)


@pytest.mark.usefixtures("impatient")
def test_a_broken_machine(make_config: Callable[..., LabelConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    check_broken_machine(make_config, monkeypatch, local=True)
    # The rows of the chunks that were given up can be tried again.
    whole = label(make_config(), make_predictor=Choosy)
    again = label(make_config(retry_errors=("Crashed",)), make_predictor=Choosy)
    assert again["labelled"] > 0
    assert whole["labelled"] + again["labelled"] == IMAGES


def test_a_model_that_ends_its_process_while_it_is_loaded(make_config: Callable[..., LabelConfig]) -> None:
    check_unborn(make_config, local=True)


@pytest.mark.usefixtures("impatient")
def test_where_no_image_can_be_tried_in_a_process_of_its_own_the_chunk_is_given_up(
    make_config: Callable[..., LabelConfig], bucket: Path, tmp_path: Path
) -> None:
    (bucket / "00a.jpg").write_bytes(picture(2, height=Choosy.HEIGHT))
    label(make_config(), make_predictor=Childless)
    rows = pq.read_table(tmp_path / "labels/masks").select(["key", "error"]).to_pylist()
    crashed = {row["key"] for row in rows if "cannot be started" in (row["error"] or "")}
    # Its own chunk, and perhaps one that was under way in the same process.
    assert crashed >= {"00a.jpg", *(f"{index:02d}.jpg" for index in range(6))}
    assert len(crashed) in (7, 14)
    assert {row["key"] for row in rows if row["error"]} == crashed | {"none.jpg"}
    assert len(rows) == IMAGES + 2


def children() -> list[str]:
    """Those that label, of this process."""
    found = [" ".join(process.cmdline()) for process in psutil.Process().children()]
    return [command for command in found if "in_process" in command]


class KillsReaders(Read):
    """Ends the process that reads chunk 1."""

    def __call__(self, number: int) -> Chunk:
        chunk = super().__call__(number)
        if number == 1 and not chunk.totals.given_up:
            os._exit(1)
        return chunk


def test_a_chunk_that_ends_the_process_that_reads_it_takes_no_neighbour_along(
    make_config: Callable[..., LabelConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "Read", KillsReaders)
    label(make_config(), make_predictor=Choosy)
    rows = pq.read_table(tmp_path / "labels/masks").select(["key", "error"]).to_pylist()
    assert sum(row["error"] is None for row in rows) == IMAGES - 7
    crashed = {row["key"] for row in rows if "reading its chunk ended" in (row["error"] or "")}
    assert crashed == {f"{index:02d}.jpg" for index in range(7, 14)}


class Unspeakable(Exception):
    """Does not travel: its arguments are not those that it is made with."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class Faultier(Choosy):
    """Raises what cannot be pickled."""

    def __init__(self) -> None:
        raise Unspeakable(1, 2)


def test_an_error_that_cannot_travel_is_told_as_text(make_config: Callable[..., LabelConfig]) -> None:
    with pytest.raises(RuntimeError, match=r"^Unspeakable: 1 and 2$"):
        label(make_config(), make_predictor=Faultier)


class Faulty(Choosy):
    """Raises with each image."""

    def predict(self, images: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, Outcome]]:
        raise ArithmeticError("a fault")


def test_an_error_in_the_child_comes_out_as_itself_and_no_process_stays(
    make_config: Callable[..., LabelConfig],
) -> None:
    with pytest.raises(ModelFailed, match=r"^the model labels no image, in a new process either .*: a fault") as caught:
        label(make_config(), make_predictor=Faulty)
    assert "in predict" in str(caught.value.__cause__)
    assert children() == []


class Signalling(Choosy):
    """Sends SIGTERM to itself and its parent with the first image, as systemd does."""

    sent = False

    def predict(self, images: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, Outcome]]:
        if not Signalling.sent:
            Signalling.sent = True
            for process in (os.getpid(), os.getppid()):
                os.kill(process, signal.SIGTERM)
        yield from super().predict(images)


def test_sigterm_ends_it_in_order(make_config: Callable[..., LabelConfig], tmp_path: Path) -> None:
    with pytest.raises(Terminated) as caught:
        label(make_config(chunk=1), make_predictor=Signalling)
    done: Any = caught.value.result
    assert done["stopped"]
    assert 0 < done["labelled"] == len(list(tmp_path.glob("labels/masks/*/*/*"))) < IMAGES
    assert label(make_config(chunk=1))["labelled"] == IMAGES - done["labelled"]


@pytest.mark.parametrize(
    ("address", "device", "changes", "remedy"),
    [
        ("ray://head:10001", "cpu", {"local": True}, "RAY_ADDRESS names a cluster; leave out --local"),
        ("local", "cuda", {"local": True}, "this machine has a GPU; leave out --local"),
    ],
)
def test_where_local_cannot_be(
    make_config: Callable[..., LabelConfig],
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    device: str,
    changes: dict[str, Any],
    remedy: str,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(executor_choice, "best_device", lambda: torch.device(device))
    with pytest.raises(ConfigError, match=f"^local=True: {remedy}$"):
        label(make_config(**changes))
    assert not Path(make_config().output).exists()


@pytest.mark.parametrize(
    ("changes", "device", "expected"),
    [({}, "cpu", True), ({}, "cuda", False), ({"workers": "1"}, "cpu", False), ({"gpus": 1.0}, "cpu", False)],
)
def test_few_images_are_labelled_without_ray_where_nobody_asks_for_it(
    make_config: Callable[..., LabelConfig],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    device: str,
    expected: bool,
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(executor_choice, "best_device", lambda: torch.device(device))
    with RayExecutor(MODEL, ActorConfig()) as on_ray:
        here = InProcessExecutor(MODEL)
        executors = Executors(config=make_config(local=None, **changes), on_ray=on_ray, in_process=here)
        assert isinstance(executors.suited_to(FEW_IMAGES), InProcessExecutor if expected else RayExecutor)
        assert isinstance(executors.suited_to(FEW_IMAGES + 1), RayExecutor)

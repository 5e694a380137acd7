"""One actor with chunks side by side: the network has one at a time, and the next one's images are ready before."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import Mock, call

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.cluster.machine import LONGEST_SILENCE_S, LocalResources
from pipelines.demo.scenes import SCENE_CLASSES
from pipelines.label_table.ledger import Ledger
from pipelines.label_table.schema import Paths, RowProvenance, utc_now
from pipelines.labelling.report.totals import Totals
from pipelines.labelling.stages import segment as segment_module
from pipelines.labelling.stages import watchdog
from pipelines.labelling.stages.chunks import ENCODED, Chunk, RunContext
from pipelines.labelling.stages.coordinator import ALONE, TOGETHER, ChunkStates, Coordinator, DirectLine
from pipelines.labelling.stages.predictor import Predictor
from pipelines.labelling.stages.segment import ModelFailed, Segment
from pipelines.storage import open_store
from pspnet_core.errors import ImageError
from pspnet_core.images import run_lengths
from pspnet_core.images.decoding import ImageFile, decode_image
from pspnet_core.inference.inputs import Prepared
from pspnet_core.inference.segmenter import Outcome, Prediction
from tests.support.paths import ROOT
from tests.support.waiting import until

PATIENCE_S = 30
NO_IMAGES = {0: b"not an image", 253: b"ENDLESS!"}
"""What stands for some values; decoding the second never ends where ``tests/cluster/chaos/sabotage`` is at work."""


class Death(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


class Grey:
    """Says of each pixel that it is of the class of the image's first byte, modulo 4; watches who comes when."""

    def __init__(self) -> None:
        self.prepared: set[int] = set()
        self.drawn: list[int] = []
        self.met = threading.Event()

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        self.prepared.add(int(image[0, 0, 0]))
        return Prepared(image.shape[0], image.shape[1], (image,))

    def predict(self, images: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, Outcome]]:
        for key, image in images:
            self.attend(image)
            value = int(image.views[0][0, 0, 0])
            self.drawn.append(value)
            mask = np.full((image.height, image.width), value % 4, np.uint8)
            found = Prediction(mask, np.ones(mask.shape, np.float32))
            yield key, found if value < 250 else ImageError("TooLarge", "alas")

    def attend(self, image: Prepared) -> None:
        """Called with each image."""


class Mortal(Grey):
    """Dies as ``dies`` says, of the values that it has met in one call; keeps those of calls that it survived."""

    def __init__(self, dies: Callable[[list[int]], bool]) -> None:
        super().__init__()
        self.dies = dies
        self.calls: list[list[int]] = []

    def predict(self, images: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, Outcome]]:
        self.met_now: list[int] = []
        yield from super().predict(images)
        self.calls.append(self.met_now)

    def attend(self, image: Prepared) -> None:
        self.met_now.append(int(image.views[0][0, 0, 0]))
        if self.dies(self.met_now):
            raise Death


class Decoding(Grey):
    """Decodes files itself, to another size than theirs; refuses those of the value 2."""

    def decode(self, file: ImageFile, /) -> Prepared:
        pixels = decode_image(file)
        if pixels[0, 0, 0] == 2:
            raise ImageError("Truncated", "says the predictor")
        return Prepared(12, 16, self.prepare(pixels).views)


def chunk_of(number: int, values: Sequence[int]) -> Chunk:
    """A chunk of grey PNGs of 8 x 6 pixels."""
    data = []
    for value in values:
        buffer = BytesIO()
        Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(buffer, "PNG")
        data.append(NO_IMAGES.get(value, buffer.getvalue()))
    count = len(values)
    uris = [f"{number}-{value}" for value in values]
    columns: dict[str, Any] = {"uri": uris, "key": uris, "etag": uris, "bytes": [1] * count}
    table = pa.table(columns | {"data": data, "error": pa.nulls(count, pa.string())}, schema=ENCODED)
    return Chunk(number=number, table=table, totals=Totals(images=count))


def context_in(folder: Path, states: ChunkStates, max_pixels: int = 10_000) -> RunContext:
    return RunContext(
        ledger=Ledger(open_store(str(folder), field="output"), Paths(partition="grey-0")),
        provenance=RowProvenance(run_id="run", made=utc_now(), mask="rle"),
        model="grey",
        classes=SCENE_CLASSES,
        max_pixels=max_pixels,
        coordinator=Coordinator(DirectLine(states)),
    )


def segment_in(folder: Path, predictor: Predictor, states: ChunkStates | None = None, **limits: int) -> Segment:
    resources = LocalResources(threads=1, pass_memory=math.inf, cpus=1.0, gpus=0.5)
    return Segment(context_in(folder, states or ChunkStates(), **limits), lambda: predictor, resources)


MakeSegment = Callable[..., Segment]


@pytest.fixture
def make_segment(tmp_path: Path) -> MakeSegment:
    return lambda *arguments, **limits: segment_in(tmp_path, *arguments, **limits)


def rows_of(done: Chunk) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = done.table.to_pylist()
    return rows


def test_rows_are_in_the_order_of_the_plan_whatever_becomes_of_an_image(make_segment: MakeSegment) -> None:
    values = [7, 0, 251, 6, 5, 0, 252, 9]
    done = make_segment(Grey())(chunk_of(3, values))
    rows = rows_of(done)
    assert (done.totals.labelled, done.totals.kinds) == (4, {"TooLarge": 2, "Unreadable": 2})
    assert [row["uri"] for row in rows] == [f"3-{value}" for value in values]
    for value, row in zip(values, rows, strict=True):
        if value in (0, 251, 252):
            assert row["status"] == "error"
            assert row["error"].startswith("TooLarge: alas" if value else "Unreadable: ")
            assert row["mask_classes"] is None and row["width"] is None
        else:
            mask = run_lengths.decode(np.array(row["mask_classes"]), np.array(row["mask_lengths"]), 6, 8)
            assert (mask == value % 4).all()
            assert (row["status"], row["height"], row["width"]) == ("ok", 6, 8)


def test_while_one_chunk_is_with_the_network_the_next_ones_images_are_decoded(make_segment: MakeSegment) -> None:
    second = set(range(100, 110))

    class Waiting(Grey):
        """Does not go on with the first chunk before it has seen the second one's images, decoded."""

        def prepare(self, image: NDArray[np.uint8]) -> Prepared:
            prepared = super().prepare(image)
            if second <= self.prepared:
                self.met.set()
            return prepared

        def attend(self, image: Prepared) -> None:
            assert self.met.wait(PATIENCE_S)

    predictor = Waiting()
    segment = make_segment(predictor)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(segment, chunk_of(0, range(1, 11)))
        other = threads.submit(segment, chunk_of(1, sorted(second)))
        assert [row["status"] for row in rows_of(first.result()) + rows_of(other.result())] == ["ok"] * 20
    order = [set(predictor.drawn[:10]), set(predictor.drawn[10:])]
    assert set(range(1, 11)) in order and second in order


def test_the_next_chunks_images_are_with_the_network_before_the_last_one_is_done(make_segment: MakeSegment) -> None:
    class Slow(Grey):
        """Answers for the first chunk when the second one's images have come."""

        def predict(self, images: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, Outcome]]:
            for outcome in list(super().predict(images)):
                assert self.met.wait(PATIENCE_S)
                yield outcome

        def attend(self, image: Prepared) -> None:
            if self.drawn:
                self.met.set()

    segment = make_segment(Slow())
    with ThreadPoolExecutor(2) as threads:
        done = list(threads.map(segment, [chunk_of(0, [1]), chunk_of(1, [2])]))
    assert [row.totals.labelled for row in done] == [1, 1]


class Failing(Grey):
    """Raises an error of one value; where it is ``broken`` by that, of all that follow, too."""

    def __init__(self, *, broken: bool = False) -> None:
        super().__init__()
        self.breaks, self.broken = broken, False

    def attend(self, image: Prepared) -> None:
        if self.broken or image.views[0][0, 0, 0] == 13:
            self.broken = self.breaks
            raise RuntimeError("a fault\x1b[31m")


def test_an_image_of_which_the_model_raises_an_error_is_a_row(make_segment: MakeSegment) -> None:
    segment = make_segment(Failing())
    done = segment(chunk_of(0, [12, 13, 14, 0]))
    assert done.table["error"].to_pylist()[:3] == [None, "Failed: RuntimeError: a fault\\x1b[31m", None]
    assert done.totals.kinds == {"Failed": 1, "Unreadable": 1}
    with ThreadPoolExecutor(1) as threads:  # a lock that was still held would stop it
        done = threads.submit(segment, chunk_of(1, [15])).result(timeout=PATIENCE_S)
    assert done.totals.labelled == 1


def test_an_answer_that_is_no_number_is_an_error(make_segment: MakeSegment) -> None:
    class Unsure(Grey):
        def predict(self, images: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, Outcome]]:
            for key, outcome in super().predict(images):
                if isinstance(outcome, Prediction) and self.drawn[-1] == 13:
                    outcome.confidence[-1, -1] = math.nan
                yield key, outcome

    done = make_segment(Unsure())(chunk_of(0, [12, 13, 14]))
    assert [text and text.partition(":")[0] for text in done.table["error"].to_pylist()] == [None, "NotFinite", None]


def test_a_model_that_an_image_breaks_ends_its_process(
    make_segment: MakeSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another process the image is found as one that ends processes is."""

    def die(reason: str) -> NoReturn:
        raise Death(reason)

    monkeypatch.setattr(segment_module, "end_process", die)
    states = ChunkStates()
    with pytest.raises(Death, match="RuntimeError: a fault"):
        make_segment(Failing(broken=True), states)(chunk_of(0, [12, 13, 14]))
    assert states.begin(0).reason.startswith("RuntimeError: a fault")


class Silent(Grey):
    """Never answers of an image of the value 13, or not before it has begun some forward passes."""

    def __init__(self, passes: int = 0) -> None:
        super().__init__()
        self.passes, self.ended = passes, threading.Event()
        self.on_pass: Callable[[int], None] = print

    def attend(self, image: Prepared) -> None:
        if image.views[0][0, 0, 0] == 13:
            for _ in range(self.passes):
                self.ended.wait(0.05)
                self.on_pass(48)
            if not self.passes:
                self.ended.wait()
                raise Death


def test_a_network_that_never_answers_ends_its_process(
    make_segment: MakeSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "PASS_S", 0.5)
    model = Silent()
    monkeypatch.setattr(segment_module, "end_process", lambda reason: model.ended.set())
    chunk = chunk_of(0, [12, 13, 14, 13])
    states = ChunkStates()
    for _ in range(TOGETHER + 2):
        with pytest.raises(Death):
            make_segment(model, states)(chunk)
        model.ended.clear()
    done = make_segment(model, states)(chunk)
    silent = "TimedOut: the network has done nothing for 0.5 s"
    assert done.table["error"].to_pylist() == [None, silent, None, silent]


def test_a_network_that_is_at_work_may_take_its_time(
    make_segment: MakeSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "PASS_S", 0.5)
    assert make_segment(Silent(passes=30))(chunk_of(0, [12, 13, 14])).totals.labelled == 3


def test_a_model_that_labels_nothing_in_a_new_process_ends_the_run(make_segment: MakeSegment) -> None:
    states, model = ChunkStates(), Failing()
    states.begin(0)
    model.broken = model.breaks = True
    with pytest.raises(ModelFailed, match="in a new process either"):
        make_segment(model, states)(chunk_of(0, [12]))


@pytest.mark.parametrize("step", ["prepare", "label"])
def test_an_error_before_or_after_the_model_is_the_image_s(
    step: str, make_segment: MakeSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = make_segment(Grey())
    calls = itertools.count()
    of = segment.predictor if step == "prepare" else segment.rows
    whole = getattr(of, step)

    def first_fails(argument: Any) -> Any:
        if next(calls) == 0:
            raise KeyError(1)
        return whole(argument)

    monkeypatch.setattr(type(of), step, lambda _, argument: first_fails(argument))
    done = segment(chunk_of(0, [12, 13, 14]))
    assert sorted(filter(None, done.table["error"].to_pylist())) == ["Failed: KeyError: 1"]
    assert done.totals.labelled == 2


def test_a_chunk_that_has_ended_a_process_waits_until_it_has_one_to_itself(make_segment: MakeSegment) -> None:
    states = Mock(wraps=ChunkStates())
    states.begin(1)

    class Waiting(Grey):
        """Holds chunk 0 until chunk 1 has asked whether it may begin."""

        def attend(self, image: Prepared) -> None:
            self.met.set()
            until(lambda: call.ended(1) in states.mock_calls)

    predictor = Waiting()
    segment = make_segment(predictor, states)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(segment, chunk_of(0, [1, 2]))
        assert predictor.met.wait(PATIENCE_S)
        second = threads.submit(segment, chunk_of(1, [3]))
        assert (first.result().totals.labelled, second.result().totals.labelled) == (2, 1)
    told = [f"{name} {arguments[0]}" for name, arguments, _ in states.mock_calls if name in ("begin", "done")]
    assert told == ["begin 1", "begin 0", "done 0", "begin 1", "done 1"]


def deaths_of(make_segment: MakeSegment, predictor: Mortal, chunk: Chunk) -> tuple[int, Chunk]:
    """How many processes a chunk ends before it is done, each with an actor of its own, and what it comes to."""
    states = ChunkStates()
    for deaths in range(TOGETHER + ALONE + 2):
        with contextlib.suppress(Death):
            return deaths, make_segment(predictor, states)(chunk)
    raise AssertionError("it is tried for ever")


def errors_of(done: Chunk) -> list[str]:
    return [(row["error"] or "").partition(":")[0] for row in rows_of(done)]


def test_images_that_end_the_process_after_decoding_are_told_from_their_neighbours(make_segment: MakeSegment) -> None:
    predictor = Mortal(lambda values: values[-1] in (66, 77))
    deaths, done = deaths_of(make_segment, predictor, chunk_of(3, [1, 251, 66, 0, 2, 77, 3]))
    assert deaths == TOGETHER + 2, "those with all images, and one with each of the deadly ones alone"
    assert errors_of(done) == ["", "TooLarge", "Crashed", "Unreadable", "", "Crashed", ""]
    assert (done.totals.labelled, done.totals.errors, done.totals.given_up) == (3, 4, 0)
    # After a death those that are not known come first: 3 before 1, 251, the unreadable one and 2, which had survived.
    assert predictor.calls[-5:] == [[3], [1], [251], [], [2]]


def test_images_that_only_together_end_the_process_are_labelled_alone(make_segment: MakeSegment) -> None:
    predictor = Mortal(lambda values: len(values) > 2)
    deaths, done = deaths_of(make_segment, predictor, chunk_of(0, [1, 2, 3]))
    assert (deaths, done.totals.labelled, done.totals.errors) == (TOGETHER, 3, 0)
    assert predictor.calls[-3:] == [[1], [2], [3]]


def test_however_many_images_end_the_process_each_is_told(
    make_segment: MakeSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChunkStates, "alone", 1)
    predictor = Mortal(lambda values: 60 < values[-1] < 70)
    deaths, done = deaths_of(make_segment, predictor, chunk_of(0, [1, 61, 62, 63, 64, 2]))
    assert deaths == TOGETHER + 4
    assert errors_of(done) == ["", *["Crashed"] * 4, ""]
    assert done.totals.given_up == 0


def test_images_that_cannot_be_told_apart_crash(make_segment: MakeSegment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChunkStates, "all_alone", 2)
    deadly = range(100, 105)
    predictor = Mortal(lambda values: values[-1] in deadly)
    chunk = chunk_of(0, [1, *deadly, 2, 3])
    gone = ["Changed: it is another one" if value == 3 else None for value in (1, *deadly, 2, 3)]
    table = chunk.table.set_column(chunk.table.schema.get_field_index("error"), "error", pa.array(gone, pa.string()))
    deaths, done = deaths_of(make_segment, predictor, dataclasses.replace(chunk, table=table))
    assert deaths == TOGETHER + 2
    assert errors_of(done) == ["", *["Crashed"] * len(deadly), "Crashed", "Changed"]
    assert (done.totals.labelled, done.totals.errors, done.totals.given_up) == (1, len(deadly) + 2, 1)


def test_with_a_deadly_model_every_row_is_crashed(make_segment: MakeSegment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChunkStates, "alone", 1)
    deaths, done = deaths_of(make_segment, Mortal(lambda values: True), chunk_of(0, [1, 2]))
    assert (deaths, done.totals.given_up) == (TOGETHER + 1, 1)
    assert errors_of(done) == ["Crashed", "Crashed"]


def label_endless(folder: str) -> None:
    """What a process does that ``test_a_process_that_decodes_for_ever_ends`` watches."""
    watchdog.DECODING_S = 1.0
    segment_in(Path(folder), Grey())(chunk_of(5, [253]))


def test_a_process_that_decodes_for_ever_ends(tmp_path: Path) -> None:
    (tmp_path / "killers").touch()
    places = os.pathsep.join([str(ROOT / "tests/cluster/chaos/sabotage"), str(ROOT)])
    found = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import label_endless; label_endless({str(tmp_path)!r})"],
        env=os.environ | {"PYTHONPATH": places, "CHAOS_FOLDER": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=10 * PATIENCE_S,
    )
    assert found.returncode == -signal.SIGKILL, found.stderr
    assert "decoding 5-253 takes longer than 1 s: this process ends" in found.stderr


def test_seconds_are_told_once(make_segment: MakeSegment) -> None:
    """What an actor held and used adds up to what there was, however many chunks are side by side."""
    segment = make_segment(Grey())
    began, cpu = segment.told, segment.told_cpu
    with ThreadPoolExecutor(4) as threads:
        done = list(threads.map(segment, [chunk_of(number, range(1, 20)) for number in range(8)]))
    assert sum(chunk.totals.held["gpu"] for chunk in done) == pytest.approx((segment.told - began) * 0.5)
    assert sum(chunk.totals.cpu["segment"] for chunk in done) == pytest.approx(segment.told_cpu - cpu, rel=0.5)


def test_a_predictor_that_decodes_files_gets_them(make_segment: MakeSegment) -> None:
    rows = rows_of(make_segment(Decoding())(chunk_of(0, [1, 2, 0])))
    assert [(row["height"], row["width"]) for row in rows] == [(12, 16), (None, None), (None, None)]
    assert rows[1]["error"] == "Truncated: says the predictor"
    assert rows[2]["error"].startswith("Unreadable: ")


@pytest.mark.parametrize("kind", [Grey, Decoding])
def test_an_image_over_the_limit_is_not_decoded(make_segment: MakeSegment, kind: type[Grey]) -> None:
    predictor = kind()
    rows = rows_of(make_segment(predictor, max_pixels=8 * 6 - 1)(chunk_of(0, [1, 3])))
    assert [row["error"].partition(": ")[0] for row in rows] == ["TooLarge", "TooLarge"]
    assert predictor.prepared == set()


def test_images_wait_decoded_only_as_far_as_their_bytes_allow(make_segment: MakeSegment) -> None:
    segment = make_segment(Grey())
    segment.most = 3 * (8 * 6 * 3)
    prepared: list[int] = []

    class Counting(Grey):
        def predict(self, images: Iterable[tuple[int, Prepared]]) -> Iterator[tuple[int, Outcome]]:
            for image in super().predict(images):
                prepared.append(len(segment.predictor.prepared))  # type: ignore[attr-defined]
                yield image

    segment.predictor = Counting()
    rows = rows_of(segment(chunk_of(0, range(1, 40))))
    assert [row["status"] for row in rows] == ["ok"] * 39
    # Those that wait, and the one at hand; whoever counts in bytes need not count in images.
    assert all(count <= place + 4 for place, count in enumerate(prepared, 1))
    assert segment.depth > 4


def test_all_attempts_at_a_chunk_take_less_than_work_may_be_silent() -> None:
    """Or the run would fail before the image is found, and the next one would begin anew."""
    longest = watchdog.PASS_S + watchdog.MOST_S
    assert (TOGETHER + 2) * longest < LONGEST_SILENCE_S

"""The contract of every input format: what is listed can be read, and what cannot be had is an error of its image."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines import sources
from pipelines.sources import SOURCES, find_source
from pipelines.storage import Store, open_store
from pipelines.tables import LISTING
from pspnet_core.errors import ConfigError, ImageError

CONTENT = {"a.jpg": b"first", "deep/b.PNG": b"second", "deep/c d#%.tiff": b"third"}


def write_loose(folder: Path) -> Callable[[str], Path]:
    for key, data in CONTENT.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)
    (folder / "readme.txt").write_text("no image")
    return lambda key: folder / key


# How each format is written: a new row of SOURCES needs one here, and then has its contract tested.
WRITERS: Mapping[str, Callable[[Path], Callable[[str], Path]]] = {"images": write_loose}


def test_every_source_is_tested() -> None:
    assert set(WRITERS) == set(SOURCES)


@pytest.fixture(params=sorted(SOURCES))
def source(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def listed(name: str, folder: Path) -> tuple[Store, pa.Table]:
    store = open_store(str(folder), field="input")
    return store, SOURCES[name].find(store)


def test_what_is_listed_can_be_read(source: str, tmp_path: Path) -> None:
    WRITERS[source](tmp_path)
    store, table = listed(source, tmp_path)
    assert table.schema == LISTING
    assert sorted(table["key"].to_pylist()) == sorted(CONTENT)
    assert table["bytes"].to_pylist() == [len(CONTENT[key]) for key in table["key"].to_pylist()]
    assert len(set(table["uri"].to_pylist())) == len(CONTENT)
    results = SOURCES[source].read(store, table, threads=2)
    assert results == [CONTENT[key] for key in table["key"].to_pylist()]


def test_listing_again_gives_the_same(source: str, tmp_path: Path) -> None:
    WRITERS[source](tmp_path)
    assert listed(source, tmp_path)[1] == listed(source, tmp_path)[1]


def test_what_changed_or_went_is_told_per_image(source: str, tmp_path: Path) -> None:
    place = WRITERS[source](tmp_path)
    store, table = listed(source, tmp_path)
    place("a.jpg").write_bytes(b"another content")
    place("deep/b.PNG").unlink()
    results = dict(zip(table["key"].to_pylist(), SOURCES[source].read(store, table, threads=2), strict=True))
    kinds = {key: result.kind for key, result in results.items() if isinstance(result, ImageError)}
    assert kinds == {"a.jpg": "Changed", "deep/b.PNG": "Missing"}
    assert results["deep/c d#%.tiff"] == b"third"


def test_an_empty_place_lists_nothing(source: str, tmp_path: Path) -> None:
    assert len(listed(source, tmp_path)[1]) == 0


def test_a_file_that_would_not_fit_into_memory_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_loose(tmp_path)
    monkeypatch.setattr(sources, "MAX_BYTES", 5)
    store, table = listed("images", tmp_path)
    results = dict(zip(table["key"].to_pylist(), SOURCES["images"].read(store, table, threads=2), strict=True))
    large = results["deep/b.PNG"]
    assert isinstance(large, ImageError)
    assert str(large) == "TooLarge: 6 bytes; at most 5 are read"
    assert results["a.jpg"] == b"first"


def test_a_machine_without_the_folder_is_no_missing_image(tmp_path: Path) -> None:
    place = write_loose(tmp_path / "mount")
    store, table = listed("images", tmp_path / "mount")
    place("a.jpg").parent.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="mount it on every node"):
        SOURCES["images"].read(store, table, threads=2)


def test_an_unknown_source_is_told() -> None:
    with pytest.raises(ConfigError, match=r"source=tape: choose one of images"):
        find_source("tape")

"""What ``--input`` names: folders, globs and objects, many at a time, each object once."""

import datetime
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.sources import Inputs, inputs
from pipelines.sources.inputs import Input, interleaved, split_inputs
from pipelines.sources.omissions import Omissions
from pipelines.storage import Store, StoredObject, open_store
from pspnet_core.errors import ConfigError
from tests.pipelines.storage.test_storage import mistake
from tests.support.buckets import put

DATE = datetime.date(2026, 1, 5)
KEYS = ("a.jpg", "x,y.jpg", "camera-1/1.jpg", "camera-1/deep/2.jpg", "camera-2/3.jpg", "[new]/4.jpg", ".hidden/5.jpg")


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    root = str(tmp_path / "bucket") if request.param == "local" else request.getfixturevalue("s3_bucket")
    made = open_store(root, field="input")
    for key in (*KEYS, "notes.txt"):
        put(made, key, key.encode())
    return made


def keys(*texts: str) -> list[str]:
    """Of all objects of some inputs, relative to their own input each."""
    places = tuple(Input.parse(text) for text in texts)
    return sorted(item.key for item in Inputs(places=places).objects({".jpg"}))


LISTINGS = {
    "": sorted(KEYS[:-1]),
    "/camera-1/": ["1.jpg", "deep/2.jpg"],
    "/*.jpg": ["a.jpg", "x,y.jpg"],
    "/camera-*": ["camera-1/1.jpg", "camera-1/deep/2.jpg", "camera-2/3.jpg"],
    "/camera-?/*.jpg": ["camera-1/1.jpg", "camera-2/3.jpg"],
    "/**/2.jpg": ["camera-1/deep/2.jpg"],
    "/camera-[!1]/": ["camera-2/3.jpg"],
    "/[[]new]": ["[new]/4.jpg"],
    "/camera-1/1.jpg": ["1.jpg"],
    "/.hidden": ["5.jpg"],
    "/nothing*": [],
}


def test_folders_globs_and_objects(store: Store) -> None:
    everything = {store.uri_of(key) for key in KEYS}
    for text, found in LISTINGS.items():
        assert keys(store.root + text) == found
        place = Input.parse(store.root + text)
        found_here = (item.uri for part in place.parts({".jpg"}, Omissions().add_unreadable) for item in part)
        uris = {uri for uri in found_here if uri.endswith(".jpg")}
        assert uris == {uri for uri in everything if place.selects(uri)}


def test_an_object_comes_once_however_many_inputs_hold_it(store: Store) -> None:
    root = store.root
    texts = (f"{root}/camera-1", root, f"{root}/camera-?/*.jpg", f"{root}/a.jpg", f"{root}/.hidden", f"{root}/*.jpg")
    assert keys(*texts) == sorted(["1.jpg", "deep/2.jpg", "a.jpg", "x,y.jpg", "camera-2/3.jpg", "[new]/4.jpg", "5.jpg"])


def test_a_folder_may_be_named_like_an_object(store: Store) -> None:
    put(store, "set.jpg/inner.jpg", b"inside")
    assert keys(f"{store.root}/set.jpg") == ["inner.jpg"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("s3://b/x", ["s3://b/x"]),
        ("s3://b/x, s3://b/y", ["s3://b/x", "s3://b/y"]),
        ('["s3://b/x,y", "z"]', ["s3://b/x,y", "z"]),
        ("[ab]*.jpg,c", ["[ab]*.jpg", "c"]),
        ("a,,b", ["a", "", "b"]),
        ("[]", [""]),
    ],
)
def test_many_in_one_flag(text: str, parts: list[str]) -> None:
    assert split_inputs(text) == parts


def test_templates_are_filled_in(tmp_path: Path) -> None:
    made = Inputs.of(f"{tmp_path}/{{date}}/*.jpg,s3://b/{{date:%Y/%m}}/", date=DATE)
    assert made.uris == (f"{tmp_path}/2026-01-05/*.jpg", "s3://b/2026/01")
    assert str(made) == ",".join(made.uris)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("", "give a folder"),
        ("a,,b", "give a folder"),
        ("s3://*/x", "wildcards may stand only after the name of the bucket"),
        ("s3://b/x**/y", "put it between slashes"),
        ("s3://b/{day}", "write {date}"),
    ],
)
def test_mistakes_are_told_in_one_line(text: str, remedy: str) -> None:
    with mistake(remedy):
        Inputs.of(text, date=DATE)


def test_one_input_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with mistake("no such folder"):
        keys(str(tmp_path), f"{tmp_path}/nowhere")


def numbered(name: str, count: int, taken: dict[str, int]) -> Iterator[StoredObject]:
    for number in range(count):
        taken[name] = number + 1
        yield StoredObject(uri=f"{name}/{number}", key=f"{number}", etag="1", bytes=1, modified=None)


def test_many_listings_run_a_bounded_stretch_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "SLICE", 10)
    taken: dict[str, int] = {}
    names = [f"s{number}" for number in range(50)]
    merged = interleaved([numbered(name, 95, taken) for name in names])
    first = list(itertools.islice(merged, 5))
    assert len({item.uri for item in first}) == 5
    assert all(count <= 20 for count in taken.values())
    rest = list(merged)
    found = [item.uri for item in (*first, *rest)]
    assert len(found) == len(set(found)) == 50 * 95
    for name in names:
        assert [uri for uri in found if uri.startswith(f"{name}/")] == [f"{name}/{number}" for number in range(95)]


def test_listings_run_at_the_same_time() -> None:
    together = threading.Barrier(4, timeout=60)

    def waiting(name: str) -> Iterator[StoredObject]:
        together.wait()  # for ever, were they listed one after another
        yield from numbered(name, 1, {})

    assert len(list(interleaved([waiting(f"s{number}") for number in range(4)]))) == 4


def test_an_error_of_one_listing_ends_them_all() -> None:
    def failing() -> Iterator[StoredObject]:
        yield from numbered("x", 3, {})
        raise ConfigError("input", "x", "went away")

    with pytest.raises(ConfigError, match="went away"):
        list(interleaved([failing(), numbered("y", 5, {})]))

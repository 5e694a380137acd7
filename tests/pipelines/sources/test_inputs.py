"""What ``--input`` names: folders, globs and objects, many at a time, each object once."""

import dataclasses
import datetime
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
        found_here = (item.uri for part in place.parts({".jpg"}, Omissions().add_name) for item in part)
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
    ("text", "expected"),
    [
        ("s3://b/{9..11}", ["s3://b/9", "s3://b/10", "s3://b/11"]),
        ("s3://b/{09..11}/x{2..1}.tar", [f"s3://b/{a}/x{b}.tar" for a in ("09", "10", "11") for b in (2, 1)]),
        ("s3://b/{1..2}/{date}", ["s3://b/1/2026-01-05", "s3://b/2/2026-01-05"]),
    ],
)
def test_ranges_are_expanded(text: str, expected: list[str]) -> None:
    assert list(Inputs.of(text, date=DATE).uris) == expected


EXCLUDED = {
    "camera-1": ["[new]/4.jpg", "a.jpg", "camera-2/3.jpg", "x,y.jpg"],
    "./camera-*/": ["[new]/4.jpg", "a.jpg", "x,y.jpg"],
    "*.jpg": ["[new]/4.jpg", "camera-1/1.jpg", "camera-1/deep/2.jpg", "camera-2/3.jpg"],
    "**/deep/*.jpg": ["[new]/4.jpg", "a.jpg", "camera-1/1.jpg", "camera-2/3.jpg", "x,y.jpg"],
}


@pytest.mark.parametrize("pattern", EXCLUDED)
def test_what_is_excluded(pattern: str, store: Store) -> None:
    made = Inputs.of(json.dumps([store.root]), date=DATE, exclude=(pattern,))
    assert sorted(item.key for item in made.objects({".jpg"})) == EXCLUDED[pattern]
    assert made.omissions.counts() == {"damaged": 0, "left_out": {".txt": 1}}
    # What the first input leaves out may be in the second one.
    both = Inputs.of(json.dumps([store.root, f"{store.root}/camera-1"]), date=DATE, exclude=("camera-1",))
    assert len(list(both.objects({".jpg"}))) == 6


def test_tables_of_the_output_are_no_input(store: Store) -> None:
    for key in ("masks/model=a-1/dt=1/x.jpg", "masks/x.jpg", "runs/y.jpg"):
        put(store, f"out/{key}", b"x")
    made = dataclasses.replace(Inputs.of(json.dumps([f"{store.root}/out"]), date=DATE), output=f"{store.root}/out")
    assert sorted(item.key for item in made.objects({".jpg"})) == ["masks/x.jpg", "runs/y.jpg"]


@pytest.mark.parametrize(
    ("flags", "field", "remedy"),
    [
        *(({"exclude": (glob,)}, "exclude", "relative to the input") for glob in ("", "/x", "../x", "s3://b/x", "~/x")),
        ({"exclude": ("x**y",)}, "exclude", "put it between slashes"),
        ({"allow": ("s3://b/*",)}, "allow", "without wildcards"),
    ],
)
def test_mistakes_in_what_is_left_out_or_allowed(flags: dict[str, Any], field: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}=.*{remedy}"):
        Inputs.of("s3://b", date=DATE, **flags)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("", "give a folder"),
        ("s3://b/{1..100000}", "stands for too many names"),
        ("s3://b/{1..1000}{1..1000}", "stands for too many names"),
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

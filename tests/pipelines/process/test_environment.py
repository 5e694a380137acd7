"""The environment is read while another thread deletes variables, and completed where an odd machine lacks some."""

import getpass
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.process import environment
from pipelines.process.environment import complete_environment, data_folder, private_folder, variables
from pipelines.process.redaction import HIDDEN, redacted


class Deleting(dict[str, str]):
    """Deletes a variable after all names were read, as a thread may."""

    def __iter__(self) -> Iterator[str]:
        names = list(super().__iter__())
        self.pop("SESSION", None)
        return iter(names)


def test_what_is_deleted_meanwhile_is_left_out_and_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"SESSION": "1", "HOME": "/home/me", "MY_SECRET": "0123456789abcdef"}
    monkeypatch.setattr(os, "environ", Deleting(given))
    assert {"HOME", "MY_SECRET"} <= variables().keys() <= os.environ.keys()
    monkeypatch.setattr(os, "environ", Deleting(given))
    assert redacted("key 0123456789abcdef") == f"key {HIDDEN}"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """An environment with ``TMPDIR`` and nothing else that matters here; all is undone."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in [*os.environ]:
        if name.lower().endswith("_proxy") or name in ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
            del os.environ[name]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield monkeypatch


@pytest.mark.parametrize("home", ["", "/nowhere", "{file}"])
def test_a_home_that_is_none_becomes_a_private_folder(home: str, bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.environ["HOME"] = home.format(file=tmp_path / "file")
    complete_environment()
    place = Path(os.environ["HOME"])
    assert (place.parent, stat.S_IMODE(place.stat().st_mode)) == (tmp_path, 0o700)
    assert place == private_folder()  # the next command finds it again


@pytest.mark.parametrize("home", ["/", "/usr"])
def test_a_home_that_cannot_be_written_stays_for_its_settings(
    home: str, bare: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Containers mount credentials there: ``/.aws``, ``/.netrc``."""
    os.environ["HOME"] = home
    bare.setattr(os, "access", lambda *_: False)
    complete_environment()
    assert os.environ["HOME"] == home
    assert {os.environ[name] for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR")} == {str(private_folder())}


def test_a_home_that_can_be_written_stays(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    os.environ["HOME"] = str(tmp_path)
    before = dict(os.environ)
    complete_environment()
    assert dict(os.environ) == before
    assert data_folder() == tmp_path / ".pspnet"
    assert [path.name for path in tmp_path.iterdir()] == [".pspnet"]


def plant_link(place: Path) -> None:
    place.symlink_to(place.parent)


def plant_file(place: Path) -> None:
    place.touch()


def plant_open_folder(place: Path) -> None:
    place.mkdir()
    place.chmod(0o777)


@pytest.mark.parametrize("plant", [plant_link, plant_file, plant_open_folder])
def test_a_private_folder_that_somebody_has_put_there_is_not_used(
    plant: Callable[[Path], None], bare: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its name is known, and anybody may write to ``/tmp``."""
    environment._unique_private_folder.cache_clear()
    plant(tmp_path / f"pspnet-{os.getuid()}")
    folder = private_folder()
    assert folder.name != f"pspnet-{os.getuid()}"
    assert (folder.parent, stat.S_IMODE(folder.lstat().st_mode)) == (tmp_path, 0o700)
    os.environ["HOME"] = str(folder)
    assert f"kept in {data_folder()}, which is new for each job; set HOME, or MLFLOW_TRACKING_URI, " in caplog.text
    environment._unique_private_folder.cache_clear()


def test_a_user_without_a_name_gets_one(bare: pytest.MonkeyPatch) -> None:
    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 54321")

    bare.setattr(getpass, "getuser", unknown)
    complete_environment()
    assert os.environ["USER"] == str(os.getuid())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"http_proxy": "http://p"}, "localhost,127.0.0.1,::1"),
        ({"HTTPS_PROXY": "http://p", "NO_PROXY": ".example, 10.0.0.1"}, ".example,10.0.0.1,localhost,127.0.0.1,::1"),
        ({"all_proxy": "http://p", "no_proxy": "localhost", "NO_PROXY": "x"}, "localhost,127.0.0.1,::1"),
        ({"http_proxy": "http://p", "no_proxy": "*"}, "*"),
    ],
)
def test_no_proxy_leads_to_loopback(given: dict[str, str], expected: str | None, bare: pytest.MonkeyPatch) -> None:
    os.environ |= given
    complete_environment()
    assert os.environ.get("no_proxy") == expected

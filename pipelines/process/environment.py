"""The process's environment variables, for itself and for its children, and what an odd machine lacks of them.

A container with a random user has no entry in ``/etc/passwd``, a home folder that is ``/`` or cannot be written, and
perhaps a proxy in front of everything. Libraries ask for a home, a user's name and a folder for their caches while they
are imported, so ``complete_environment`` comes before them.
"""

import contextlib
import functools
import getpass
import logging
import os
import stat
import sys
import tempfile
import urllib.request
from pathlib import Path

from pspnet_core.errors import ConfigError

log = logging.getLogger(__name__)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Hosts that no proxy leads to."""
PRIVATE = "pspnet-"
"""How the names of private folders begin."""


def variables() -> dict[str, str]:
    """A copy of the environment.

    Unlike ``dict(os.environ)`` it does not fail while another thread deletes a variable, as MLflow's telemetry does.
    """
    return {name: value for name in list(os.environ) if (value := os.environ.get(name)) is not None}


def child_environment() -> dict[str, str]:
    """The environment of a Python that imports from wherever this process does: Ray adds to its path."""
    environment = variables()
    places = [environment.get("PYTHONPATH"), *sys.path]
    return environment | {"PYTHONPATH": os.pathsep.join(place for place in places if place)}


def complete_environment() -> None:
    """Set the variables without which libraries fail, or talk to themselves through a proxy; open what is closed."""
    _open_standard_streams()
    if _home() is None:
        os.environ["HOME"] = str(_private_folder_or_root())
    elif not os.access(Path.home(), os.W_OK):  # it may still hold settings, such as ~/.aws
        for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR"):
            os.environ.setdefault(name, str(_private_folder_or_root()))
    try:
        getpass.getuser()
    except (KeyError, OSError):  # no entry in /etc/passwd
        os.environ["USER"] = str(os.getuid())
    if urllib.request.getproxies_environment().keys() - {"no"}:
        _reach_loopback_directly()


def check_environment() -> None:
    """Refuse a machine on which no job can work.

    Raises:
        ConfigError: there is no folder for temporary files, or names of files are not read as UTF-8.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        given = os.environ.get("TMPDIR", "")
        raise ConfigError("TMPDIR", given, "no temporary folder can be written; set it to one that can") from error
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8":  # an image would have another key than on other machines
        given = os.environ.get("PYTHONUTF8", "")
        raise ConfigError("PYTHONUTF8", given, f"names of files would be read as {encoding}, not as UTF-8; set it to 1")


def data_folder() -> Path:
    """Where files of this user lie that have no other place: ``~/.pspnet``, or else below a private folder."""
    folder = Path.home() / ".pspnet"
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
    if not os.access(folder, os.W_OK):
        folder = private_folder() / ".pspnet"
        folder.mkdir(exist_ok=True)
    if folder.parent.name.startswith(PRIVATE):
        _tell_of(folder)
    return folder


@functools.cache
def _tell_of(folder: Path) -> None:
    lasts = "" if folder.parent == _known_private_folder() else ", which is new for each job"
    log.warning(
        "there is no home folder that can be written: runs and models are kept in %s%s; set HOME, or "
        "MLFLOW_TRACKING_URI, to keep them elsewhere",
        folder,
        lasts,
    )


def private_folder() -> Path:
    """A folder under TMPDIR that nobody else may look into, the same each time.

    It is new each time where that one is somebody else's, or TMPDIR shows other owners or modes than were set.

    Raises:
        FileNotFoundError: no temporary folder can be written.
    """
    folder = _known_private_folder()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:  # something else has the name
        return _unique_private_folder()
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o077
    return folder if mine else _unique_private_folder()


def _known_private_folder() -> Path:
    return Path(tempfile.gettempdir(), f"{PRIVATE}{os.getuid()}")


@functools.cache
def _unique_private_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix=PRIVATE))


def _open_standard_streams() -> None:
    """Let no file or socket take the number of a standard stream that the caller has closed."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))


def _private_folder_or_root() -> Path:
    """For libraries that are imported before ``check_environment`` can tell what is wrong."""
    try:
        return private_folder()
    except FileNotFoundError:
        return Path("/")


def _home() -> Path | None:
    """The home folder; None where there is none. It may be ``/``, where containers mount ``/.aws`` and the like."""
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry in /etc/passwd
        return None
    return home if home.is_dir() and os.environ.get("HOME") != "" else None


def _reach_loopback_directly() -> None:
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host for part in given.split(",") if (host := part.strip())]
    if hosts != ["*"]:
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys([*hosts, *LOOPBACK]))

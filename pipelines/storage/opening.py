"""From a URI to its store, or to a local path.

A store's module is imported when the first URI of its scheme is opened: the S3 client takes half a second, which a
worker that reads local disk need not spend.
"""

from __future__ import annotations

import contextlib
import pkgutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipelines.process.redaction import holds_password, redacted
from pipelines.process.retrying import Retries
from pipelines.storage.base import ATOMIC_SCHEMES, Store, not_writable, split_scheme
from pipelines.storage.local import LocalStore
from pspnet_core.errors import ConfigError
from pspnet_core.paths import inside


def open_store(uri: str, *, field: str, retries: Retries | None = None, writable: bool = False) -> Store:
    """The store at ``uri``: a plain path, ``file://``, ``s3://`` or any scheme that fsspec knows.

    Nothing is asked of the storage yet.

    Args:
        uri: the folder.
        field: the config field that holds ``uri``, for error messages.
        retries: how patiently requests are repeated.
        writable: whether its scheme must have an atomic put-if-absent.

    Raises:
        ConfigError: ``uri`` is empty or incomplete, or holds a password, or there is no driver for its scheme, or none
            that may write.
    """
    scheme, rest = split_scheme(uri)
    if holds_password(uri):
        kept = "~/.netrc" if scheme in ("http", "https") else f"FSSPEC_{scheme.upper()}_USERNAME and _PASSWORD"
        raise ConfigError(field, redacted(uri), f"holds a password, which would be kept: put it into {kept}")
    if not rest.strip("/") and not (scheme == "file" and rest):
        raise ConfigError(field, uri or "''", "give a folder: a local path, file://... or s3://bucket/folder")
    kind: type[Store] = pkgutil.resolve_name(ATOMIC_SCHEMES.get(scheme, "pipelines.storage.drivers:DriverStore"))
    store = kind(kind.normalise(scheme, rest), field=field, retries=retries or Retries())
    if writable and scheme not in ATOMIC_SCHEMES:
        raise not_writable(store)
    return store


@contextlib.contextmanager
def to_local(uri: str, *, field: str) -> Iterator[Path]:
    """The file or folder at ``uri`` as a local path; what is remote is downloaded and deleted on leaving.

    Hidden files of a remote folder are left out.

    Raises:
        ConfigError: there is nothing at ``uri``.
        ObjectError: a file vanished or may not be read.
        TransientStorageError: storage does not answer.
    """
    store = open_store(uri, field=field)
    if isinstance(store, LocalStore):
        path = Path(store.root)
        if not path.exists():
            raise ConfigError(field, uri, "no such file or folder")
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="download-") as folder:
        yield _download(store, Path(folder))


def _download(store: Store, folder: Path) -> Path:
    try:
        return _downloaded(store, folder)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(store.field, store.root, f"{error}: rename it") from error


def _downloaded(store: Store, folder: Path) -> Path:
    parent, _, name = store.root.rpartition("/")
    if not parent.endswith("/"):  # the root is more than the bucket or host alone, so it may be one object
        neighbours = type(store)(parent, field=store.field, retries=store.retries)
        if neighbours.exists(name):
            target = inside(folder, name)
            target.write_bytes(neighbours.read(name))
            return target
    for item in store.list():
        target = inside(folder, item.key)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(store.read_if(item.key, item.etag))
    if not any(folder.iterdir()):
        raise ConfigError(store.field, store.root, "there is no file or folder of that name")
    return folder

"""Any other scheme that fsspec has a driver for: reading only, since fsspec names no atomic put-if-absent."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import Any, BinaryIO, NoReturn, TypeVar, cast

import fsspec
from aiohttp import ClientError as HTTPError
from aiohttp import ClientResponseError
from fsspec import AbstractFileSystem

from pipelines.process.retrying import Retries
from pipelines.storage.base import (
    ObjectChanged,
    ObjectDenied,
    ObjectMissing,
    ReadResults,
    Requests,
    Store,
    StoredObject,
    TransientStorageError,
    is_transient,
    not_writable,
    split_scheme,
)
from pspnet_core.errors import ConfigError

T = TypeVar("T")


class DriverStore(Store):
    """A folder of any scheme that fsspec drives, for reading only."""

    def __init__(self, root: str, *, field: str, retries: Retries) -> None:
        super().__init__(root, field=field, retries=retries)
        scheme = split_scheme(root)[0]
        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise ConfigError(field, root, f"the driver of {scheme}:// is not installed: {error}") from error
        except ValueError as error:
            remedy = f"unknown scheme {scheme}://: use a local path, file:// or s3://"
            raise ConfigError(field, root, remedy) from error

    @functools.cached_property
    def filesystem(self) -> AbstractFileSystem:
        return fsspec.url_to_fs(self.root, use_listings_cache=False)[0]

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "filesystem"}

    def path_of(self, path: str) -> str:
        return str(self.filesystem._strip_protocol(self.uri_of(path)))

    def _list(self, prefix: str) -> Iterator[StoredObject]:
        top = self.path_of(prefix)
        entries = self._entries(top)
        if not (entries or prefix or self._retry(lambda: self.filesystem.isdir(top), top)):
            raise ConfigError(self.field, self.root, "no such folder: give an existing one")
        base = self.path_of("").rstrip("/") + "/"
        for name, info in self._walk(entries):
            yield self._object(name.removeprefix(base), self._complete(name, info))

    def _walk(self, entries: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The files among a folder's entries and below them, one folder of each depth in memory at a time."""
        for name, info in entries:
            if info["type"] == "directory":
                yield from self._walk(self._entries(name))
            else:
                yield name, info

    def _entries(self, folder: str) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """Names and descriptions of what lies in a folder, sorted as the keys below them; none if it has vanished."""
        try:
            found = self._retry(lambda: self.filesystem.ls(folder, detail=True), folder)
        except ObjectMissing:
            return ()
        except ObjectDenied as error:
            raise ConfigError(self.field, self.root, error.message) from error
        # Some drivers list a folder within itself.
        named = [(info["name"], info) for info in found if info["name"].rstrip("/") != folder.rstrip("/")]
        return sorted(named, key=lambda entry: f"{entry[0].rstrip('/')}{'/' * (entry[1]['type'] == 'directory')}")

    def _complete(self, name: str, info: Mapping[str, Any]) -> Mapping[str, Any]:
        """``info``, asked for once more where a listing does not tell sizes (http)."""
        if info.get("size") is not None:
            return info
        return cast(Mapping[str, Any], self._retry(lambda: self.filesystem.info(name), name))

    def _object(self, path: str, info: Mapping[str, Any]) -> StoredObject:
        return StoredObject(
            uri=self.uri_of(path),
            key=path,
            etag=_driver_etag(info),
            bytes=int(info.get("size") or 0),
            modified=next((_aware(value) for value in info.values() if isinstance(value, datetime)), None),
        )

    def look_up(self, path: str) -> StoredObject | None:
        name = self.path_of(path)
        try:
            info = self._retry(lambda: self.filesystem.info(name), name)
        except ObjectMissing:
            return None
        return self._object(path, info) if info["type"] == "file" else None

    def _read(self, path: str, etag: str | None) -> bytes:
        name = self.path_of(path)
        data = cast(bytes, self._retry(lambda: self.filesystem.cat_file(name), name))
        # No conditional GET that all drivers know: the tag is compared after reading.
        if etag is not None:
            found = self.look_up(path)
            if found is None or found.etag != etag:
                raise ObjectChanged(self.uri_of(path))
        return data

    def _read_many(self, requests: Requests, threads: int) -> ReadResults:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._read_or_error, requests))

    def open(self, path: str) -> BinaryIO:
        name = self.path_of(path)
        return cast(BinaryIO, self._retry(lambda: self.filesystem.open(name, "rb"), name))

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise not_writable(self)

    put_if_absent = put_if_match = delete = _refuse

    def _retry(self, action: Callable[[], T], name: str) -> T:
        def attempt() -> T:
            try:
                return action()
            except (HTTPError, OSError) as error:
                raise self._translate(error, name) from error

        return self.retries.call(attempt, is_transient)

    def _translate(self, error: Exception, name: str) -> Exception:
        if isinstance(error, FileNotFoundError | IsADirectoryError):
            return ObjectMissing(name, f"there is no object {name}")
        refused = isinstance(error, ClientResponseError) and error.status in (401, 403)
        if refused or isinstance(error, PermissionError):
            return ObjectDenied(name, f"may not read {name}: check the credentials")
        if isinstance(error, HTTPError | ConnectionError | TimeoutError | asyncio.TimeoutError):
            tried = f"after {self.retries.attempts} attempts ({type(error).__name__})"
            return TransientStorageError(f"{name}: no good answer {tried}: check the server")
        return error


def _driver_etag(info: Mapping[str, Any]) -> str:
    """What the driver tells about the version, together with the size."""
    names = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "updated", "last_modified", "created")
    version = next((info[name] for name in names if info.get(name)), "")
    if isinstance(version, datetime):  # some drivers list a number and tell a time, or the other way round
        version = version.timestamp()
    return f"{info.get('size')}-{version}".replace('"', "")


def _aware(time: datetime) -> datetime:
    """Drivers that tell no time zone mean UTC."""
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)

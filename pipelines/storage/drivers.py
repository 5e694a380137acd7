"""Any other scheme that fsspec has a driver for: reading only, since fsspec names no atomic put-if-absent."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from http import HTTPStatus
from typing import Any, BinaryIO, NoReturn, TypeVar, cast

import aiohttp
import fsspec
from aiohttp import ClientError as HTTPError
from aiohttp import ClientResponseError
from fsspec import AbstractFileSystem
from fsspec.implementations.http import HTTPFileSystem

from pipelines.process.retrying import Retries
from pipelines.storage.base import (
    LeftOut,
    ObjectChanged,
    ObjectDenied,
    ObjectError,
    ObjectMissing,
    ReadResults,
    Requests,
    Store,
    StoredObject,
    TransientStorageError,
    check_size,
    is_transient,
    not_writable,
    split_scheme,
)
from pspnet_core.errors import ConfigError

T = TypeVar("T")

_BLOCK = 2**20  # bytes of one read of an http body
_GONE = (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)
_MAY_PASS = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)


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
        is_web = split_scheme(self.root)[0] in ("http", "https")
        return fsspec.url_to_fs(self.root, use_listings_cache=False, **{"get_client": _web_client} if is_web else {})[0]

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "filesystem"}

    def path_of(self, path: str) -> str:
        # Asked of the class, as some make a connection as soon as they are made.
        return str(fsspec.get_filesystem_class(split_scheme(self.root)[0])._strip_protocol(self.uri_of(path)))

    def _list(self, prefix: str, left_out: LeftOut | None = None) -> Iterator[StoredObject]:
        top = self.path_of(prefix)
        entries = self._entries(top)
        if not (entries or prefix or self._retry(lambda: self.filesystem.isdir(top), top)):
            raise ConfigError(self.field, self.root, "no such folder: give an existing one")
        base = self.path_of("").rstrip("/") + "/"
        for name, info in self._walk(entries, left_out):
            try:
                yield self._object(name.removeprefix(base), self._complete(name, info))
            except ObjectMissing:  # a page may name what is not there
                continue
            except (ObjectError, TransientStorageError) as error:
                if left_out is None:
                    raise
                left_out(name, error)

    def _walk(
        self, entries: Sequence[tuple[str, Mapping[str, Any]]], left_out: LeftOut | None
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The files among a folder's entries and below them, one folder of each depth in memory at a time."""
        open_folders = [iter(entries)]
        while open_folders:
            name, info = next(open_folders[-1], ("", None))
            if info is None:
                open_folders.pop()
            elif info["type"] == "directory":
                open_folders.append(iter(self._entries_or_none(name, left_out)))
            else:
                yield name, info

    def _entries_or_none(self, folder: str, left_out: LeftOut | None) -> Sequence[tuple[str, Mapping[str, Any]]]:
        try:
            return self._entries(folder)
        except (ConfigError, TransientStorageError) as error:
            if left_out is None:
                raise
            left_out(folder, error)
            return ()

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

    def trouble(self) -> Exception | None:
        try:
            top = self.path_of("")
            self._retry(lambda: self.filesystem.info(top), top)
        except ObjectError:
            return None
        except Exception as error:
            return error
        return None

    def _read(self, path: str, etag: str | None, most: int | None = None) -> bytes:
        name = self.path_of(path)
        data = self._retry(lambda: self._content(name, most), name)
        # No conditional GET that all drivers know: the tag is compared after reading.
        if etag is not None:
            found = self.look_up(path)
            if found is None or found.etag != etag:
                raise ObjectChanged(self.uri_of(path))
        return data

    def _content(self, name: str, most: int | None) -> bytes:
        if most is None or not isinstance(self.filesystem, HTTPFileSystem):
            return cast(bytes, self.filesystem.cat_file(name))
        # The only one whose listings need not tell sizes, and whose servers may say anything: as a stream.
        parts, size = list[bytes](), 0
        with self.filesystem.open(name, "rb", block_size=0, size=1) as stream:  # a size, so that it asks for none
            while part := stream.read(_BLOCK):
                parts.append(part)
                size += len(part)
                check_size(name, size, most)
        return b"".join(parts)

    def _read_many(self, requests: Requests, threads: int) -> ReadResults:
        results: ReadResults = []
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(requests), 4 * threads):
                found = list(pool.map(self._read_or_error, requests[start : start + 4 * threads]))
                results += found
                silent = [error for error in found if isinstance(error, TransientStorageError)]
                if len(silent) == len(found) and self.trouble():  # each attempt at the others takes as long again
                    return results + silent[:1] * (len(requests) - len(results))
        return results

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
        if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, HTTPError | PermissionError):
            return self._translate(error.__cause__, name)  # in which the http driver wraps whatever went wrong
        status = error.status if isinstance(error, ClientResponseError) else 0
        if isinstance(error, FileNotFoundError | IsADirectoryError) or status in _GONE:
            return ObjectMissing(name, f"there is no object {name}")
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN) or isinstance(error, PermissionError):
            return ObjectDenied(name, f"may not read {name}: {error if status == 0 else 'check the credentials'}")
        if HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in _MAY_PASS:
            return ObjectDenied(name, f"the server refused to give {name} ({status})")
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            return ObjectDenied(name, f"the certificate of its server cannot be verified: set SSL_CERT_FILE ({error})")
        if isinstance(error, HTTPError | ConnectionError | TimeoutError | asyncio.TimeoutError):
            tried = f"after {self.retries.attempts} attempts ({type(error).__name__})"
            return TransientStorageError(f"{name}: no good answer {tried}: check the server")
        return error


async def _web_client(**options: Any) -> aiohttp.ClientSession:
    """A session that follows no redirect to another host: what names a page does not name whatever that leads to.

    As for every web client, passwords are in ``~/.netrc`` and proxies in the environment.
    """
    watch = aiohttp.TraceConfig()
    watch.on_request_redirect.append(_check_redirect)
    patience = aiohttp.ClientTimeout(total=300, sock_connect=5, sock_read=30)
    return aiohttp.ClientSession(trace_configs=[watch], trust_env=True, **{**options, "timeout": patience})


async def _check_redirect(session: object, context: object, request: aiohttp.TraceRequestRedirectParams) -> None:
    old, headers = request.url, request.response.headers
    new = old.join(type(old)(headers.get("Location") or headers.get("URI") or ""))
    if new.host != old.host or new.port not in (old.port, 443):
        raise PermissionError(f"it redirects to {new.origin()}")


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

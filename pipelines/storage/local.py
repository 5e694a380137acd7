"""Folders of a mounted file system. How new files get there: ``staging``."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import BinaryIO, TypeVar

import fsspec
from fsspec import AbstractFileSystem

from pipelines.storage import staging
from pipelines.storage.base import (
    TEMPORARY,
    LeftOut,
    ObjectChanged,
    ObjectDenied,
    ObjectMissing,
    ReadResults,
    Requests,
    Store,
    StoredObject,
    TransientStorageError,
    check_size,
    is_transient,
)
from pspnet_core.errors import ConfigError

T = TypeVar("T")

_BLOCK = 2**24  # bytes of one read of a file that holds more than its status says
_SLICE = 32  # files that one thread reads in a row: a hand-over costs as much as a read

_TRANSIENT_ERRNOS = frozenset(
    {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOLCK}
    | {errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH}
)
_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
_GONE_ERRNOS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})
_NO_LINK_ERRNOS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})


class LocalStore(Store):
    """A folder of a mounted file system.

    Listings follow links, though a folder is entered by one link only; a broken one is listed, and reading it gives
    ``ObjectMissing``. Subfolders that are deleted during the listing hold nothing.
    """

    @staticmethod
    def normalise(scheme: str, rest: str) -> str:
        # abspath() keeps a double slash at the front, which would give the same file a second name.
        return "/" + os.path.abspath(os.path.expanduser(rest)).lstrip("/")

    @property
    def filesystem(self) -> AbstractFileSystem:
        return fsspec.filesystem("file")

    def _list(self, prefix: str, left_out: LeftOut | None = None) -> Iterator[StoredObject]:
        if not os.path.isdir(self.root):
            present = os.path.lexists(self.root)
            if prefix and not present:
                return
            what = "is no folder" if present else "no such folder"
            raise ConfigError(self.field, self.root, f"{what}: give an existing one")
        yield from self._walk(f"{prefix}/" if prefix else "", left_out)

    def _walk(self, top: str, left_out: LeftOut | None) -> Iterator[StoredObject]:
        """Depth first, in the byte order of whole keys."""
        linked = set[tuple[int, int]]()  # folders that a link has led to
        folders = [self._open_folder(top, left_out)]  # from the top to where the walk is
        while folders:
            key = next(folders[-1].keys, None)
            if key is None:
                folders.pop()
            elif key.endswith("/"):
                folder = self._open_folder(key, left_out)
                # A link may lead back up, and forks of links to more names than any listing ends with.
                if os.path.islink(self._location(key.rstrip("/"))):
                    if folder.identity in linked or any(folder.identity == above.identity for above in folders):
                        continue
                    linked.add(folder.identity)
                folders.append(folder)
            elif item := self._item(key, left_out):
                yield item

    def _open_folder(self, prefix: str, left_out: LeftOut | None) -> _Folder:
        """A folder's visible entries; none where it is gone, or left out."""
        location = self._location(prefix.rstrip("/"))
        try:
            identity, names = self._retry(prefix.rstrip("/"), _scan)
        except (ConfigError, TransientStorageError, OSError) as error:
            _leave_out(location, error, left_out if prefix else None)
            return _Folder(identity=(0, 0), keys=iter(()))
        keys = []
        for name in names:
            try:
                keys.append(prefix + name.decode())
            except UnicodeDecodeError:
                remedy = f"holds a name that is not UTF-8, {name!r}: rename it"
                _leave_out(f"{location}/{name!r}", ConfigError(self.field, location, remedy), left_out)
        return _Folder(identity=identity, keys=iter(keys))

    def _item(self, key: str, left_out: LeftOut | None) -> StoredObject | None:
        try:
            return self._stat(key, links=True)
        except (ConfigError, TransientStorageError, OSError) as error:
            _leave_out(self._location(key), error, left_out)
            return None

    def look_up(self, path: str) -> StoredObject | None:
        try:
            return self._stat(path, links=False)
        except ConfigError as error:
            if isinstance(error.__cause__, PermissionError):
                raise ObjectDenied(self._location(path), f"{error.value}: {error.remedy}") from error
            raise

    def _stat(self, path: str, *, links: bool) -> StoredObject | None:
        found = self._retry(path, lambda location: _file_status(location, links))
        if found is None:
            return None
        return StoredObject(
            uri=self.uri_of(path),
            key=path,
            etag=_local_etag(found),
            bytes=found.st_size,
            modified=_time_of(found),
        )

    def _location(self, path: str) -> str:
        if ".." in path and ".." in path.split("/"):
            raise ObjectDenied(self.uri_of(path), f"{self.uri_of(path)} leads out of its folder")
        return self.uri_of(path)

    def _read(self, path: str, etag: str | None, most: int | None = None) -> bytes:
        return self._retry(path, lambda location: _read_file(location, etag, most))

    def _read_many(self, requests: Requests, threads: int) -> ReadResults:
        size = min(_SLICE, -(-len(requests) // threads))
        slices = [requests[start : start + size] for start in range(0, len(requests), size)]
        with ThreadPoolExecutor(threads) as pool:
            parts = pool.map(lambda part: [self._read_or_error(each) for each in part], slices)
            results = list(itertools.chain.from_iterable(parts))
        if any(isinstance(result, ObjectMissing) for result in results) and (trouble := self.trouble()):
            # Not one image that went, but a machine without the folder: rows that say Missing would be final.
            return [trouble if isinstance(result, ObjectMissing) else result for result in results]
        return results

    def trouble(self) -> Exception | None:
        if os.path.isfile(self.root) or _has_content(self.root):
            return None
        remedy = f"empty or not there on {os.uname().nodename}; mount it on every node"
        return ConfigError(self.field, self.root, remedy)

    def open(self, path: str) -> BinaryIO:
        return self._retry(path, _open_file)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        return self._retry(path, lambda target: self._link_new(target, data))

    def _link_new(self, target: str, data: bytes) -> bool:
        if os.path.lexists(target):
            return False
        with staging.staged(self._staging, data) as source:
            try:
                return staging.link(source, target)
            except OSError as error:
                if error.errno in _NO_LINK_ERRNOS:
                    remedy = f"all of it must be on one file system that makes hard links ({error.strerror})"
                    raise ConfigError(self.field, self.root, remedy) from error
                raise

    def put_if_match(self, path: str, data: bytes, etag: str) -> bool:
        return self._retry(path, lambda target: self._replace(target, data, etag))

    def _replace(self, target: str, data: bytes, etag: str) -> bool:
        with staging.one_at_a_time(self._staging):
            found = _file_status(target, links=False)
            if found is None:
                return False
            if _local_etag(found) != etag:
                return _read_file(target) == data
            with staging.staged(self._staging, data) as source:
                return staging.move(source, target)

    def delete(self, path: str) -> None:
        self._retry(path, self._remove)

    def _remove(self, target: str) -> None:
        """Unlink the file, and the folders that it leaves empty: object stores have no folders."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)
        folder = os.path.dirname(target)
        while folder != self.root and folder.startswith(self.root):
            try:
                os.rmdir(folder)
            except OSError:  # not empty; and one that may not be removed does no harm
                return
            folder = os.path.dirname(folder)

    @property
    def _staging(self) -> str:
        return self.uri_of(TEMPORARY)

    def check_writable_atomically(self) -> None:
        super().check_writable_atomically()
        self._retry(TEMPORARY, staging.sweep)

    def _retry(self, path: str, action: Callable[[str], T]) -> T:
        """``action(location of path)``, repeated while the disk or mount may answer another time."""
        location = self._location(path)

        def attempt() -> T:
            try:
                return action(location)
            except OSError as error:
                raise self._translate(error, location) from error

        try:
            return attempt()
        except TransientStorageError:
            # Only now, since the bookkeeping of retries costs more than reading a small file.
            return self.retries.call(attempt, is_transient, done=1)

    def _translate(self, error: OSError, location: str) -> Exception:
        reason = error.strerror or str(error)
        if error.errno in _TRANSIENT_ERRNOS:
            attempts = self.retries.attempts
            return TransientStorageError(f"{location}: {reason} after {attempts} attempts: check the disk or mount")
        if error.errno in _FULL_ERRNOS:
            return TransientStorageError(f"{location}: {reason}: free some room, then start the same command again")
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            return ConfigError(self.field, location, f"may not be used ({reason}): grant access to it")
        if isinstance(error, FileExistsError | NotADirectoryError):
            return ConfigError(self.field, location, "a file is in the way where a folder is needed")
        return error


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """A folder that is being walked: its device and inode, and the keys that are still to come."""

    identity: tuple[int, int]
    keys: Iterator[str]


def _leave_out(uri: str, error: Exception, left_out: LeftOut | None) -> None:
    """Tell of what a listing leaves out; where nobody listens, raise its error."""
    if left_out is None:
        raise error
    left_out(uri, error)


def _scan(folder: str) -> tuple[tuple[int, int], Sequence[bytes]]:
    """Device and inode of a folder, and the sorted names of its visible entries; nothing if it is gone.

    A slash marks folders, so that they sort as the keys below them do.
    """
    try:
        found = os.stat(folder)
        with os.scandir(os.fsencode(folder)) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(b".")]
    except OSError as error:
        if error.errno in _GONE_ERRNOS - {errno.ENAMETOOLONG}:
            return (0, 0), ()
        raise
    names = sorted(entry.name + b"/" if _is_folder(entry) else entry.name for entry in visible)
    return (found.st_dev, found.st_ino), names


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere or may not be followed: its status will tell
        return False


def _has_content(folder: str) -> bool:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return any(True for _ in entries)
    return False


def _local_etag(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}"


def _time_of(found: os.stat_result) -> datetime | None:
    try:
        return datetime.fromtimestamp(found.st_mtime, tz=timezone.utc)
    except (OverflowError, ValueError):  # beyond the year 9999, which a damaged file system may say
        return None


def _file_status(location: str, links: bool) -> os.stat_result | None:
    """Status of a regular file, links followed, else None; with ``links`` also of a broken link itself."""
    try:
        found = os.stat(location)
    except OSError as error:
        if error.errno not in _GONE_ERRNOS:
            raise
        return os.lstat(location) if links and os.path.islink(location) else None
    return found if stat.S_ISREG(found.st_mode) else None


def _open_file(location: str) -> BinaryIO:
    try:
        return open(location, "rb", buffering=0, opener=_open_regular)
    except PermissionError as error:
        raise ObjectDenied(location, f"may not read {location}: grant read access to it") from error
    except OSError as error:
        if error.errno in _GONE_ERRNOS:
            raise ObjectMissing(location, f"there is no file {location}") from error
        raise


def _open_regular(location: str, flags: int) -> int:
    """Open a file; of a pipe or a device one might wait for ever, or read without end."""
    descriptor = os.open(location, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ObjectMissing(location, f"{location} is no regular file")
    return descriptor


def _read_file(location: str, etag: str | None = None, most: int | None = None) -> bytes:
    with _open_file(location) as file:
        size = _checked(file, location, etag)  # before it is read, because it may have grown beyond memory
        check_size(location, size, most)
        parts = [file.read(size + 1)]
        while part := file.read(_BLOCK):  # a short read, or a file whose status does not tell its size
            parts.append(part)
            check_size(location, sum(map(len, parts)), most)
        _checked(file, location, etag)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _checked(file: BinaryIO, location: str, etag: str | None) -> int:
    """The size of an open file, which still has this etag."""
    found = os.fstat(file.fileno())
    if etag is not None and _local_etag(found) != etag:
        raise ObjectChanged(location)
    return found.st_size

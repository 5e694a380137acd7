"""Folders of a mounted file system.

A new file is written below ``.tmp``, brought to disk, and linked to its name: a link either makes the name or finds it
taken, so two writers cannot both win and no reader sees half a file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import BinaryIO, TypeVar

import fsspec
from fsspec import AbstractFileSystem

from pipelines.storage.base import (
    TEMPORARY,
    ObjectChanged,
    ObjectDenied,
    ObjectMissing,
    ReadResults,
    Requests,
    Store,
    StoredObject,
    TransientStorageError,
    is_transient,
)
from pspnet_core.errors import ConfigError

T = TypeVar("T")

_STALE_SECONDS = 24 * 3600
_STAGED = re.compile("[0-9a-f]{32}")
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

    Listings follow links (a loop is not entered twice); a broken one is listed, and reading it gives
    ``ObjectMissing``. Subfolders that are deleted during the listing hold nothing; ones that may not be listed are an
    error, because leaving them out would lose data.
    """

    @staticmethod
    def normalise(scheme: str, rest: str) -> str:
        # abspath() keeps a double slash at the front, which would give the same file a second name.
        return "/" + os.path.abspath(os.path.expanduser(rest)).lstrip("/")

    @property
    def filesystem(self) -> AbstractFileSystem:
        return fsspec.filesystem("file")

    def _list(self, prefix: str) -> Iterator[StoredObject]:
        if not os.path.isdir(self.root):
            present = os.path.lexists(self.root)
            if prefix and not present:
                return
            what = "is no folder" if present else "no such folder"
            raise ConfigError(self.field, self.root, f"{what}: give an existing one")
        yield from self._walk(f"{prefix}/" if prefix else "", frozenset())

    def _walk(self, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[StoredObject]:
        """Depth first, in the byte order of whole keys; ``above`` identifies the folders around this one."""
        identity, names = self._retry(prefix.rstrip("/"), _scan)
        if identity is None or identity in above:  # deleted since, or a link that leads back up
            return
        for name in names:
            key = prefix + self._decode(prefix, name)
            if key.endswith("/"):
                yield from self._walk(key, above | {identity})
            else:
                item = self._stat(key, links=True)
                if item is not None:
                    yield item

    def _decode(self, prefix: str, name: bytes) -> str:
        try:
            return name.decode()
        except UnicodeDecodeError as error:
            remedy = f"holds a name that is not UTF-8, {name!r}: rename it"
            raise ConfigError(self.field, self._location(prefix.rstrip("/")), remedy) from error

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
            modified=datetime.fromtimestamp(found.st_mtime, tz=timezone.utc),
        )

    def _location(self, path: str) -> str:
        if ".." in path and ".." in path.split("/"):
            raise ValueError(f"path leaves the store: {path!r}")
        return self.uri_of(path)

    def _read(self, path: str, etag: str | None) -> bytes:
        return self._retry(path, lambda location: _read_file(location, etag))

    def _read_many(self, requests: Requests, threads: int) -> ReadResults:
        size = min(_SLICE, -(-len(requests) // threads))
        slices = [requests[start : start + size] for start in range(0, len(requests), size)]
        with ThreadPoolExecutor(threads) as pool:
            parts = pool.map(lambda part: [self._read_or_error(each) for each in part], slices)
            results = list(itertools.chain.from_iterable(parts))
        if all(isinstance(result, ObjectMissing) for result in results) and not _has_content(self.root):
            # Not one image that went, but a machine without the folder: rows that say Missing would be final.
            raise ConfigError(
                self.field, self.root, f"empty or not there on {os.uname().nodename}; mount it on every node"
            )
        return results

    def open(self, path: str) -> BinaryIO:
        return self._retry(path, _open_file)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        return self._retry(path, lambda target: self._link_new(target, data))

    def _link_new(self, target: str, data: bytes) -> bool:
        if os.path.lexists(target):
            return False
        with self._staged(data) as staged:
            try:
                if not _link(staged, target):
                    return False
            except OSError as error:
                if error.errno in _NO_LINK_ERRNOS:
                    remedy = f"all of it must be on one file system that makes hard links ({error.strerror})"
                    raise ConfigError(self.field, self.root, remedy) from error
                raise
        _sync_folder(os.path.dirname(target))
        return True

    def put_if_match(self, path: str, data: bytes, etag: str) -> bool:
        return self._retry(path, lambda target: self._replace(target, data, etag))

    def _replace(self, target: str, data: bytes, etag: str) -> bool:
        with self._lock():
            found = _file_status(target, links=False)
            if found is None:
                return False
            if _local_etag(found) != etag:
                return _read_file(target, None) == data
            with self._staged(data) as staged:
                try:
                    os.replace(staged, target)
                except FileNotFoundError:  # another process deleted it, folder and all
                    return False
        _sync_folder(os.path.dirname(target))
        return True

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

    @contextlib.contextmanager
    def _staged(self, data: bytes) -> Iterator[str]:
        """``data`` in a file of its own, on disk, beside the store's content and outside its listings."""
        staged = f"{self._staging()}/{uuid.uuid4().hex}"
        try:
            with open(staged, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield staged
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staged)

    def _staging(self) -> str:
        folder = self.uri_of(TEMPORARY)
        os.makedirs(folder, exist_ok=True)
        return folder

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One replacement at a time; the system lets go of the lock when its holder dies."""
        with open(f"{self._staging()}/replace.lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def check_writable_atomically(self) -> None:
        super().check_writable_atomically()
        self._retry(TEMPORARY, self._sweep)

    def _sweep(self, folder: str) -> None:
        """Delete what writers that were killed long ago have left."""
        oldest = time.time() - _STALE_SECONDS
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process sweeps too
                    if _STAGED.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_mtime < oldest:
                        os.unlink(entry.path)

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


def _scan(folder: str) -> tuple[tuple[int, int] | None, Sequence[bytes]]:
    """Device and inode of a folder, and the sorted names of its visible entries; nothing if it is gone.

    A slash marks folders, so that they sort as the keys below them do.
    """
    try:
        found = os.stat(folder)
        with os.scandir(os.fsencode(folder)) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(b".")]
    except OSError as error:
        if error.errno in _GONE_ERRNOS:
            return None, ()
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
        return open(location, "rb", buffering=0)
    except PermissionError as error:
        raise ObjectDenied(location, f"may not read {location}: grant read access to it") from error
    except OSError as error:
        if error.errno in _GONE_ERRNOS:
            raise ObjectMissing(location, f"there is no file {location}") from error
        raise


def _read_file(location: str, etag: str | None) -> bytes:
    with _open_file(location) as file:
        _check_etag(file, location, etag)  # before it is read, because it may have grown beyond memory
        data = file.read()
        _check_etag(file, location, etag)
    return data


def _check_etag(file: BinaryIO, location: str, etag: str | None) -> None:
    if etag is not None and _local_etag(os.fstat(file.fileno())) != etag:
        raise ObjectChanged(location)


def _link(staged: str, target: str) -> bool:
    """Link the file to its place unless that is taken, while other processes may delete the folder as empty."""
    while os.path.exists(staged):
        with contextlib.suppress(FileNotFoundError):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            try:
                os.link(staged, target)
            except FileExistsError:
                return False
            return True
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), staged)


def _sync_folder(folder: str) -> None:
    """Bring a new name to disk: without it a power cut may lose a file that was reported as written."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

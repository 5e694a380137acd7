"""The ``Store`` base class, the objects that it lists, and its errors.

A ``Store`` is a folder named by a URI. Its methods take paths relative to that folder, separated by ``/``, and take
them literally: nothing is percent-encoded or decoded, so that a listed ``uri`` or ``key`` names its object again.

::

    TransientStorageError   storage did not answer after bounded retries: the same command may work later
    ObjectError             one object cannot be had, its neighbours can; ``str()`` is "Kind: message"
    ├── ObjectChanged       it is not the object that was listed
    ├── ObjectMissing       it is gone, or no file
    ├── ObjectTooLarge      it has more bytes than its reader takes
    └── ObjectDenied        it may not be read
        └── ObjectArchived  the storage archived it: restore it first

Everything else that a user can fix (no such bucket or folder, wrong credentials) is a ``ConfigError``.
"""

from __future__ import annotations

import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import BinaryIO, ClassVar, TypeAlias

from fsspec import AbstractFileSystem

from pipelines.process.retrying import Retries
from pspnet_core.errors import ConfigError, PspnetError, one_line

ATOMIC_SCHEMES = {
    "file": "pipelines.storage.local:LocalStore",
    "s3": "pipelines.storage.s3:S3Store",
    "s3a": "pipelines.storage.s3:S3Store",
}
"""Schemes with an atomic put-if-absent, the ones that may be written to, and the store of each."""

THREADS = 32
"""Concurrent reads of one ``read_many`` by default."""

TEMPORARY = ".tmp"
"""Folder below a store's root for files that are being written; hidden, so that no listing shows it."""

_PROBE = f"{TEMPORARY}/put-if-absent"
_PROBES = 3  # attempts at replacing it: another run may do so at the same moment
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class TransientStorageError(PspnetError):
    """Storage did not answer, or had no room, after bounded retries; the same command may work later."""


def is_transient(error: BaseException) -> bool:
    """Whether storage may answer another attempt."""
    return isinstance(error, TransientStorageError)


class ObjectError(PspnetError):
    """One object cannot be had while its neighbours can; ``str()`` gives ``Kind: message`` in one line.

    Attributes:
        uri: the object.
        message: what was found, for people.
    """

    kind: ClassVar[str]

    def __init__(self, uri: str, message: str) -> None:
        super().__init__(uri, message)
        self.uri = uri
        self.message = message

    def __str__(self) -> str:
        return one_line(f"{self.kind}: {self.message}")


class ObjectChanged(ObjectError):
    """The object is no longer the one that was listed."""

    kind = "Changed"

    def __init__(self, uri: str, message: str = "") -> None:
        super().__init__(uri, message or f"{uri} has changed since it was listed")


class ObjectMissing(ObjectError):
    """There is no such object (any more)."""

    kind = "Missing"


class ObjectTooLarge(ObjectError):
    """The object has more bytes than its reader takes."""

    kind = "TooLarge"


class ObjectDenied(ObjectError):
    """The object may not be read, or not even looked at: no permission, or the storage archived it."""

    kind = "Denied"


class ObjectArchived(ObjectDenied):
    """The storage archived the object, which has to be restored before it can be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredObject:
    """One listed object.

    Attributes:
        uri: absolute path for local files, ``scheme://...`` for everything else.
        key: path relative to the store's root.
        etag: version tag without quotes; for local files ``<size>-<mtime_ns>``.
        bytes: size.
        modified: time of the last change with time zone, where the storage tells.
    """

    uri: str
    key: str
    etag: str
    bytes: int
    modified: datetime | None


# Names for annotations: inside `Store`, which has a method `list`, the builtin cannot be written.
LeftOut: TypeAlias = Callable[[str, Exception], None]
"""Takes the URI of a name or folder that a listing leaves out, and why."""
Request: TypeAlias = tuple[str, str | None] | tuple[str, str | None, int]
Requests: TypeAlias = Sequence[Request]
ReadResults: TypeAlias = list[bytes | Exception]


def check_size(uri: str, size: int, most: int | None) -> None:
    """Raise ObjectTooLarge for an object of more than ``most`` bytes; None allows any size."""
    if most is not None and size > most:
        raise ObjectTooLarge(uri, f"{size} bytes or more; at most {most} are read")


def not_writable(store: Store) -> ConfigError:
    """The error of a store whose scheme is for reading only."""
    schemes = ", ".join(f"{scheme}://" for scheme in ATOMIC_SCHEMES)
    return ConfigError(store.field, store.root, f"this scheme has no atomic put-if-absent here; use {schemes}")


def split_scheme(uri: str) -> tuple[str, str]:
    """Scheme in lower case and what follows ``://``; a plain path has the scheme ``file``."""
    match = _SCHEME.match(uri)
    if match is None:
        return "file", uri
    return match.group(1).lower(), uri[match.end() :]


class Store(ABC):
    """A folder named by a URI. Safe to share between threads, and cheap to pickle: it holds no connection.

    Attributes:
        root: the folder's URI without a trailing slash; an absolute path for local folders.
        field: the config field that the URI came from; errors name it.
        retries: how patiently requests are repeated.
    """

    def __init__(self, root: str, *, field: str, retries: Retries) -> None:
        self.root = root
        self.field = field
        self.retries = retries

    @staticmethod
    def normalise(scheme: str, rest: str) -> str:
        """The root for ``scheme://rest``."""
        return f"{scheme}://{rest.rstrip('/')}"

    @property
    @abstractmethod
    def filesystem(self) -> AbstractFileSystem:
        """Filesystem of fsspec for PyArrow and DuckDB; caches no listings and takes paths of ``path_of``."""

    @abstractmethod
    def _list(self, prefix: str, left_out: LeftOut | None = None) -> Iterator[StoredObject]:
        """All objects below the folder ``prefix``, hidden ones too if that is easier; ``left_out`` as for
        ``list_in_parts``."""

    @abstractmethod
    def look_up(self, path: str) -> StoredObject | None:
        """As ``stat``. Raises ObjectDenied where that one has a mistake of the user's."""

    @abstractmethod
    def _read(self, path: str, etag: str | None, most: int | None = None) -> bytes:
        """The bytes of ``path``, provided that it still has ``etag`` (None: whatever it is), and at most so many."""

    @abstractmethod
    def _read_many(self, requests: Requests, threads: int) -> ReadResults:
        """As ``read_many``."""

    @abstractmethod
    def open(self, path: str) -> BinaryIO:
        """A seekable stream of one object, for files that are read in parts. Raises as ``read``."""

    @abstractmethod
    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Create ``path`` atomically: readers see the whole object or none.

        Returns:
            False when there is an object already, which is left as it is. It may come from this very call, when an
            answer was lost on the way: callers whose data is a pure function of ``path`` take False for success.

        Raises:
            ConfigError: the place may not be written, or its scheme has no atomic put-if-absent.
            TransientStorageError: storage does not answer, or is full.
        """

    @abstractmethod
    def put_if_match(self, path: str, data: bytes, etag: str) -> bool:
        """Replace ``path`` atomically, provided that it still has ``etag``.

        Returns:
            True when the object holds ``data`` now; False when it has changed or is gone, and was left alone.

        Raises:
            As ``put_if_absent``.
        """

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove ``path``; one that is not there is no error.

        Raises:
            As ``put_if_absent``.
        """

    def uri_of(self, path: str) -> str:
        """The URI of ``path``, as it appears in listings."""
        return f"{self.root.rstrip('/')}/{path}" if path else self.root

    def path_of(self, path: str) -> str:
        """``path`` in the form that ``filesystem`` takes: without the scheme."""
        return split_scheme(self.uri_of(path))[1]

    def list(self, prefix: str = "", suffixes: Collection[str] | None = None) -> Iterator[StoredObject]:
        """The objects below the folder ``prefix`` at any depth, as a stream in key order.

        Left out are folder placeholders, names in which a part below ``prefix`` starts with a dot, and, where
        ``suffixes`` are given, names that end in none of them (case does not matter). A missing ``prefix`` is an
        empty folder; a missing root is an error.

        Key order is the byte order of the UTF-8 key on local disk and AWS. Other S3 servers have an order of their
        own (SeaweedFS walks folder by folder), so the order serves people and must not be relied on.

        Raises:
            ConfigError: no such bucket or folder, or it may not be listed.
            TransientStorageError: storage does not answer.
        """
        prefix = prefix.strip("/")
        return _visible(self._list(prefix), prefix, suffixes)

    def list_in_parts(self, left_out: LeftOut | None = None) -> Iterator[Iterator[StoredObject]]:
        """What ``list`` gives, in one or more streams that may be drawn from at the same time.

        Each object is in one of them. Raises as ``list``, and so do the streams.

        Args:
            left_out: told of each name that is no text and each folder that cannot be listed, in any thread. Without
                it they are errors, because leaving them out may lose data.
        """
        return (_visible(part, "", None) for part in self._parts(left_out))

    def _parts(self, left_out: LeftOut | None) -> Iterator[Iterator[StoredObject]]:
        """As ``list_in_parts``, hidden objects too."""
        yield self._list("", left_out)

    def read(self, path: str) -> bytes:
        """All bytes of ``path``.

        Raises:
            ObjectMissing, ObjectDenied: there is no such object; it may not be read.
            ConfigError: no such bucket, or wrong credentials.
            TransientStorageError: storage does not answer.
        """
        return self._read(path, None)

    def read_if(self, path: str, etag: str) -> bytes:
        """All bytes of ``path``, all of them from the version ``etag``.

        Raises:
            ObjectChanged: it has another version now.
            And as ``read``.
        """
        return self._read(path, etag)

    def read_many(self, requests: Requests, *, threads: int = THREADS) -> ReadResults:
        """Read many objects, at most ``threads`` at a time; no object's error keeps another one from being read.

        Args:
            requests: ``(path, etag)``, where None for an etag reads whatever is there; or ``(path, etag, bytes)``, of
                which more bytes are ``ObjectTooLarge``.
            threads: upper bound of concurrent reads.

        Returns:
            One entry per request, in order: the bytes, or what reading raised: an ObjectError is the object's own, a
            ConfigError or TransientStorageError is the storage's if ``trouble`` says so.
        """
        return self._read_many(requests, max(1, min(threads, len(requests)))) if requests else []

    def _read_or_error(self, request: Request) -> bytes | Exception:
        try:
            return self._read(*request)
        except Exception as error:
            return error

    def trouble(self) -> Exception | None:
        """What storage raises when it is asked about the root now; None where it answers."""
        try:
            next(self.list(), None)
        except Exception as error:
            return error
        return None

    def stat(self, path: str) -> StoredObject | None:
        """What ``path`` is now; None when there is no such object.

        Raises:
            ConfigError: it may not be looked at; no such bucket, or wrong credentials.
            TransientStorageError: storage does not answer.
        """
        try:
            return self.look_up(path)
        except ObjectDenied as error:
            raise ConfigError(self.field, self.root, error.message) from error

    def exists(self, path: str) -> bool:
        """Whether there is an object at ``path`` now. A folder is no object."""
        return self.stat(path) is not None

    def check_writable_atomically(self) -> None:
        """Prove that put-if-absent works here, with a small hidden object that stays.

        Some storages accept the condition and ignore it, and would let two writers overwrite each other.

        Raises:
            ConfigError: it does not, or the place may not be written.
            TransientStorageError: storage does not answer.
        """
        if not self.put_if_absent(_PROBE, b"") and not self.exists(_PROBE):
            raise self._refuses("new objects with If-None-Match")
        if self.put_if_absent(_PROBE, b""):
            raise self._overwrites("If-None-Match")

    def check_replaces_atomically(self) -> None:
        """``check_writable_atomically``, and prove that replace-if-unchanged works here as well."""
        self.check_writable_atomically()
        if self.put_if_match(_PROBE, secrets.token_bytes(8), "0" * 32):
            raise self._overwrites("If-Match")
        before = None
        for _ in range(_PROBES):
            found = self.stat(_PROBE)
            if before and found and before.etag != found.etag:
                return  # another run has replaced it
            if found and self.put_if_match(_PROBE, secrets.token_bytes(8), found.etag):
                return
            before = found
        raise self._refuses("to replace what has not changed with If-Match")

    def _refuses(self, what: str) -> ConfigError:
        return ConfigError(self.field, self.root, f"this storage refuses {what}; use one that honours the condition")

    def _overwrites(self, condition: str) -> ConfigError:
        remedy = f"this storage overwrites although asked not to; use one that honours {condition}"
        return ConfigError(self.field, self.root, remedy)


def _visible(objects: Iterable[StoredObject], prefix: str, suffixes: Collection[str] | None) -> Iterator[StoredObject]:
    """Those of some objects that a listing of the folder ``prefix`` shows."""
    endings = None if suffixes is None else tuple(suffix.lower() for suffix in suffixes)
    for item in objects:
        below = item.key[len(prefix) :].lstrip("/")
        if is_hidden(below) or below.endswith("/") or not below:
            continue
        if endings is None or item.key.lower().endswith(endings):
            yield item


def is_hidden(key: str) -> bool:
    """Whether a part of a relative path starts with a dot; listings leave such names out."""
    return key.startswith(".") or "/." in key

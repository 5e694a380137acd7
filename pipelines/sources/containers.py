"""Files that hold many images: an image's URI is ``<file>/<member>``, its etag and its time are the file's.

A row of a plan, and a row of the label table that is to be retried, name file and member and nothing else. ``read``
finds the member's place in the file anew, and keeps it in memory while the file is in use: a stored position would be
one more thing that may be wrong, and retried rows would not have it.
"""

import functools
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import pyarrow as pa

from pipelines.sources import base
from pipelines.sources.base import DENIED, Damaged, ReadResult, Row, place_of, rows_of, too_large
from pipelines.sources.inputs import FIELD, Inputs, interleaved
from pipelines.storage import (
    ObjectArchived,
    ObjectChanged,
    ObjectDenied,
    ObjectError,
    ObjectMissing,
    Store,
    StoredObject,
    TransientStorageError,
)
from pspnet_core.errors import ConfigError, ImageError, as_image_error, one_line

log = logging.getLogger(__name__)
Look = Callable[[StoredObject], Iterable[Row]]
"""A file -> a row for each of its images, as they are found. Raises whatever keeps it from going on; the rows before
that count."""

Take = Callable[[Store, str, str, Sequence[str]], Mapping[str, ReadResult]]
"""(store, path, etag, members) -> each member's bytes or error. Raises ObjectError when the file cannot be had."""


def members_of(files: Iterable[StoredObject], look: Look, inputs: Inputs) -> Iterator[Row]:
    """The rows of some files of the inputs; several are looked through at the same time, as streams.

    A file that cannot be looked through to its end is logged, and one of ``inputs.omissions``; its neighbours count.

    Raises:
        ConfigError: none of the files can be read, by the permissions or by what they hold.
        TransientStorageError: storage answers nobody.
    """
    looks = _Looks(look, inputs)
    yield from interleaved(map(looks.through, files))
    if looks.refusals and len(looks.refusals) == looks.files:
        raise looks.refusals[0]


class _Looks:
    """How the files of a listing have turned out.

    Attributes:
        files: how many were looked through.
        refusals: of those that hold no images, or may not be read, the mistakes that this would be if all were so.
    """

    def __init__(self, look: Look, inputs: Inputs) -> None:
        self.look, self.inputs = look, inputs
        self.files, self.refusals = 0, list[ConfigError]()

    def through(self, item: StoredObject) -> Iterator[Row]:
        """The rows of one file, up to its end or to what keeps it from being read any further."""
        self.files += 1
        found = 0
        try:
            for row in self.look(item):
                found += 1
                yield row
        except TransientStorageError as error:
            if place_of(item.uri, item.key)[0].trouble():
                raise
            self._tell(item, found, error)
        except Exception as error:
            self._tell(item, found, error)

    def _tell(self, item: StoredObject, found: int, error: Exception) -> None:
        self.inputs.omissions.add_file(error)
        passes = isinstance(error, ObjectError | TransientStorageError)
        lost = "its images are left to the next run" if passes else "it is left out"
        kept = f"the {found} images before that are listed" if found else lost
        log.warning("%s; %s", one_line(_why(item.uri, error)), kept)
        if found:
            return
        if isinstance(error, ConfigError):
            self.refusals.append(error)
        elif isinstance(error, ObjectDenied) and not isinstance(error, ObjectArchived):
            remedy = f"none of the files there may be read: grant access; {error.message}"
            self.refusals.append(ConfigError(FIELD, self.inputs, remedy))


def _why(uri: str, error: Exception) -> str:
    if isinstance(error, ObjectError | TransientStorageError):
        return str(error)
    if isinstance(error, ConfigError):
        return f"{uri} {error.remedy}"
    return f"{uri} is damaged ({error if isinstance(error, Damaged) else as_image_error(error).message})"


def read_members(rows: pa.Table, suffixes: Collection[str], take: Take) -> list[ReadResult]:
    """As ``Source.read``, file by file; what is read of a file that turns out to have changed is thrown away."""
    results: dict[int, ReadResult] = {}
    wanted: dict[tuple[Store, str, str], list[tuple[int, str]]] = defaultdict(list)
    ends = re.compile(f"[^/](?:{'|'.join(map(re.escape, suffixes))})(?=/)", re.IGNORECASE)
    etag_of = functools.cache(_etag_now)
    for index, row in enumerate(rows_of(rows)):
        try:
            store, path = _file_of(row, ends, etag_of)
            wanted[store, path, row.etag].append((index, row.key[len(path) + 1 :]))
        except Exception as error:
            results[index] = error
    for (store, path, etag), places in wanted.items():
        found = _read_file(store, path, etag, [member for _, member in places], take)
        lost = ImageError("Truncated", f"{store.uri_of(path)} does not hold all that it says")
        results |= {index: found.get(member, lost) for index, member in places}
    return [results[index] for index in range(len(rows))]


def _file_of(row: Row, ends: re.Pattern[str], etag_of: Callable[[Store, str], str]) -> tuple[Store, str]:
    """The file in a row's key, whose name ``ends`` finds; the etag tells it from folders that are named like files."""
    if row.bytes > base.MAX_BYTES:
        raise too_large(row.bytes)
    store, key = place_of(row.uri, row.key)
    paths = [key[: match.end()] for match in ends.finditer(key)]
    if len(paths) > 1:
        here = [path for path in paths if etag_of(store, path)]
        same = [path for path in here if etag_of(store, path) == row.etag]
        paths = same or here or paths[-1:]
    return store, paths[0]


def _etag_now(store: Store, path: str) -> str:
    """The etag of a file; empty where there is none, ``DENIED`` where it may not be looked at."""
    try:
        item = store.look_up(path)
    except ObjectDenied:
        return DENIED
    return item.etag if item else ""


def _read_file(store: Store, path: str, etag: str, members: Sequence[str], take: Take) -> Mapping[str, ReadResult]:
    """The members' bytes, all of them from the version ``etag``; or, of each, why the file cannot be read."""
    try:
        check_unchanged(store, path, etag)
        found = take(store, path, etag, members)
        check_unchanged(store, path, etag)
        return found
    except ObjectMissing as error:
        # Asked for in this way, a store also notices that the whole folder is not mounted on this machine.
        (answer,) = store.read_many([(path, etag, 0)])
        return dict.fromkeys(members, answer if isinstance(answer, Exception) else error)
    except Exception as error:
        return dict.fromkeys(members, error)


def check_unchanged(store: Store, path: str, etag: str) -> None:
    """Raise ObjectMissing or ObjectChanged unless a file is there in the version ``etag``."""
    item = store.look_up(path)
    if item is None:
        raise ObjectMissing(store.uri_of(path), f"{store.uri_of(path)} is not there any more")
    if item.etag != etag:
        raise ObjectChanged(store.uri_of(path))
